"""``python -m kernels``: build the CPU kernels for this machine now, not in somebody's budget."""

import argparse
import sys
from collections.abc import Sequence

from . import build


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 when one cannot be built, with what the compiler said."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    parser.add_argument("--every-isa", action="store_true",
                        help="for lesser instruction sets too, which the tests run")  # fmt: skip
    every = parser.parse_args(arguments).every_isa
    if reason := build.lacks_compiler():
        print(f"kernels: {reason}")
        return 0  # every technique that needs them says so too
    levels = build.isas() if every else [build.current_isa()]
    print(f"kernels: building for {', '.join(levels)} (minutes the first time)", flush=True)
    failures = build.build_all(levels)
    for sentence in failures.values():
        print(f"kernels: {sentence}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
