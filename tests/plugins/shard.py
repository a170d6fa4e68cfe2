"""One part of the selection per process: ``--shard i/n``, and xdist groups of one model."""

from __future__ import annotations

import re

import pytest


def pytest_addoption(parser):
    parser.getgroup("study: selection").addoption(
        "--shard", default=None, metavar="I/N", help="run the I-th of N parts (1-based)"
    )


def parse(text: str) -> tuple[int, int]:
    """``"2/4"`` -> (2, 4)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise pytest.UsageError(f"--shard {text} is not of the form I/N with 1 <= I <= N, as 2/4")
    return int(match[1]), int(match[2])


def key_of(item) -> str:
    """What a shard takes whole: one cell, or one test."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params["cell"]) if callspec and "cell" in callspec.params else item.nodeid


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not config.option.shard:
        return
    index, count = parse(config.option.shard)
    order = {key: i for i, key in enumerate(dict.fromkeys(map(key_of, items)))}
    mine = [item for item in items if order[key_of(item)] % count == index - 1]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
    items[:] = mine


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests that share an engine run on one worker: those of a cell, on a GPU those of a model.

    Tests without a cell are spread one by one.
    """
    from xdist.scheduler import LoadScopeScheduling

    shared = r"\[.*?-(\w+-\w+)-batch\d+" if _on_gpu(config) else r"\[(.*-\w+-\w+-batch\d+)"

    class ByEngine(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            match = re.search(shared, nodeid)
            return match[1] if match else nodeid

    return ByEngine(config, log)


def _on_gpu(config) -> bool:
    return getattr(config, "study_device", "cpu").startswith("cuda")
