"""Numbers and tables as HTML. Every number is written by one of these, with its unit."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from reports.load import Interval, Record, quality_change
from reports.study import is_peer

NOTHING = '<span class="none">–</span>'


def text(value: Any) -> str:
    return escape(str(value))


def ratio(value: Interval | None) -> str:
    """A speed-up with its interval, '2.93× 2.89–2.97'."""
    if value is None:
        return NOTHING
    bounds = "no interval"
    if value.low is not None and value.high is not None:
        bounds = f"{value.low:.2f}–{value.high:.2f}"
    return f'<b>{value.value:.2f}×</b> <span class="ci">{bounds}</span>'


def time(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{significant(seconds / scale)} {unit}"
    return f"{significant(seconds * 1e9)} ns"


def milliseconds(value: float | None) -> str:
    return time(None if value is None else value / 1e3)


def size(count: float | None) -> str:
    if count is None:
        return NOTHING
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{significant(count / scale)} {unit}"
    return f"{count:.0f} B"


def rate(value: float | None, unit: str) -> str:
    """'44 GB/s' from 44e9 and 'B/s'; only bytes and FLOP take a prefix."""
    if value is None:
        return NOTHING
    if not unit.startswith(("B", "FLOP")):
        return f"{significant(value)} {unit}"
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{significant(value / scale)} {prefix}{unit}"
    return f"{significant(value)} {unit}"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.3g} %"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def significant(value: float) -> str:
    """Three digits, never in exponents: 0.0123, 1.23, 123, 1234."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def quality(metric: dict[str, Any] | None) -> str:
    """'perplexity 12.4 +0.015 ± 0.004'"""
    if metric is None:
        return NOTHING
    value = metric.get("value")
    shown = NOTHING if value is None else f"{value:.4g}"
    if change := quality_change(metric).replace("-", "−"):
        shown += f' <span class="ci">{change}</span>'
    return f"{text(metric['metric'])} {shown}"


def verdict(word: str) -> str:
    return f'<span class="verdict {text(word)}">{text(word)}</span>'


def stack(record: Record, link: bool = True) -> str:
    """The techniques, broken at a plus if need be; a link to the cell; peers are marked."""
    names = '<span class="plus">+</span><wbr>'.join(text(n) for n in record.cell.techniques)
    mark = ' <span class="tag">peer</span>' if is_peer(record) else ""
    if not link:
        return f'<span class="stack">{names}</span>{mark}'
    return f'<a class="stack" href="#{anchor(record)}">{names}</a>{mark}'


def anchor(record: Record) -> str:
    return "cell-" + "-".join(
        "".join(c if c.isalnum() else " " for c in f"{record.cell} {record.timing}").split()
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), label: str = ""
) -> str:
    """A table in its own scrolling box; the columns in `numbers` are set right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (
            f"<{tag}{' class=number' if i in numbers else ''}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(line("td", row) for row in rows)
    name = f' aria-label="{text(label)}"' if label else ""
    return (
        f'<div class="scroll" tabindex="0"><table{name}><thead>{line("th", head)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(drawing: str, caption: str, note: str = "") -> str:
    below = f"<div class=note>{note}</div>" if note else ""
    return f"<figure><figcaption>{text(caption)}</figcaption>{drawing}{below}</figure>"


def figures(items: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(items)}</div>' if items else ""


def section(name: str, title: str, lead: str, body: str) -> str:
    return f'<section id="{name}"><h2>{text(title)}</h2><p class="lead">{lead}</p>{body}</section>'
