"""The sections of the page that say why its numbers may be believed, each a function -> HTML."""

import os
from pathlib import Path
from typing import Any

from ncu.result import read_index
from reports import markup, study
from reports.compare import ceiling_values, quality_text
from reports.load import Record, Run
from reports.markup import NOTHING, section, table
from reports.sections import where

NCU_FOLDERS = (Path("reports/out/ncu"), Path(".benchmarks/ncu"))
PLAIN = (  # key of extra_info, label, how to write it
    ("tokens_per_s", "throughput", lambda v: markup.rate(v, "tokens/s")),
    ("requests_per_s", "requests", lambda v: markup.rate(v, "req/s")),
    ("goodput_rps", "within the objective", lambda v: markup.rate(v, "req/s")),
    ("ttft_ms", "first token", markup.milliseconds),
    ("tpot_ms", "each later token", markup.milliseconds),
    ("p50_ms", "p50 latency", markup.milliseconds),
    ("p95_ms", "p95 latency", markup.milliseconds),
    ("p99_ms", "p99 latency", markup.milliseconds),
    ("accept_rate", "drafts accepted", markup.percent),
    ("mean_accepted", "tokens per step", lambda v: f"{v:.2f}"),
    ("repeated_8grams", "8-grams repeated in its answer", markup.percent),
    ("hit_rate", "cache hits", markup.percent),
    ("false_hit_rate", "false hits", markup.percent),
    ("limit_fraction", "of the limit", markup.percent),
    ("limit_ms", "limit", markup.milliseconds),
    ("bytes_moved", "least bytes moved", markup.size),
    ("flops", "arithmetic", lambda v: markup.rate(v, "FLOP")),
    ("mbu", "MBU", markup.percent),
    ("mfu", "MFU", markup.percent),
    ("weight_bytes", "weights", markup.size),
    ("kv_bytes", "KV cache", markup.size),
    ("peak_bytes", "peak memory", markup.size),
    ("energy_j", "energy per call", lambda v: f"{markup.significant(v)} J"),
    ("first_call_s", "first call (compilation included)", markup.time),
    ("load_s", "building the variant", markup.time),
    ("predicted_speedup", "speed-up predicted", lambda v: f"{v:.2f}×"),
)


def bottlenecks(run: Run) -> str:
    """Operations that take the time, of the cells that have a trace."""
    traced = [r for r in run.records if r.info.get("trace")]
    body = ""
    for r in traced:
        trace = r.info["trace"]
        rows = [
            [markup.text(op["name"]), f"{op['calls'] or 0:g}", markup.milliseconds(op["self_ms"]),
             markup.percent(op["share"])]
            for op in trace["top_ops"][:10]
        ]  # fmt: skip
        layers = ", ".join(
            f"{markup.text(layer['name'])} {markup.percent(layer['share'])}"
            + (f" (mostly {markup.text(layer['top_op'])})" if layer.get("top_op") else "")
            for layer in trace["layers"][:6]
        )
        note = f"<p class=note>By layer: {layers}</p>" if layers else ""
        if trace.get("syncs"):
            note += f"<p class=note>{markup.count(len(trace['syncs']), 'hidden host wait')}</p>"
        body += (
            f"<details{' open' if r is traced[0] else ''}><summary>{markup.text(r.cell)}</summary>"
            + table(["operation", "calls", "own time", "share"], rows, (1, 2, 3))
            + f"{note}</details>"
        )
    for r in run.records:
        if stages := r.info.get("pipeline"):
            rows = [[markup.text(name), markup.milliseconds(s["ms"]), markup.percent(s["share"])]
                    for name, s in stages.items()]  # fmt: skip
            body += (
                f"<details open><summary>{markup.text(r.cell)}: text to text</summary>"
                + table(["stage", "time", "share"], rows, (1, 2))
                + "</details>"
            )
    lead = "From calls of their own with the profiler on, which are slower than the timed ones."
    return section("bottlenecks", "Where the time goes", lead, body) if body else ""


def not_run(run: Run) -> str:
    if not run.not_run:
        return ""
    body = ""
    for reason, entries in study.reasons(run.not_run):
        cells = "".join(
            f"<li>{markup.text(n.cell or n.fullname)}"
            + (f" <span class=ci>{markup.text(n.reason)}</span>" if n.reason != reason else "")
            + "</li>"
            for n in entries
        )
        body += (
            f"<details><summary><b>{len(entries)}</b> {markup.text(reason)}</summary>"
            f"<ul>{cells}</ul></details>"
        )
    lead = f"{markup.count(len(run.not_run), 'cell')} of the selection have no number, and why."
    return section("not-run", "Not run", lead, body)


