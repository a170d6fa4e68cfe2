"""The plots, as SVG text that stands inside the page.

Small figures, one per workload, so that a phone shows each at its own size. Text stays text
(`svg.fonttype: none`), and colours are the page's CSS variables: a dark page has dark plots.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from reports.load import Record
from reports.study import ParetoPoint, is_peer

WIDTH = 4.1  # inches; 295 units of the viewBox, about a phone's width in CSS pixels
PALETTE = {  # colours that no one sees: each is replaced by the CSS variable of its name
    "#010101": "ink", "#020202": "soft", "#030303": "line", "#040404": "faster",
    "#050505": "slower", "#060606": "same", "#070707": "ambiguous", "#080808": "accent",
    "#090909": "card",
}  # fmt: skip
COLOR = {name: code for code, name in PALETTE.items()}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "font.family": "DejaVu Sans",
    "text.color": COLOR["ink"],
    "axes.labelcolor": COLOR["soft"],
    "axes.edgecolor": COLOR["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": COLOR["soft"],
    "ytick.color": COLOR["soft"],
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": COLOR["line"],
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@contextmanager
def drawing(
    height: float, left: float = 0.06, bottom: float = 0.26, top: float = 0.04
) -> Iterator[tuple[Figure, Axes]]:
    """A figure of `height` inches in the study's style, with these margins in inches.

    Margins are given, not searched for: a layout engine draws every figure twice.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        box = (left / WIDTH, bottom / height, 1 - (left + 0.1) / WIDTH, 1 - (bottom + top) / height)
        yield figure, figure.add_axes(box)


def svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element with themed colours and `label` for readers who cannot see."""
    text = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    salt: Any = {"svg.hashsalt": label, "svg.fonttype": "none"}
    with matplotlib.rc_context(salt):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format",
                                                                   "Type")))  # fmt: skip
    body = text.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r'<g id="[a-zA-Z_.]*_?\d*">', "<g>", body)
    for code, name in PALETTE.items():
        body = body.replace(code, f"var(--{name})")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", body)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, count=1, flags=re.S)
    head = re.match(r"<svg[^>]*?>", body)
    box = re.search(r'viewBox="([^"]+)"', body)
    assert head
    assert box
    return (
        f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(label)}" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{body[head.end() :]}'
    )


def ratio_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log axis for ratios, with few round ticks and a line at 1."""
    low, high = min(*values, 1.0) / 1.08, max(*values, 1.0) * 1.08
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = (0.05, 0.1, 0.2, 0.33, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12, 16, 25, 50, 100)
    ticks = [step for step in steps if low <= step <= high]
    while len(ticks) > 7:
        ticks = [t for i, t in enumerate(ticks) if t == 1 or i % 2 == ticks.index(1) % 2]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color=COLOR["soft"], linewidth=1)
    axes.grid(axis="y", visible=False)


