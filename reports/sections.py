"""The sections of the page that answer the study's questions, each a function Run -> HTML.

A section without data is the empty string and does not appear.
"""

from itertools import groupby

from reports import markup, plots, study
from reports.compare import ceiling_values
from reports.load import Record, Run
from reports.markup import NOTHING, figure, figures, section, table


def headline(run: Run) -> str:
    rows = [
        [
            who(r, f"{where(r)} · {winner.claim}"),
            f"{markup.ratio(r.speedup)}<br><span class=ci>over {markup.text(r.info['baseline'])}, "
            f"{r.info.get('pairs')} pairs</span>",
            markup.time(r.seconds)
            + (f"<br><span class=ci>{markup.rate(rate, 'tokens/s')}</span>"
               if (rate := r.number("tokens_per_s")) else ""),
            markup.percent(r.number("limit_fraction")),
            markup.size(r.number("peak_bytes")),
            markup.quality(study.metric_of(r)),
        ]
        for winner in study.winners(run)
        for r in [winner.record]
    ]  # fmt: skip
    lead = (
        "The fastest measured stack of each workload: once among those that lose no quality "
        "(within two standard errors), once among those within the quality budget they declare. "
    )
    if not run.headline:
        lead += (
            "An interval covers this one process; a claim needs three (<code>make headline</code>)."
        )
    head = ["fastest stack", "speed-up, 95 %", "time per call", "of the limit", "peak memory",
            "quality, change ± error"]  # fmt: skip
    return section("headline", "Headline", lead, table(head, rows, (1, 2, 3, 4), "headline"))


def who(record: Record, place: str = "", link: bool = True) -> str:
    """The stack, and below it where it was measured."""
    below = markup.text(place or where(record))
    return f'{markup.stack(record, link)}<br><span class="at">{below}</span>'


def three_processes(run: Run) -> str:
    """The claims of `reports headline`: worst of several fresh processes."""
    if not run.headline:
        return ""
    stats = run.headline
    found = {(tuple(sorted(c["cell"]["techniques"])), c["cell"]["model"], c["cell"]["precision"],
              c["cell"]["batch"], c["cell"]["workload"], c["timing"]): c
             for c in stats["cells"]}  # fmt: skip
    rows = []
    for r in run.records:
        c = r.cell
        repeat = found.get((tuple(sorted(c.techniques)), c.model, c.precision, c.batch,
                            c.workload, r.timing))  # fmt: skip
        if repeat is None or r.is_baseline:
            continue
        mark = ' <span class="tag">unstable</span>' if repeat["unstable"] else ""
        rows.append([
            who(r, link=False) + mark, markup.ratio(r.speedup),
            " ".join(f"{value:.2f}" for value in repeat["speedups"]),
            markup.percent(repeat["spread"]), markup.verdict(r.verdict),
        ])  # fmt: skip
    lead = (
        f"{len(stats['runs'])} fresh processes: the lowest low and the highest high of all of "
        "them, and a verdict only where all agree. "
        f"Between processes the median cell repeats within "
        f"{markup.percent(stats['median_spread'])}, "
        f"{markup.percent(stats['within_10_percent'])} of the cells within 10 %."
    )
    head = ["stack", "speed-up, worst bounds", "each process", "spread", "verdict"]
    return section("processes", "Repeated in fresh processes", lead, table(head, rows, (1, 2, 3)))


def speedups(run: Run) -> str:
    drawn = []
    for _, records in study.groups(run.records):
        if any(r.speedup for r in records):
            place = where(records[0])
            eager = next((r for r in records if r.is_baseline), None)
            note = f"Baseline: {markup.text(records[0].info['baseline'])}" + (
                f", {markup.time(eager.seconds)} per call." if eager else "."
            )
            drawn.append(figure(plots.speedup_bars(records, place), place, note))
    lead = (
        "Baseline time over the stack's time, from paired samples; whiskers are 95 % intervals, "
        "and pale bars other people's implementations. The scale is logarithmic: equal lengths are "
        "equal factors. "
        f"{legend(('faster', 'slower', 'same', 'ambiguous'))}"
    )
    return section("speedups", "Speed-up per workload", lead, figures(drawn)) if drawn else ""


