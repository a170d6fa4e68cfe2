"""The region that ncu profiles: one warm call of a cell, and nothing else of its test.

``python -m ncu`` runs ``pytest NODE --benchmark-disable`` with ``NCU_CHILD=1``; ncu starts switched
off and counts only between ``cudaProfilerStart`` and ``Stop``, inside the NVTX range ``measured``
(so do ``nsys --capture-range=cudaProfilerApi`` and others).  Without CUDA, or without
``NCU_CHILD``, nothing here does anything.

    NCU_FACTS=FILE    what the region knows, written when it is reached
    NCU_TRACE=FILE    record kernel times with torch's profiler instead: needs no permission
    NCU_COLLECT=FILE  which of the collected tests measure, and their cells
    REQUIRE_NCU=1     a run without ncu fails at the start
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RANGE = "measured"


def pytest_configure(config: pytest.Config) -> None:
    """A job that must profile says at the start that it cannot (exit code 4)."""
    if os.environ.get("REQUIRE_NCU", "0") not in ("", "0") and not config.option.help:
        from ncu import command

        if command.find() is None:
            raise pytest.UsageError(
                "REQUIRE_NCU is set and this machine lacks ncu; install Nsight Compute, or set NCU "
                "to its path"
            )


def pytest_collection_finish(session: pytest.Session) -> None:
    """For ``python -m ncu``: the tests that measure, in their order."""
    if not (listing := os.environ.get("NCU_COLLECT")):
        return
    from tests.plugins import bench, machine

    device = machine.device_of(session.config)
    measuring = [item for item in session.items if bench.is_cell(item)]
    nodes = [
        {"nodeid": item.nodeid, "device": device, "cell": bench.cell_object(item, device),
         "skip": _skipped(item)}
        for item in measuring
    ]  # fmt: skip
    others = len(session.items) - len(measuring)
    Path(listing).write_text(json.dumps({"nodes": nodes, "others": others}))


def _skipped(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("skip")
    return None if mark is None else str(mark.kwargs.get("reason") or (*mark.args, "skipped")[0])


def measured(call: Callable[[], Any], device: str, **facts: Any) -> None:
    """Make ``call`` once warm and once profiled; does nothing unless ncu is the parent.

    device   of the cell; on a CPU only the facts are left
    facts    numbers about one call, such as ``bytes_moved`` and ``flops``
    """
    if os.environ.get("NCU_CHILD") != "1":
        return
    if path := os.environ.get("NCU_FACTS"):
        Path(path).write_text(json.dumps({"device": device, **facts}))
    if not device.startswith("cuda"):
        return
    import torch

    call()  # warm: compiled, tuned, allocated
    torch.cuda.synchronize()
    if trace := os.environ.get("NCU_TRACE"):
        _traced(call, Path(trace))
        return
    torch.cuda.profiler.start()
    torch.cuda.nvtx.range_push(RANGE)
    try:
        call()
        torch.cuda.synchronize()
    finally:
        torch.cuda.nvtx.range_pop()
        torch.cuda.profiler.stop()


def _traced(call: Callable[[], Any], path: Path) -> None:
    """Kernel events of one call as a Chrome trace."""
    import torch

    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
