"""No record is ever lost: each is on disk the moment it exists, and ``--resume`` reads it back.

A journal is JSON lines: a header (fingerprint of machine and code), then one finished record a
line with its samples, then an end line once the run's own JSON is saved.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Journal:
    """The records of one run, appended as they are taken."""

    def __init__(self, folder: Path, fingerprint: str, code: str) -> None:
        self.header = {"journal": 1, "fingerprint": fingerprint, "code": code}
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.path = folder / f"journal-{stamp}-{os.getpid()}.jsonl"
        self.entries: dict[str, dict[str, Any]] = {}
        self.complaints: list[str] = []

    def resume(self, folder: Path) -> int:
        """Go on in the newest unfinished journal of this machine and code; how many records."""
        found = newest_unfinished(folder, self.header)
        if found is not None:
            self.path, self.entries = found
        return len(self.entries)

    def append(self, entry: dict[str, Any]) -> None:
        """Write one record and flush it; a full disk sends this and later ones elsewhere."""
        self.entries[entry["fullname"]] = entry
        try:
            self._write(entry)
        except OSError as error:
            refuge = Path(tempfile.gettempdir()) / self.path.name
            if refuge == self.path:
                self.complaints.append(f"{self.path} cannot be written ({error.strerror})")
                return
            self.complaints.append(
                f"{self.path.parent} cannot be written ({error.strerror}); "
                f"the records of this run go to {refuge}"
            )
            self.path = refuge
            with contextlib.suppress(OSError):
                for known in self.entries.values():
                    self._write(known)

    def retract(self, fullname: str) -> None:
        """Take back a record whose test failed after all."""
        if self.entries.pop(fullname, None) is not None:
            with contextlib.suppress(OSError):
                self._write({"retracted": fullname})

    def end(self, saved: bool) -> None:
        """The run is over; once its JSON is saved the journal has done its work."""
        if not self.path.exists():
            return
        with contextlib.suppress(OSError):
            if saved:
                self.path.unlink()
            else:
                self._write({"end": True})

    def _write(self, entry: dict[str, Any]) -> None:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ([self.header] if new else []) + [entry]
        with self.path.open("a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def newest_unfinished(
    folder: Path, header: dict[str, Any]
) -> tuple[Path, dict[str, dict[str, Any]]] | None:
    """(path, records by fullname) of the newest journal with this header and no end."""
    folders = [folder, Path(tempfile.gettempdir())]
    paths = [path for f in folders for path in f.glob("journal-*.jsonl")]
    for path in sorted(paths, key=lambda p: p.name, reverse=True):
        lines = list(_lines(path))
        if lines and lines[0] == header and not any("end" in line for line in lines):
            kept = {line["fullname"]: line for line in lines if "fullname" in line}
            for line in lines:
                kept.pop(line.get("retracted", ""), None)
            return path, kept
    return None


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of a journal; a crash may have cut the last one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def entry_of(benchmark: Any, seconds: list[float]) -> dict[str, Any]:
    """A journal line from a used ``benchmark`` fixture."""
    return {
        "fullname": benchmark.fullname,
        "name": benchmark.name,
        "group": benchmark.group,
        "param": benchmark.param,
        "params": {k: v for k, v in (benchmark.params or {}).items() if _plain(v)},
        "extra_info": benchmark.extra_info,
        "seconds": seconds,
    }


def metadata_of(entry: dict[str, Any], timer: Any) -> Any:
    """The entry as pytest-benchmark's own statistics, as if its test had run."""
    from pytest_benchmark.stats import Metadata

    fixture = SimpleNamespace(
        **{k: entry[k] for k in ("name", "fullname", "group", "param", "params", "extra_info")},
        cprofile_stats=None,
        has_error=False,
    )
    meta = Metadata(fixture, iterations=1, options={"timer": timer})
    for seconds in entry["seconds"]:
        meta.update(seconds)
    return meta


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | type(None))