def legend(names: tuple[str, ...]) -> str:
    return " ".join(key(name, name) for name in names)


def key(color: str, words: str) -> str:
    return f'<span class=legend><span class="key {color}"></span>{words}</span>'


def where(record: Record) -> str:
    return record.cell.place + (f" · {record.timing} time" if record.timing != "wall" else "")


def quality(run: Run) -> str:
    drawn = []
    for _, records in by_place(run.records):
        points = study.pareto(records)
        if len({p.metric["metric"] for p in points}) != 1 or len(points) < 2:
            continue
        cell = records[0].cell
        place = f"{cell.model} · batch {cell.batch} · {cell.workload}"
        front = [p for p in points if p.dominated_by is None]
        numbers = {id(p.record): i for i, p in enumerate(front, 1)}
        listed = "".join(
            f"<li>{markup.stack(p.record)} <span class=ci>{markup.text(p.record.cell.precision)}, "
            f"{markup.time(p.record.seconds)}, {markup.quality(p.metric)}</span></li>"
            for p in front
        )
        beaten = [
            f"{markup.text(p.record.cell.stack)} {markup.text(p.record.cell.precision)} (by "
            f"{numbers.get(id(p.dominated_by), '?')})"
            for p in points
            if p.dominated_by is not None
        ]
        note = f"<ol>{listed}</ol>" + (
            f"<details><summary>{len(beaten)} dominated</summary>"
            f"<p>{', '.join(beaten)}</p></details>"
            if beaten
            else ""
        )
        drawn.append(figure(plots.pareto_plot(points, place), place, note))
    lead = (
        "Every stack and precision of a workload. Numbered: nothing measured is both faster and as "
        "good. Grey: dominated, and by which. Times are medians of their own cells."
    )
    return section("pareto", "Quality against latency", lead, figures(drawn)) if drawn else ""


def by_place(records: list[Record]) -> list[tuple[tuple[str, ...], list[Record]]]:
    """Records that share model, workload, batch, device and timing; precisions differ."""

    def place(r: Record) -> tuple[str, ...]:
        cell = r.cell
        return (cell.model, cell.workload, f"{cell.batch:>6}", cell.device, r.timing)

    return [(key, list(found)) for key, found in groupby(sorted(records, key=place), place)]


def memory(run: Run) -> str:
    drawn = []
    for _, records in study.groups(run.records):
        if sum(bool(r.number("peak_bytes")) for r in records) >= 2:
            drawn.append(figure(plots.memory_bars(records, where(records[0])), where(records[0])))
    lead = (
        "Allocator peak in one call with only this stack's weights resident: "
        f"{key('accent', 'weights')} {key('faster', 'KV cache')} "
        f"{key('ambiguous', 'activations and the rest')}"
    )
    return section("memory", "Memory", lead, figures(drawn)) if drawn else ""


def limits(run: Run) -> str:
    with_limit = [r for r in run.records if r.number("limit_fraction") is not None]
    if not with_limit:
        return ""
    probes = ceiling_values(run)
    gemm = {name[5:]: value for name, value in probes.items() if name.startswith("gemm ")}
    read = [value for name, value in probes.items() if name.startswith("read ")]
    drawn = [r for r in with_limit if r.number("flops") and r.number("bytes_moved")]
    body = ""
    if drawn and gemm and read:
        picture = plots.roofline(drawn, read[-1], gemm)
        body = figures([figure(picture, "All cells under the roofs measured in this run")])
    best = []
    for _, records in study.groups(with_limit):
        ranked = sorted(records, key=lambda r: -(r.number("limit_fraction") or 0))
        best += ranked[:3] + [r for r in ranked[3:] if r.is_baseline]
    rows = [
        [
            who(r), markup.percent(r.number("limit_fraction")),
            markup.time(r.seconds), markup.milliseconds(r.number("limit_ms")),
            markup.text(r.info.get("bound") or "–"), markup.percent(r.number("mbu")),
            markup.percent(r.number("mfu")),
        ]
        for r in best
    ]  # fmt: skip
    head = ["stack", "of the limit", "time", "limit", "bound by", "MBU", "MFU"]
    lead = (
        "The limit is the larger of least bytes / measured bandwidth and FLOPs / measured GEMM "
        "rate. Shown: the three closest to it per workload, and the baseline."
    )
    body += table(head, rows, (1, 2, 3, 5, 6), "fraction of limit")
    return section("limits", "Fraction of the limit", lead, body)


