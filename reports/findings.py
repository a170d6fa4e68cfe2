"""The pages of findings: written by hand around blocks of numbers that are generated from runs.

A block stands between `<!-- numbers:begin -->` and `<!-- numbers:end -->` (in README.md:
`headline`). Everything outside is kept as it is.
"""

import ast
from collections.abc import Iterable, Sequence
from pathlib import Path

from reports import study
from reports.load import (
    Interval,
    NotRun,
    Record,
    ReportError,
    Run,
    quality_change,
    write_text,
)

FOLDER = Path("reports/findings")
README = Path("README.md")
NO_RUN = "No saved run yet: `make bench`, then `python -m reports findings`."


def regenerate(
    runs: Sequence[Run],
    repeated: Sequence[Run],
    *,
    folder: Path = FOLDER,
    readme: Path = README,
    source: Path = Path("impl"),
    check: bool = False,
) -> list[Path]:
    """Write every block anew and return the files that changed (with `check`: would change)."""
    families = {family for run in runs for r in run.records for family in r.cell.families}
    families |= {path.stem for path in folder.glob("*.md")} - {"bottlenecks", "README"}
    pages = {folder / f"{family}.md": family_block(family, runs, source) for family in families}
    pages[folder / "bottlenecks.md"] = bottlenecks_block(runs)
    changed = []
    for path, block in sorted(pages.items()):
        old = path.read_text(encoding="utf-8") if path.exists() else new_page(path.stem, source)
        new = replaced(old, "numbers", block, path)
        if not path.exists() or new != old:
            changed.append(path)
            if not check:
                write_text(path, new)
    if readme.exists() and begin("headline") in (old := readme.read_text(encoding="utf-8")):
        new = replaced(old, "headline", headline_block(runs, repeated), readme)
        if new != old:
            changed.append(readme)
            if not check:
                write_text(readme, new)
    return changed


def begin(name: str) -> str:
    return f"<!-- {name}:begin -->"


def end(name: str) -> str:
    return f"<!-- {name}:end -->"


def replaced(text: str, name: str, block: str, path: Path) -> str:
    """`text` with what stands between the markers of `name` replaced by `block`."""
    head, opened, rest = text.partition(begin(name))
    _, closed, tail = rest.partition(end(name))
    if not opened or not closed:
        raise ReportError(
            f"{path} has no {begin(name)} with an {end(name)} after it: put both back where the "
            "numbers belong"
        )
    return f"{head}{opened}\n{block.strip()}\n{closed}{tail}"


def new_page(stem: str, source: Path) -> str:
    """A page for a family that has none: its module's docstring, and room for the numbers."""
    name = stem.replace("_", " ").capitalize()
    idea = "Which operations take the time, per model and phase, from the profiler's traces."
    if stem != "bottlenecks":
        idea = (
            docstring(source, stem) or "What it is, when it wins and when it loses: to be written."
        )
    return f"# {name}\n\n{idea}\n\n{begin('numbers')}\n{end('numbers')}\n"


def module_of(source: Path, family: str) -> ast.Module | None:
    for path in (source / f"{family}.py", source / family / "__init__.py"):
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def docstring(source: Path, family: str) -> str | None:
    module = module_of(source, family)
    return ast.get_docstring(module) if module else None


def claims(source: Path, family: str) -> dict[str, str]:
    """Technique -> the first line of its docstring, read without importing anything."""
    module = module_of(source, family)
    return {
        node.name: (ast.get_docstring(node) or "").split("\n")[0]
        for node in (module.body if module else [])
        if isinstance(node, ast.FunctionDef)
        and any("technique" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def family_block(family: str, runs: Sequence[Run], source: Path) -> str:
    """Claims of the family's techniques, then one table per machine and workload."""
    lines = [f"- `{name}`: {claim}" for name, claim in claims(source, family).items()]
    blocks = ["\n".join(lines)] if lines else []
    for run in runs:
        records = [r for r in run.records if family in r.cell.families and r.speedup]
        absent = [n for n in run.not_run if n.cell and family in n.cell.families]
        if not records and not absent:
            continue
        blocks.append(f"## On {run.hardware_name}\n\n{provenance(run)}")
        for _, found in study.groups(records):
            blocks.append(f"**{found[0].cell.place}**, {found[0].timing} time\n\n{rows(found)}")
        blocks += [verdict_counts(records)] if records else []
        blocks += [absences(absent)] if absent else []
    if len(blocks) == bool(lines):
        blocks.append(NO_RUN)
    blocks.append(
        f"Tests: `pytest -k {family}`; the same numbers: `pytest --benchmark-only -k {family}`."
    )
    return "\n\n".join(blocks)


def provenance(run: Run) -> str:
    return f"Measured {run.when[:10]} at commit `{run.commit_short}`, each cell in one process."


HEAD = ("stack", "speed-up, 95 %", "over", "ms per call", "of the limit", "peak MiB", "quality")


def rows(records: Iterable[Record]) -> str:
    return table(
        HEAD,
        [
            (f"`{r.cell.stack}`", ratio(r.speedup), str(r.info["baseline"]),
             f"{r.seconds * 1e3:.3g}", percent(r.number("limit_fraction")),
             mebibytes(r.number("peak_bytes")), quality(r))
            for r in records
        ],
    )  # fmt: skip


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    written = [" | ".join(head), " | ".join("-" for _ in head), *(" | ".join(x) for x in lines)]
    return "\n".join(f"| {line} |" for line in written)


def ratio(value: Interval | None) -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.value:.2f}× (no interval)"
    return f"{value.value:.2f}× ({value.low:.2f}–{value.high:.2f})"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def mebibytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f}"


