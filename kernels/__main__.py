"""``python -m kernels``: build the CPU kernels for this machine now, not in somebody's budget."""

import sys

from . import build


def main() -> int:
    """Exit status: 1 when one cannot be built, with what the compiler said."""
    if reason := build.lacks_compiler():
        print(f"kernels: {reason}")
        return 0  # every technique that needs them says so too
    print(f"kernels: building for {build.current_isa()} (minutes the first time)", flush=True)
    failures = build.build_all()
    for sentence in failures.values():
        print(f"kernels: {sentence}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
