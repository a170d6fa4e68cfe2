"""The kernels' part of the page: single operations against the limits of the machine.

A kernel cell's model is ``kernel``, its only technique ``<operation>_<implementation>``, its batch
the rows, its workload the operation and its shape.
"""

from collections.abc import Sequence

from reports import markup, plots, study
from reports.compare import ceiling_values
from reports.load import Record, Run
from reports.markup import NOTHING, figure, figures, section, table

HEAD = ["operation", "time", "bytes/s", "FLOP/s", "of the ceiling", "over torch eager",
        "over torch.compile", "over the best library"]  # fmt: skip


def names(record: Record) -> tuple[str, str, str]:
    """(operation, implementation, shape) of a kernel cell."""
    operation, _, shape = record.cell.workload.partition(" ")
    return operation, record.cell.stack.removeprefix(f"{operation}_"), shape


def in_order(records: Sequence[Record]) -> list[Record]:
    """By operation, then by the work of one call, precision and implementation."""
    return sorted(
        records, key=lambda r: (names(r)[0], r.number("flops") or 0, r.cell.precision, r.cell.stack)
    )


def kernels(run: Run) -> str:
    """The section, empty where no kernel was measured."""
    records = in_order([r for r in run.records if study.is_kernel(r)])
    if not records:
        return ""
    rows = [row(r) for r in records]
    lead = (
        "One operation at a time, at the shapes of real layers: element-wise ones on at least "
        "128 MB, linear layers on weights that no cache holds. Bytes are each operand's once, "
        "whatever the code really moves; the ceiling is the larger of bytes / bandwidth (of the "
        "copy probe for what is written and as much that is read, of the read probe for the rest) "
        "and FLOPs / GEMM rate, all measured in the same run "
        f"({run.when[:16].replace('T', ' ')}, commit {run.commit_short})."
    )
    return section("kernels", "Kernels", lead, roofline(run, records)
                   + table(HEAD, rows, range(1, len(HEAD)), "kernels"))  # fmt: skip


def row(r: Record) -> list[str]:
    """One line of the table, in the order of HEAD."""
    operation, implementation, shape = names(r)
    moved, flops = r.number("bytes_moved"), r.number("flops")
    bound = (
        f"<br><span class=ci>{markup.text(r.info['bound'])}</span>" if r.info.get("bound") else ""
    )
    link = f'<a class="stack" href="#{markup.anchor(r)}">{markup.text(operation)}</a>'
    place = f"{implementation} · {shape} · {r.cell.precision}"
    return [
        f'{link}<br><span class="at">{markup.text(place)}</span>',
        markup.time(r.seconds),
        markup.rate(moved / r.seconds if moved else None, "B/s"),
        markup.rate(flops / r.seconds if flops else None, "FLOP/s"),
        markup.percent(r.number("limit_fraction")) + bound,
        markup.ratio(r.speedup),
        against(r, "without", named=False),
        against(r, "peer", named=True),
    ]  # fmt: skip


def against(r: Record, side: str, named: bool) -> str:
    """The ratio to another side of the cell, and who that is."""
    other = r.against(side)
    if other is None:
        return NOTHING
    return markup.ratio(other[1]) + (f"<br><span class=ci>{markup.text(other[0])}</span>"
                                     if named else "")  # fmt: skip


def roofline(run: Run, records: Sequence[Record]) -> str:
    """Every kernel cell under the roofs of this run, numbered by operation."""
    probes = ceiling_values(run)
    peaks = {name[5:]: value for name, value in probes.items() if name.startswith("gemm ")}
    slopes = {name: value for name, value in probes.items() if name == "copy"}
    if read := [value for name, value in probes.items() if name.startswith("read ")]:
        slopes["read"] = read[-1]
    drawn = [r for r in records if r.number("flops") and r.number("bytes_moved")]
    if not drawn or not peaks or not slopes:
        return ""
    operations = list(dict.fromkeys(names(r)[0] for r in drawn))
    numbered = [(operations.index(names(r)[0]) + 1, r) for r in drawn]
    listed = "".join(f"<li>{markup.text(name)}</li>" for name in operations)
    picture = plots.kernel_roofline(numbered, slopes, peaks)
    return figures([figure(picture, "Kernels under the roofs of this run", f"<ol>{listed}</ol>")])