def quality(record: Record) -> str:
    metric = study.metric_of(record)
    if metric is None:
        return "not measured"
    change = quality_change(metric)
    return f"{metric['metric']} {metric['value']:.4g}" + (f" ({change})" if change else "")


def verdict_counts(records: Sequence[Record]) -> str:
    """'Faster than its baseline in 5 of 8 cells, slower in 2 (a at ..., b at ...).'"""
    cells = [r for r in records if not r.is_baseline]
    slower = [r for r in cells if r.verdict == "slower"]
    named = ", ".join(f"`{r.cell.stack}` on {r.cell.model} {r.cell.precision} batch {r.cell.batch}"
                      for r in slower)  # fmt: skip
    faster = sum(r.verdict == "faster" for r in cells)
    text = f"Faster than its baseline in {faster} of {len(cells)} cells"
    return f"{text}, slower in {len(slower)}: {named}." if slower else f"{text}, slower in none."


def absences(absent: Sequence[NotRun]) -> str:
    listed = [f"- {len(cells)} x {reason}" for reason, cells in study.reasons(list(absent))]
    return "Not run:\n\n" + "\n".join(listed)


def bottlenecks_block(runs: Sequence[Run]) -> str:
    """The top operations of every traced cell."""
    blocks = []
    for run in runs:
        traced = [r for r in run.records if r.info.get("trace")]
        if traced:
            blocks.append(f"## On {run.hardware_name}\n\n{provenance(run)}")
        for r in traced:
            trace = r.info["trace"]
            lines = [
                (f"`{op['name']}`", f"{op['calls'] or 0:g}",
                 f"{op['self_ms']:.3g}" if op["self_ms"] is not None else "–", percent(op["share"]))
                for op in trace["top_ops"][:8]
            ]  # fmt: skip
            block = f"**{r.cell}**\n\n{table(('operation', 'calls', 'own ms', 'share'), lines)}"
            layers = [f"`{x['name']}` {percent(x['share'])}" for x in trace["layers"][:5]]
            blocks.append(block + (f"\n\nBy layer: {', '.join(layers)}." if layers else ""))
    return "\n\n".join(blocks) or (
        "No traced run yet: `pytest --benchmark-only --save-trace`, then "
        "`python -m reports findings`."
    )


def headline_block(runs: Sequence[Run], repeated: Sequence[Run]) -> str:
    """What the README prints: the worst of fresh processes, then what only one has measured."""
    return "\n\n".join(map(winners_block, [*repeated, *runs])) or NO_RUN


def winners_block(run: Run) -> str:
    """The fastest stacks of a run, and in how many processes they were."""
    unstable = {
        ("+".join(c["cell"]["techniques"]), c["cell"]["model"], c["cell"]["precision"],
         c["cell"]["batch"], c["cell"]["workload"])
        for c in (run.headline or {}).get("cells", []) if c["unstable"]
    }  # fmt: skip
    lines = []
    for winner in study.winners(run):
        r, c = winner.record, winner.record.cell
        shaky = (c.stack, c.model, c.precision, c.batch, c.workload) in unstable
        lines.append((c.place, f"`{c.stack}`" + (" (unstable)" if shaky else ""),
                      f"{ratio(r.speedup)} over {r.info['baseline']}", winner.claim,
                      percent(r.number("limit_fraction")), quality(r)))  # fmt: skip
    how = "each cell in one process"
    if run.headline:
        how = f"worst bounds of {len(run.headline['runs'])} fresh processes (`make headline`)"
    head = ("workload", "fastest stack", "speed-up, 95 %", "among", "of the limit", "quality")
    return (
        f"On {run.hardware_name}, {run.when[:10]}, commit `{run.commit_short}`, {how}:\n\n"
        + table(head, lines)
    )