def formats(run: Run) -> str:
    body = ""
    for _, records in by_place(run.records):
        rows = study.format_table(records, run.not_run)
        if sum(row.record is not None for row in rows) < 3:
            continue
        eager = next((row.record for row in rows if row.record
                      and row.record.cell.techniques == ("eager",)
                      and row.record.cell.precision == "fp32"), None)  # fmt: skip
        cells = []
        for row in rows:
            r = row.record
            if r is None:
                cells.append([row.format, f"<i>{markup.text(row.reason)}</i>", *[NOTHING] * 5])
                continue
            bytes_, base = r.number("weight_bytes"), eager.number("weight_bytes") if eager else None
            smaller = (
                f' <span class="ci">{base / bytes_:.2f}× less</span>'
                if base and bytes_ and r is not eager
                else ""
            )
            against = f"{eager.seconds / r.seconds:.2f}×" if eager and eager is not r else NOTHING
            cells.append([
                row.format, f"{markup.stack(r)} <span class=ci>{r.cell.precision}</span>",
                markup.size(bytes_) + smaller, markup.time(r.seconds), against,
                markup.ratio(r.speedup), markup.quality(study.metric_of(r)),
            ])  # fmt: skip
        cell = records[0].cell
        place = f"{cell.model} · batch {cell.batch} · {cell.workload} · {cell.device}"
        head = ["format", "technique, compute", "weights", "time", "vs FP32 eager, unpaired",
                "speed-up over its baseline, paired", "quality"]  # fmt: skip
        body += f"<h3>{markup.text(place)}</h3>" + table(head, cells, (2, 3, 4, 5), place)
    lead = (
        "Size, speed and quality of each number format, from this run's own cells; each technique "
        "stands at the compute precision where it was fastest."
    )
    return section("formats", "Number formats", lead, body) if body else ""


def ladders(run: Run) -> str:
    drawn = []
    for _, records in study.groups(run.records):
        rungs = study.ladder(records)
        if len(rungs) < 3:
            continue
        names = ["eager", *("+ " + " + ".join(rung.added) for rung in rungs[1:])]
        peers = [r for r in records if study.is_peer(r) and r.speedup]
        top = rungs[-1].record
        peer = top.against("peer")
        note = "".join(
            f"<li>{markup.text(name)}: {markup.time(rung.record.seconds)}"
            + (f", {rung.step:.2f}× the rung above" if rung.step else "")
            + (f", {markup.percent(limit)} of the limit"
               if (limit := rung.record.number("limit_fraction")) is not None else "")
            + f", {markup.quality(study.metric_of(rung.record))}</li>"
            for name, rung in zip(names, rungs, strict=True)
        )  # fmt: skip
        if peer:
            note += (
                f"<li>best peer {markup.text(peer[0])}: the last rung is {markup.ratio(peer[1])} "
                f"as fast</li>"
            )
        elif peers:
            best = max(peers, key=lambda r: r.speedup.value if r.speedup else 0)
            note += (
                f"<li>best peer {markup.text(best.cell.stack)}: {markup.ratio(best.speedup)} over "
                f"the same baseline</li>"
            )
        drawn.append(
            figure(
                plots.ladder_plot(names, [rung.record for rung in rungs], where(top)),
                where(top),
                f"<ul class=rungs>{note}</ul>",
            )
        )
    lead = (
        "One workload, techniques added one by one: the longest chain of nested stacks in this "
        "run. Grey is what the rung above had already."
    )
    return section("ladder", "The ladder", lead, figures(drawn)) if drawn else ""