def cells(run: Run, out: Path) -> str:
    """Every cell with everything its record holds."""
    body, profiled = "", profiles()
    for _, records in study.groups(run.records):
        listed = "".join(evidence(r, out, profiled) for r in records)
        body += (
            f"<details class=place><summary><b>{markup.text(where(records[0]))}</b> <span class=ci>"
            f"{markup.count(len(records), 'cell')}</span></summary>{listed}</details>"
        )
    lead = "One line per cell; open it for quality, memory, limits and the proof that it was on."
    return section("cells", "Every cell and its evidence", lead, body)


def evidence(r: Record, out: Path, profiled: dict[str, list[Any]]) -> str:
    rows: list[tuple[str, str]] = [("time per call", f"{markup.time(r.seconds)} ({r.timing} time, "
                                   f"median of {r.stats.get('rounds')}, IQR "
                                   f"{markup.time(r.stats.get('iqr') or None)})")]  # fmt: skip
    rows.append((f"speed-up over {markup.text(r.info['baseline'])}",
                 f"{markup.ratio(r.speedup)} {r.info.get('pairs') or 0} pairs, stopped by "
                 f"{markup.text(r.info.get('stop'))}"))  # fmt: skip
    for which, words in (("without", "over the stack without it"), ("peer", "over the best peer")):
        if other := r.against(which):
            rows.append((words, f"{markup.ratio(other[1])} {markup.text(other[0])}"))
    rows += [("quality", markup.text(quality_text(m))) for m in r.quality]
    if context := r.info.get("context"):
        rows.append(("tokens", f"{context.get('prompt_tokens') or 0} in the prompt, "
                     f"{context.get('new_tokens') or 0} new"))  # fmt: skip
    rows += [(label, write(v)) for key, label, write in PLAIN if (v := r.number(key)) is not None]
    if r.info.get("bound"):
        rows.append(("bound by", markup.text(r.info["bound"])))
    rows.append(("proof that it was on", markup.text(r.info.get("effect") or "none recorded")))
    rows += [("Nsight Compute", words) for words in ncu_verdicts(r, out, profiled)]
    if links := evidence_links(r, out):
        rows.append(("files", links))
    rows.append(("test", f"<code>{markup.text(r.fullname)}</code>"))
    listed = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in rows)
    ratio = markup.ratio(r.speedup) if r.speedup else markup.time(r.seconds)
    return (
        f'<details class="cell" id="{markup.anchor(r)}"><summary><span class="stack">'
        f"{markup.text(r.cell.stack)}</span> {ratio} {markup.verdict(r.verdict)}</summary>"
        f"<dl>{listed}</dl></details>"
    )


def evidence_links(r: Record, out: Path) -> str:
    """Link to the trace of a cell, where the file is there."""
    trace = Path((r.info.get("trace") or {}).get("path") or "")
    return link(trace, out, "trace (open in Perfetto)") if trace.is_file() else ""


def link(path: Path, out: Path, label: str) -> str:
    return f'<a href="{markup.text(Path(os.path.relpath(path, out)).as_posix())}">{label}</a>'


def profiles() -> dict[str, list[Any]]:
    """fullname -> (folder, entry of its index) of what `python -m ncu` left."""
    found: dict[str, list[Any]] = {}
    for folder in NCU_FOLDERS:
        for entry in read_index(folder):
            found.setdefault(entry["fullname"], []).append((folder, entry))
    return found


def ncu_verdicts(r: Record, out: Path, profiled: dict[str, list[Any]]) -> list[str]:
    """What ncu found in this cell on the same kind of device, each with its file."""
    found = []
    for folder, entry in profiled.get(r.fullname, ()):
        if entry.get("device") == r.cell.device:
            words = entry.get("verdict") or f"{entry.get('outcome')}: {entry.get('why')}"
            gpu = f"{markup.text(entry['gpu'])}, " if entry.get("gpu") else ""
            file = link(folder / entry["file"], out, "NCU results")
            found.append(f"{markup.text(words)} <span class=ci>{gpu}{file}</span>")
    return found


