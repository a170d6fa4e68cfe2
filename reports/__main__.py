"""python -m reports bench | build | check | compare | findings | headline | merge | recommend"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from impl.core import StudyError
from reports.load import PLACES, ReportError, Run, load_run, newest_runs, write_json

OUT = Path("reports/out")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports", description="Pages, comparisons and advice from saved runs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("bench", help="measure, keep the run, build the page",
                        usage="%(prog)s [-- PYTEST ARGUMENTS]")  # fmt: skip

    build = commands.add_parser("build", help="one HTML page; its path is printed last")
    build.add_argument("runs", nargs="*", type=Path, metavar="RUN.json",
                       help="default: the newest run of each machine")  # fmt: skip
    build.add_argument("--out", type=Path, default=OUT, metavar="DIR")

    check = commands.add_parser("check", help="is it a whole and valid run of the study?")
    check.add_argument("runs", type=Path, nargs="+", metavar="RUN.json")

    compare = commands.add_parser("compare", help="what changed; exit 1 on a regression")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    compare.add_argument("rerun", type=Path, nargs="?", help="NEW again; a slowdown must repeat")
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")
    compare.add_argument("--fail-on-lost", action="store_true", help="a lost cell is a regression")

    merge = commands.add_parser("merge", help="shards of one run into one file")
    merge.add_argument("out", type=Path)
    merge.add_argument("runs", type=Path, nargs="+", metavar="RUN.json")
    merge.add_argument("--worst", action="store_true", help="of a cell in two shards, the slower")

    headline = commands.add_parser("headline", help="the worst of fresh processes")
    headline.add_argument("runs", type=Path, nargs="*", metavar="RUN.json")
    headline.add_argument("--measure", action="store_true",
                          help="run the processes first; pytest's arguments after --")  # fmt: skip
    headline.add_argument("--out", type=Path, metavar="FILE",
                          help="default: below reports/results/")  # fmt: skip

    findings = commands.add_parser("findings", help="the numbers in findings/ and README.md")
    findings.add_argument("runs", nargs="*", type=Path, metavar="RUN.json")
    findings.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")

    recommend = commands.add_parser("recommend", help="a stack for a service's needs")
    recommend.add_argument("run", type=Path, nargs="?", metavar="RUN.json")
    recommend.add_argument("--model")
    recommend.add_argument("--p99-ms", type=float)
    recommend.add_argument("--max-quality-loss", type=float, metavar="FRACTION",
                           help="relative: 0.01 is one percent")  # fmt: skip
    recommend.add_argument("--max-memory", type=float, metavar="GIB")
    recommend.add_argument("--cost-per-hour", type=float, metavar="AMOUNT")
    return parser


def read(paths: Sequence[Path]) -> list[Run]:
    return [load_run(path) for path in paths] or newest_runs()


def bench(options: argparse.Namespace) -> int:
    from reports.measure import bench as measure

    status, path = measure(options.pytest)
    print(f"kept: {path}", flush=True)
    options.runs, options.out = [path], OUT
    build(options)
    return status


def check(options: argparse.Namespace) -> int:
    from reports import schema

    for path in options.runs:
        run = load_run(path)
        try:
            schema.validate_run(run.raw, str(path))
        except schema.SchemaError as error:
            raise ReportError(f"{error}: measure again with this version") from None
        unpaired = sum((r.number("pairs") or 0) < 6 for r in run.records)
        print(f"{path}: {len(run.records)} cells measured ({unpaired} with fewer than six pairs), "
              f"{len(run.not_run)} not run, each with its reason")  # fmt: skip
    return 0


def build(options: argparse.Namespace) -> int:
    from reports.page import build as build_page  # matplotlib is needed here only

    joined = [*newest_runs(PLACES, "headline"), *newest_runs(PLACES, "kernels")]
    print(build_page(read(options.runs), options.out, joined))
    return 0


def compare(options: argparse.Namespace) -> int:
    from reports import compare as comparing
    from reports.difference import as_json, show

    rerun = load_run(options.rerun) if options.rerun else None
    found = comparing.compare(load_run(options.old), load_run(options.new), rerun)
    if options.json:
        print(json.dumps(as_json(found), indent=1, allow_nan=False))
    else:
        show(found)
    return 1 if options.fail_on_lost and found.lost else found.exit_code


def merge(options: argparse.Namespace) -> int:
    from reports.merge import merge as merge_runs

    runs = [load_run(path, allow_empty=True) for path in options.runs]
    print(write_json(options.out, merge_runs(runs, worst=options.worst)))
    return 0


def headline(options: argparse.Namespace) -> int:
    from reports import measure
    from reports.merge import headline as repeat

    if options.measure:
        runs = measure.repeat(options.pytest)
    else:
        runs = [load_run(path) for path in options.runs]
    data: dict[str, Any] = repeat(runs)
    stats, run = data["headline"], runs[-1]
    out = options.out or measure.RESULTS / run.slug / f"{measure.stamp(run)}-headline.json"
    for cell in stats["cells"]:
        if cell["unstable"]:
            print(f"unstable: {'+'.join(cell['cell']['techniques'])} {cell['cell']['model']} "
                  f"{cell['cell']['precision']} spread {cell['spread']:.0%}")  # fmt: skip
    if stats["claimed_cells"]:
        print(
            f"{len(runs)} processes, {stats['claimed_cells']} cells above 1 ms: the median cell "
            f"repeats within {stats['median_spread']:.1%} (goal 3 %), "
            f"{stats['within_10_percent']:.0%} within 10 % (goal 95 %)"
        )
    print(write_json(out, data))
    if options.measure:
        for run in runs:
            run.path.unlink(missing_ok=True)
    return 0


def findings(options: argparse.Namespace) -> int:
    from reports.findings import regenerate

    stale = regenerate(read(options.runs), newest_runs(PLACES, "headline"), check=options.check)
    for path in stale:
        print(f"{'stale' if options.check else 'written'}: {path}")
    return 1 if options.check and stale else 0


def recommend(options: argparse.Namespace) -> int:
    from reports.difference import show_advice
    from reports.recommend import Needs
    from reports.recommend import recommend as choose

    run = load_run(options.run) if options.run else newest_runs()[0]
    memory = options.max_memory * 2**30 if options.max_memory is not None else None
    needs = Needs(options.p99_ms, options.max_quality_loss, memory, options.cost_per_hour,
                  options.model)  # fmt: skip
    show_advice(run, choose(run, needs))
    return 0


COMMANDS = {
    "bench": bench,
    "build": build,
    "check": check,
    "compare": compare,
    "findings": findings,
    "headline": headline,
    "merge": merge,
    "recommend": recommend,
}


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a regression, or stale findings; 2: bad input, said in one sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    options = arguments().parse_args(words[:cut])
    options.pytest = words[cut + 1 :]
    try:
        return COMMANDS[options.command](options)
    except StudyError as error:
        print(f"reports {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` closed the pipe: nothing is wrong
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