def combinations(run: Run) -> str:
    rows = []
    for _, records in study.groups(run.records):
        for found in study.interactions(records):
            term = found.term
            words = "as the product"
            if term.low is not None and term.high is not None:
                words = ("more than the product" if term.low > 1
                         else "less than the product" if term.high < 1 else words)  # fmt: skip
            rows.append([
                who(found.record),
                markup.ratio(found.record.speedup), f"{found.product:.2f}×", markup.ratio(term),
                words,
            ])  # fmt: skip
    lead = (
        "Interaction = the stack's speed-up / the product of its techniques' own speed-ups, the "
        "lean decoder counted once. Below 1 two techniques save the same time twice; above 1 one "
        "opens the way for the other. The intervals treat the cells as independent."
    )
    head = ["stack", "measured", "product of singles", "interaction", "so"]
    return (
        section("combinations", "Combinations", lead, table(head, rows, (1, 2, 3))) if rows else ""
    )


def speculation(run: Run) -> str:
    rows = []
    for r in run.records:
        accepted = r.number("mean_accepted")
        if r.number("accept_rate") is None and accepted is None:
            continue
        without = r.against("without")
        gain = without[1] if without else None
        rows.append([
            who(r), markup.percent(r.number("accept_rate")),
            NOTHING if accepted is None else f"{accepted:.2f}",
            markup.ratio(gain) + (f"<br><span class=ci>over {markup.text(without[0])}</span>"
                                  if without else ""),
            f"{gain.value / accepted:.2f}" if gain and accepted else NOTHING,
            markup.percent(r.number("repeated_8grams")),
            markup.ratio(r.speedup),
        ])  # fmt: skip
    lead = (
        "Drafted tokens accepted by the target, and what is left of it in time: speed-up over the "
        "same stack without drafts, divided by the mean number of tokens accepted per step. "
        "Text that repeats itself flatters look-up, so the share of 8-grams that stood in the "
        "same answer before is beside it."
    )
    head = ["stack", "accepted", "tokens per step", "gain of the drafts",
            "gain / tokens per step", "repeated", "speed-up over baseline"]  # fmt: skip
    return (
        section("speculation", "Speculation", lead, table(head, rows, (1, 2, 3, 4, 5, 6)))
        if rows
        else ""
    )


def serving(run: Run) -> str:
    rows = [
        [
            who(r),
            *(markup.milliseconds(r.number(key)) if r.number(key) is not None
              else '<span class="none">too few</span>' for key in ("p50_ms", "p95_ms", "p99_ms")),
            markup.milliseconds(r.number("ttft_ms")), markup.milliseconds(r.number("tpot_ms")),
            markup.rate(r.number("requests_per_s"), "req/s"),
            markup.rate(r.number("goodput_rps"), "req/s"),
            markup.rate(r.number("tokens_per_s"), "tok/s"),
        ]
        for r in run.records
        if r.number("requests_per_s") is not None or r.number("p50_ms") is not None
    ]  # fmt: skip
    lead = (
        "One seeded schedule of arrivals for all, never waiting for replies; latency counts from "
        "the scheduled arrival. <i>Too few</i>: fewer requests than the percentile needs at 99 % "
        "confidence (p50 7, p90 44, p95 90, p99 459)."
    )
    head = ["scheduler", "p50", "p95", "p99", "first token", "later tokens", "requests",
            "in objective", "tokens"]  # fmt: skip
    return section("serving", "Serving", lead, table(head, rows, range(1, 9))) if rows else ""


QUESTIONS = (headline, three_processes, speedups, quality, memory, limits, formats, ladders,
             combinations, speculation, serving)  # fmt: skip
