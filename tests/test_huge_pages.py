"""Weights on huge pages: proved by the kernel's own account, and nobody's memory but for that."""

import gc
import mmap
import re
import weakref
from pathlib import Path

import pytest
import torch

from impl.models.kv_cache import KVCache
from kernels import build, huge_pages
from kernels.decode_step import DecodeStep, is_far
from kernels.huge_pages import COLLAPSE, to_huge_pages
from tests.plugins.memory import weight_bytes
from tests.test_decode_step import decoder

MB = 1 << 20


def areas():
    """(start, end, bytes on huge pages) of each area of this process's memory."""
    found = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found.append([int(area[1], 16), int(area[2], 16), 0])
        elif line.startswith("AnonHugePages:"):
            found[-1][2] = int(line.split()[1]) << 10
    return found


def huge_bytes_around(t):
    """Bytes on huge pages in the areas that hold t."""
    return sum(huge for start, end, huge in areas()
               if start < t.data_ptr() + t.nbytes and t.data_ptr() < end)  # fmt: skip


@pytest.fixture
def granted():
    """Skips where the kernel grants no huge page, asked without our code."""
    with mmap.mmap(-1, 4 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        try:
            area.write(bytes(4 * MB))
            area.madvise(COLLAPSE)
        except OSError as error:
            pytest.skip(f"needs madvise(MADV_COLLAPSE), of Linux 6.1; this kernel says: {error}")
    if not huge_pages.page_bytes():
        pytest.skip("needs transparent huge pages; they are set to never on this machine")


@pytest.fixture
def asked(monkeypatch):
    """The pages asked for, in order; the kernel is not asked, and refuses."""
    calls = []

    def refuse(page, size, advice):
        assert (size, advice) == (2 * MB, COLLAPSE)
        calls.append(page)
        return -1

    monkeypatch.setattr(huge_pages, "_madvise", lambda: refuse)
    monkeypatch.setattr(huge_pages, "page_bytes", lambda: 2 * MB)
    return calls


def test_the_kernel_reports_the_pages(granted):
    values, areas_of = torch.randint(1000, (4 * MB,), dtype=torch.int32), {}
    for name in ("moved", "left"):
        area = mmap.mmap(-1, 16 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if name == "left":
            area.madvise(mmap.MADV_NOHUGEPAGE)
        area.madvise(mmap.MADV_DONTDUMP)  # areas that differ in this are not joined
        areas_of[name] = torch.frombuffer(area, dtype=torch.int32).copy_(values)
    moved = to_huge_pages(areas_of.values())
    assert moved >= 12 * MB
    assert huge_bytes_around(areas_of["moved"]) == moved
    assert huge_bytes_around(areas_of["left"]) == 0
    assert all(torch.equal(t, values) for t in areas_of.values())


def test_pages_that_hold_mostly_other_things_are_left(asked):
    t = torch.empty(16 * MB, dtype=torch.uint8)
    first = -t.data_ptr() % (2 * MB)  # where a page begins
    pages = [t[first + i * 2 * MB :][: 2 * MB] for i in range(6)]
    third, half = 2 * MB // 3, MB
    to_huge_pages([pages[0][:third], pages[1][:third], pages[1][half:], pages[2][:third],
                   pages[2][:third], pages[4][half:], t[:0]])  # fmt: skip
    assert asked == [pages[1].data_ptr(), pages[4].data_ptr()]


def test_a_tensor_over_a_boundary_counts_on_both_sides(asked):
    t = torch.empty(16 * MB, dtype=torch.uint8)
    first = -t.data_ptr() % (2 * MB)
    to_huge_pages([t[first + MB :][: 4 * MB]])  # half, whole, half
    assert len(asked) == 3


def test_refusals_are_no_error(asked):
    assert to_huge_pages([torch.empty(8 * MB)]) == 0
    assert len(asked) >= 15


@pytest.mark.parametrize("text", ["always madvise [never]", None])
def test_machines_without_huge_pages_are_not_asked(text, asked, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "_madvise", lambda: pytest.fail("the kernel was asked"))
    if text:
        (tmp_path / "enabled").write_text(text)
        (tmp_path / "hpage_pmd_size").write_text("2097152")
    assert huge_pages.page_bytes() == 0
    assert to_huge_pages([torch.empty(8 * MB)]) == 0


@pytest.fixture
def large():
    """A decoder whose tables are large enough to be areas of their own."""
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    return decoder(vocab_size=90_000, num_layers=1).requires_grad_(False)  # two of 34 MB


@torch.inference_mode()
def test_a_step_reads_the_same_weights_from_huge_pages(large, granted):
    ids = torch.tensor([[5, 7]])
    addresses = [p.data_ptr() for p in large.parameters()]
    held = weight_bytes(large)
    plain = DecodeStep(large, huge_pages=False)
    assert plain.huge_bytes == 0
    expected = plain(ids, 0, KVCache(large.config, 1, 4))
    step = DecodeStep(large)
    assert step.huge_bytes >= 60 * MB
    assert huge_bytes_around(large.lm_head.weight) >= 30 * MB
    assert [p.data_ptr() for p in large.parameters()] == addresses
    assert weight_bytes(large) == held
    assert torch.equal(step(ids, 0, KVCache(large.config, 1, 4)), expected)


def test_weights_on_huge_pages_go_with_the_step():
    """An area of memory of ours tells when nobody holds it; malloc's may go to others."""
    model = decoder(vocab_size=90_000, num_layers=1).requires_grad_(False)
    weight = model.lm_head.weight
    area = mmap.mmap(-1, weight.nbytes)
    weight.data = torch.frombuffer(area, dtype=weight.dtype).view_as(weight).copy_(weight)
    step, held = DecodeStep(model), weakref.ref(area)
    del model, weight, area
    gc.collect()
    assert held(), "the step reads them"
    assert step(torch.tensor([[5]]), 0, None).isfinite().all()
    del step
    gc.collect()
    assert not held()


def test_nothing_is_fetched_ahead_from_memory_on_huge_pages():
    beyond = 1 << 34  # no cache holds it
    assert is_far(beyond, beyond)
    assert not is_far(beyond, beyond // 2), "half of it is on ordinary pages"
    assert not is_far(1 << 20, 1 << 20), "a cache holds it"


@torch.inference_mode()
def test_how_weights_are_read_changes_no_bit():
    step = DecodeStep(decoder())
    ids = torch.arange(6).reshape(2, 3)
    answers = []
    for step.model.far in (0, 1):
        answers.append(step(ids, 0, KVCache(step.config, 2, 8)))
    assert torch.equal(*answers)
