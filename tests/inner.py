"""A pytest inside a test: of this project afresh, or of a file of tests/data/inner in a fork."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from reports import schema

ROOT = Path(__file__).resolve().parents[1]
INNER = ROOT / "tests" / "data" / "inner"
OPTIONS = ("-q", "-p", "no:cacheprovider", "--benchmark-json=out.json", "--bench-precision=0.3")
LIMIT_S = 240


def fresh_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``pytest ARGUMENTS`` of this project in a process that knows nothing of the one around it.

    A child that inherits xdist's variables takes itself for a worker, which measures nothing.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False
    )


def _warm():
    context = multiprocessing.get_context("forkserver")  # torch is imported once, not per run
    context.set_forkserver_preload(["torch", "jsonschema", "rich.table", "psutil"])
    return context


def _pytest(folder: str, options: list[str], environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [n for n in os.environ if n.startswith(("PYTEST", "INNER", "BENCH"))]:
        del os.environ[name]
    os.environ.update(environment, OMP_NUM_THREADS="1", TMPDIR=folder, PYTHONPATH=str(ROOT))
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, folder)
    with Path("out.txt").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import pytest

    code = pytest.main(options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))


class Run:
    """``pytest OPTIONS`` in ``folder``: its exit code, its text, its saved JSON."""

    def __init__(self, folder: Path, file: str, *options: str, **environment: str) -> None:
        self.folder, self.json = folder, folder / "out.json"
        for source, target in (("conftest.py", "conftest.py"), (file, "test_it.py")):
            shutil.copy(INNER / source, folder / target)
        ini = (ROOT / "pytest.ini").read_text(encoding="utf-8")
        kept = re.sub(r"^(testpaths|pythonpath).*\n", "", ini, flags=re.M)
        (folder / "pytest.ini").write_text(kept, encoding="utf-8")
        process = _warm().Process(
            target=_pytest, args=(str(folder), [*OPTIONS, *options], environment)
        )
        process.start()
        process.join(LIMIT_S)
        if process.is_alive():
            process.kill()
        self.code = process.exitcode
        with contextlib.suppress(OSError):
            self.text = (folder / "out.txt").read_text()

    def load(self) -> dict:
        """The saved run, validated."""
        assert self.json.exists(), self.text
        return schema.load(self.json)

    def records(self) -> dict[str, dict]:
        """Test name -> benchmark."""
        return {b["name"]: b for b in self.load()["benchmarks"]}

    def not_run(self) -> dict[str, str]:
        """Test name -> reason."""
        return {e["fullname"].split("::")[1]: e["reason"] for e in self.load()["not_run"]}