def trust(run: Run) -> str:
    """A/A trials, ceilings before and after, the state of the machine."""
    aa = run.raw.get("aa") or {}
    conditions = run.raw.get("conditions") or {}
    body = ""
    if marks := conditions.get("marks"):
        body += f"<ul class=marks>{''.join(f'<li>{markup.text(m)}</li>' for m in marks)}</ul>"
    if aa.get("trials"):
        floor = aa.get("noise_floor")
        body += (
            f"<p>A/A: the same code on both sides was called different in {aa['misses']} of "
            f"{aa['trials']} trials (5 % may be)"
            + (f"; noise floor {markup.percent(floor)}" if floor is not None else "")
            + ".</p>"
        )
    eager = [r for r in run.records if r.is_baseline and r.speedup and r.info.get("pairs")]
    if eager:
        missed = sum(r.verdict in ("faster", "slower") for r in eager)
        body += (
            f"<p>Baselines paired with themselves: {markup.count(len(eager), 'cell')}, {missed} "
            "called faster or slower.</p>"
        )
    first, last = ceiling_values(run), ceiling_values(run, "last")
    if first:
        unit = {True: "FLOP/s", False: "B/s"}
        rows = [
            [markup.text(name), markup.rate(value, unit[name.startswith("gemm")]),
             markup.rate(last.get(name), unit[name.startswith("gemm")]),
             f"{100 * (last[name] / value - 1):+.1f} %" if name in last else NOTHING]
            for name, value in first.items()
        ]  # fmt: skip
        drift = (run.raw.get("ceilings") or {}).get("drift")
        body += f"<h3>Ceilings, drift {markup.percent(drift)}</h3>"
        body += table(["probe", "first", "last", "change"], rows, (1, 2, 3))
    before, after = conditions.get("before") or {}, conditions.get("after") or {}
    rows = [
        [markup.text(key.replace("_", " ")), condition(key, before.get(key)),
         condition(key, after.get(key))]
        for key in before | after
        if before.get(key) is not None or after.get(key) is not None
    ]  # fmt: skip
    if rows:
        body += "<h3>Conditions</h3>" + table(["", "before", "after"], rows, (1, 2))
    lead = "What would have shown it, had the machine or the method been off."
    return section("trust", "A/A, ceilings, conditions", lead, body) if body else ""


def condition(key: str, value: Any) -> str:
    if value is None:
        return NOTHING
    if key.endswith("_bytes"):
        return markup.size(value)
    if isinstance(value, list):
        return markup.text(", ".join(map(str, value)) or "none")
    return f"{value:g}" if isinstance(value, int | float) else markup.text(value)


def machine(run: Run) -> str:
    rows = [[markup.text(key), markup.text(value)] for key, value in flat(run.machine)]
    conditions = run.raw.get("conditions") or {}
    rows += [
        [label, markup.text(conditions[key])]
        for key, label in (("seed", "seed"), ("precision", "precision aimed at"),
                           ("budget_s", "budget, s"))
        if conditions.get(key) is not None
    ]  # fmt: skip
    rows += [["commit", f"<code>{markup.text(run.commit)}</code>"],
             ["measured", markup.text(run.when)],
             ["file", f"<code>{markup.text(run.path.name)}</code>"]]  # fmt: skip
    if run.foreign:
        rows.append(["other benchmarks in the file, not shown", str(run.foreign)])
    return section("machine", "Machine and versions", "", table(["", ""], rows))


def flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """machine_info as lines; the list of CPU flags is left out."""
    rows: list[tuple[str, Any]] = []
    for key, value in data.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += flat(value, f"{name} ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                rows += flat(item, f"{name} {i} ")
        elif key != "flags" and value not in (None, "", []):
            rows.append((name, ", ".join(map(str, value)) if isinstance(value, list) else value))
    return rows


HOW_TO_READ = (
    ("stack", "the techniques switched on together, in any order; <code>eager</code> is "
     "transformers as a user has it, the baseline"),
    ("speed-up 2.93× 2.89–2.97", "baseline time / stack time: the median over paired samples taken "
     "in turn in one process, and its distribution-free 95 % interval"),
    ("faster, slower", "the interval excludes 1 and reaches past the margin; <b>same</b>: it lies "
     "inside the margin (twice the precision aimed at, or this machine's noise floor); "
     "<b>ambiguous</b>: neither, or fewer than six pairs"),
    ("time per call", "context, not a claim: medians of cells measured minutes apart wander with "
     "the machine's load, paired ratios do not"),
    ("of the limit", "how near the cell is to what this machine's own bandwidth or arithmetic "
     "allows, measured in the same run"),
    ("quality +0.015 ± 0.004", "change against the baseline's value and the standard error of that "
     "paired difference; random weights have none"),
    ("MBU, MFU", "bytes / time over the measured read bandwidth; FLOPs / time over the GEMM probe"),
)  # fmt: skip


def how_to_read() -> str:
    listed = "".join(f"<dt>{term}</dt><dd>{words}</dd>" for term, words in HOW_TO_READ)
    return section("reading", "How to read this page", "", f"<dl>{listed}</dl>")
