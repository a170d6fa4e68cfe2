"""python -m ncu -k EXPR: Nsight Compute over the tests that measure, one report per test.

What follows ``--`` goes to pytest::

    python -m ncu -k "rms_norm and triton"
    python -m ncu tests/test_kernels.py --impl cuda --metrics launch
    python -m ncu -k "latency and lm_small and batch1" --dry-run -- --profile full
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from impl.core import StudyError
from ncu import command, metrics
from ncu.result import slug
from ncu.run import Plan, collect, run

OUT = Path(".benchmarks/ncu")


def arguments() -> argparse.ArgumentParser:
    """The command line; what follows ``--`` is pytest's."""
    parser = argparse.ArgumentParser(
        prog="python -m ncu", description="Nsight Compute over the tests that measure.",
        usage="%(prog)s [TESTS] -k EXPR [options] [-- PYTEST ARGUMENTS]",
    )  # fmt: skip
    add = parser.add_argument
    add("tests", nargs="*", metavar="TESTS", help="files or node ids to choose from")
    add("-k", dest="expression", default="", metavar="EXPR", help="as pytest's -k")
    add("--impl", choices=("reference", "triton", "cuda"), help="only this implementation")
    add("--metrics", default="roofline", metavar="SET",
        help=f"{', '.join(metrics.SETS)}, or counters to add to roofline "
        "(default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=OUT, metavar="DIR", help="default: %(default)s")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="per test")
    add("--dry-run", action="store_true", help="print the commands and run none")
    return parser


def main(words: Sequence[str]) -> int:
    """0: every selected test was profiled; 1: some were not; 2: bad arguments; 130: interrupted."""
    cut = list(words).index("--") if "--" in words else len(words)
    options, extra = arguments().parse_args(words[:cut]), list(words[cut + 1 :])
    try:
        if options.timeout <= 0:
            raise StudyError(f"--timeout {options.timeout:g} is not positive")
        metrics.chosen(options.metrics, None)
        nodes = collect(expression_of(options, extra), options.tests, extra)
        plan = Plan(command.find(), options.metrics, options.out.absolute(), options.timeout, extra)
        if options.dry_run:
            return show(nodes, plan)
        if not any(node["device"].startswith("cuda") for node in nodes):
            raise StudyError(
                f"these tests run on {nodes[0]['device']}, and ncu profiles GPUs: run where torch "
                "finds a CUDA device (--dry-run prints the commands anywhere)"
            )
        return run(nodes, plan, lambda line: print(line, flush=True))
    except StudyError as error:
        print(f"ncu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ncu: interrupted; finished results are kept in {options.out}", file=sys.stderr)
        return 130


def expression_of(options: argparse.Namespace, extra: Sequence[str]) -> str:
    """What pytest's ``-k`` gets; raises ``StudyError`` for a selection of everything."""
    if not options.expression and not options.tests:
        raise StudyError('name what to profile: -k "rms_norm and triton", or a file of tests')
    if stray := [word for word in extra if word.endswith(".py") or "::" in word]:
        raise StudyError(f"{stray[0]} names a test: write it before the --")
    if not options.impl:
        return str(options.expression)
    return f"({options.expression}) and {options.impl}" if options.expression else options.impl


def show(nodes: Sequence[dict], plan: Plan) -> int:
    """Print what would be run."""
    sections, names = metrics.chosen(plan.which, command.capability())
    for node in nodes:
        report = plan.out / "raw" / f"{slug(node['nodeid'])}.ncu-rep"
        argv = command.argv(plan.ncu or "ncu", node["nodeid"], report, sections, names, plan.extra)
        note = f"  # skipped: {node['skip']}" if node["skip"] else ""
        print(f"NCU_CHILD=1 {shlex.join(argv)}{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
