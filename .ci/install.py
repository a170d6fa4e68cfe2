"""Build the virtual environment: ``python .ci/install.py .venv [compilers]``.

With ``compilers``, those of CUDA too: they need no GPU, and tests compile every CUDA kernel with
them and run it on the CPU.  Where they do not agree with the CUDA that torch brought, those tests
skip.

Refuses, with a sentence, a machine on which the study cannot run.  A torch that is already in
the environment is kept, so that a CPU build stays one.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = "dev,encoder,peers"
COMPILERS = "gpu,nvcc"


def refuse(why: str) -> None:
    sys.exit(f"install: {why}")


def check_machine() -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        refuse(f"needs Linux on x86-64; this is {sys.platform} on {platform.machine()}")
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever python3 is
        refuse(f"needs Python 3.11 or newer; this is {platform.python_version()} (set PYTHON=...)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        refuse("needs Python's headers (Debian and Ubuntu: apt install python3-dev)")
    if not shutil.which(os.environ.get("CXX", "g++")):
        refuse("needs a C++ compiler (Debian and Ubuntu: apt install g++), or set CXX")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        refuse("needs the venv module (Debian and Ubuntu: apt install python3-venv)")


def succeeds(*command: str) -> bool:
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def run(*command: str) -> None:
    if not succeeds(*command):
        refuse(f"failed: {' '.join(command)}")


def torch_in(python: Path) -> str | None:
    """Version of the torch that the environment has."""
    code = "from importlib.metadata import version; print(version('torch'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def main(folder: str, compilers: bool) -> None:
    check_machine()
    python = ROOT / folder / "bin" / "python"
    if not python.exists():
        print(f"install: creating {folder}", flush=True)
        run(sys.executable, "-m", "venv", folder)
    pip = (str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q")
    constraints = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    if have := torch_in(python):
        print(f"install: keeping torch {have}", flush=True)
        constraints = [c for c in constraints if not c.startswith(("torch==", "triton=="))]
        constraints.append(f"torch=={have}")
    pinned = ROOT / folder / "constraints.txt"
    pinned.write_text("\n".join(constraints) + "\n")
    print("install: installing the packages (minutes the first time)", flush=True)
    if not have:  # first and alone: what depends on torch must not choose another build
        run(*pip, "-c", str(pinned), "torch")
    run(*pip, "-c", str(pinned), "-e", f".[{EXTRAS}]")
    if compilers and not succeeds(*pip, "-c", str(pinned), "-e", f".[{EXTRAS},{COMPILERS}]"):
        print(f"install: [{COMPILERS}] does not fit this torch; tests that compile CUDA skip")


if __name__ == "__main__":
    main(sys.argv[1], "compilers" in sys.argv[2:])