@dataclass(frozen=True)
class Rows:
    """Rows of bars: a name above each at the left, its value at the right; no y axis.

    `at` is where each bar stands; a name too long for one line takes two.
    """

    names: Sequence[str]
    at: tuple[float, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Rows":
        lines = [folded(name) for name in names]
        at, y = [], 0.0
        for name in lines:
            y += 0.45 * name.count("\n")
            at.append(y)
            y += 1
        return cls(lines, tuple(at))

    @property
    def height(self) -> float:
        """Inches of a figure that holds them."""
        return 0.42 + 0.36 * ((self.at[-1] if self.at else 0) + 1)


def folded(name: str, width: int = 36) -> str:
    """`name` in as few lines as hold `width` characters, broken after a plus."""
    lines = [""]
    for part in name.replace("+", "+\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def write_rows(axes: Axes, rows: Rows, values: Sequence[str]) -> None:
    first = 0.45 * rows.names[0].count("\n") if rows.names else 0
    axes.set_ylim(rows.at[-1] + 0.65, rows.at[0] - 0.75 - first)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    for y, name, value in zip(rows.at, rows.names, values, strict=True):
        text = axes.get_yaxis_transform()
        for x, words, side, color in ((0, name, "left", "ink"), (1, value, "right", "soft")):
            axes.text(x, y - 0.2, words, transform=text, va="bottom", ha=side, color=COLOR[color],
                      bbox={"color": COLOR["card"], "pad": 0.8})  # fmt: skip


def speedup_bars(records: Sequence[Record], title: str) -> str:
    """Speed-up over the baseline, one bar per stack, whiskers for the 95 % interval."""
    cells = [(r, ratio) for r in records if (ratio := r.speedup)]
    rows = Rows.of([r.cell.stack for r, _ in cells])
    with drawing(rows.height) as (figure, axes):
        ends = [x for _, ratio in cells for x in ratio if x]
        ratio_axis(axes, ends)
        for y, (record, ratio) in zip(rows.at, cells, strict=True):
            color = COLOR[record.verdict]
            axes.plot([1, ratio.value], [y, y], color=color, linewidth=6, solid_capstyle="butt",
                      alpha=0.85 if not is_peer(record) else 0.45)  # fmt: skip
            if ratio.low is not None and ratio.high is not None:
                axes.plot([ratio.low, ratio.high], [y, y], color=COLOR["ink"], linewidth=1.2,
                          marker="|", markersize=6)  # fmt: skip
        write_rows(axes, rows, [ratio_text(x) for _, x in cells])
        return svg(figure, f"Speed-up over the baseline: {title}")


def ratio_text(ratio: Any) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}× (no interval)"
    return f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"


def pareto_plot(points: Sequence[ParetoPoint], title: str) -> str:
    """Quality against time; numbered where nothing is both faster and as good."""
    with drawing(2.7, 0.72, 0.46) as (figure, axes):
        metric = points[0].metric["metric"]
        front = [p for p in points if p.dominated_by is None]
        rest = [p for p in points if p.dominated_by is not None]
        axes.scatter([p.record.seconds * 1e3 for p in rest], [p.metric["value"] for p in rest],
                     s=16, color=COLOR["ambiguous"])  # fmt: skip
        xs, ys = ([p.record.seconds * 1e3 for p in front], [p.metric["value"] for p in front])
        axes.plot(xs, ys, color=COLOR["faster"], linewidth=1, drawstyle="steps-post")
        axes.scatter(xs, ys, s=110, color=COLOR["faster"], zorder=3)
        for number, (x, y) in enumerate(zip(xs, ys, strict=True), 1):
            axes.text(x, y, str(number), ha="center", va="center_baseline", fontsize=7.5, zorder=4,
                      color=COLOR["card"], fontweight="bold")  # fmt: skip
        if max(p.record.seconds for p in points) > 5 * min(p.record.seconds for p in points):
            axes.set_xscale("log")
            log_ticks(axes.xaxis)
        axes.set_xlabel("ms per call (less is better)")
        axes.set_ylabel(metric)
        axes.margins(0.08, 0.12)
        axes.ticklabel_format(axis="y", useOffset=False)
        return svg(figure, f"{metric} against time: {title}")


def log_ticks(axis: Axis) -> None:
    """At most six plain numbers on a log axis."""
    low, high = axis.get_view_interval()
    steps = [m * 10**e for e in range(-4, 9) for m in (1, 2, 5)]
    ticks = [step for step in steps if low <= step <= high]
    if len(ticks) > 6:
        ticks = [10**e for e in range(-4, 9) if low <= 10**e <= high]
    axis.set_ticks(ticks, [f"{tick:,g}" if tick < 1e6 else f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def memory_bars(records: Sequence[Record], title: str) -> str:
    """Peak memory of one call: weights, KV cache, the rest."""
    cells = sorted(
        (r for r in records if r.number("peak_bytes")), key=lambda r: r.info["peak_bytes"]
    )
    rows = Rows.of([r.cell.stack for r in cells])
    with drawing(rows.height + 0.15, bottom=0.42) as (figure, axes):
        for y, record in zip(rows.at, cells, strict=True):
            left, peak = 0.0, float(record.info["peak_bytes"])
            for key, color in (
                ("weight_bytes", "accent"),
                ("kv_bytes", "faster"),
                ("", "ambiguous"),
            ):
                part = min(float(record.number(key) or 0), peak - left) if key else peak - left
                axes.barh(y, part / 2**20, 0.3, left / 2**20, color=COLOR[color])
                left += part
        write_rows(axes, rows, [f"{r.info['peak_bytes'] / 2**20:.0f} MiB" for r in cells])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("MiB")
        return svg(figure, f"Peak memory: {title}")


def near_levels(peaks: dict[str, float]) -> list[list[tuple[str, float]]]:
    """Peaks from low to high, those together whose names would lie over one another."""
    together: list[list[tuple[str, float]]] = []
    for dtype, peak in sorted(peaks.items(), key=lambda item: item[1]):
        if together and peak < 1.4 * together[-1][-1][1]:
            together[-1].append((dtype, peak))
        else:
            together.append([(dtype, peak)])
    return together


def name_levels(axes: Axes, right: float, peaks: dict[str, float]) -> None:
    """Each peak's name and rate above its level, of several near ones above the highest."""
    for near in near_levels(peaks):
        unit = "GOP/s" if all(dtype.startswith("int") for dtype, _ in near) else "GFLOP/s"
        named = ", ".join(f"{dtype} {peak / 1e9:.0f}" for dtype, peak in near)
        axes.text(right, near[-1][1] / 1e9, f"{named} {unit}", ha="right", va="bottom",
                  fontsize=7.5, color=COLOR["soft"])  # fmt: skip


def roofline(records: Sequence[Record], bandwidth: float, peaks: dict[str, float]) -> str:
    """FLOP/s against FLOP per byte under the roofs measured in the same run."""
    points = [(r.info["flops"] / r.info["bytes_moved"], r.info["flops"] / r.seconds, r)
              for r in records if r.number("flops") and r.number("bytes_moved")]  # fmt: skip
    with drawing(2.9, 0.68, 0.46) as (figure, axes):
        xs = [x for x, _, _ in points]
        knees = [peak / bandwidth for peak in peaks.values()]
        left, right = min([*xs, *knees]) / 3, max([*xs, *knees]) * 3
        for peak in peaks.values():
            roof = [bandwidth * left / 1e9, peak / 1e9, peak / 1e9]
            axes.plot([left, peak / bandwidth, right], roof,
                      color=COLOR["soft"], linewidth=1)  # fmt: skip
        name_levels(axes, right, peaks)
        for bound, color in (("memory", "accent"), ("compute", "slower"), (None, "ambiguous")):
            some = [(x, y / 1e9) for x, y, r in points if r.info.get("bound") == bound]
            if some:
                axes.scatter([x for x, _ in some], [y for _, y in some], s=14, color=COLOR[color],
                             label=f"{bound}-bound" if bound else "no limit")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel="GFLOP/s")
        axes.set_xlim(left, right)
        log_ticks(axes.xaxis)
        log_ticks(axes.yaxis)
        axes.legend(loc="lower right", fontsize=8)
        return svg(figure, f"Roofline, read bandwidth {bandwidth / 1e9:.0f} GB/s")


def kernel_roofline(
    numbered: Sequence[tuple[int, Record]], slopes: dict[str, float], peaks: dict[str, float]
) -> str:
    """FLOP/s against FLOP per byte of (operation's number, cell), roofs from the run's probes.

    A slope per bandwidth probe, a level per GEMM probe; the colour says what bounds the cell.
    """
    points = [(r.info["flops"] / r.info["bytes_moved"], r.info["flops"] / r.seconds / 1e9, n, r)
              for n, r in numbered]  # fmt: skip
    with drawing(3.4, 0.68, 0.46) as (figure, axes):
        top, fastest = max(peaks.values()), max(slopes.values())
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        left, right = min(xs) / 3, max(*xs, top / min(slopes.values())) * 3
        for name, rate in slopes.items():
            axes.plot([left, top / rate], [rate * left / 1e9, top / 1e9], linewidth=1,
                      color=COLOR["soft"], linestyle="-" if name == "copy" else "--",
                      label=f"{name} {rate / 1e9:.0f} GB/s")  # fmt: skip
        for peak in peaks.values():
            axes.plot([peak / fastest, right], [peak / 1e9] * 2, color=COLOR["soft"], linewidth=1)
        name_levels(axes, right, peaks)
        for x, y, number, record in points:
            color = {"memory": "accent", "compute": "slower"}.get(
                str(record.info.get("bound")), "soft"
            )
            axes.plot([x], [y], marker="o", markersize=9, color=COLOR[color], alpha=0.85)
            axes.text(x, y, str(number), ha="center", va="center_baseline", fontsize=6.5,
                      color=COLOR["card"], fontweight="bold")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel="GFLOP/s")
        axes.set_xlim(left, right)
        axes.set_ylim(min(ys) / 2, top / 1e9 * 2)
        log_ticks(axes.xaxis)
        log_ticks(axes.yaxis)
        axes.legend(loc="lower right", fontsize=8)
        return svg(figure, f"Roofline of {len(points)} kernel cells")


def ladder_plot(names: Sequence[str], records: Sequence[Record], title: str) -> str:
    """Speed-up over `eager` as techniques are added, one rung below the other."""
    rows = Rows.of(names)
    ratios = [r.speedup for r in records if r.speedup]
    with drawing(rows.height) as (figure, axes):
        ratio_axis(axes, [ratio.value for ratio in ratios])
        for y, ratio, under in zip(rows.at, ratios, [None, *ratios], strict=False):
            below = under.value if under else 1.0
            axes.plot([1, below], [y, y], color=COLOR["line"], linewidth=6, solid_capstyle="butt")
            color = COLOR["faster" if ratio.value >= below else "slower"]
            axes.plot([below, ratio.value], [y, y], color=color, linewidth=6,
                      solid_capstyle="butt")  # fmt: skip
        write_rows(axes, rows, [f"{ratio.value:.2f}×" for ratio in ratios])
        return svg(figure, f"Ladder: {title}")
