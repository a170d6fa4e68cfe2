"""Weights on pages of 2 MiB: reading them asks the processor for 1/512 of the addresses.

A core remembers where some thousand pages lie; a read of more memory than these hold stops at each
page to look it up, through two tables of tables in a virtual machine, and prefetches end there.
Source: Kwon et al. 2016, https://www.usenix.org/conference/osdi16/technical-sessions/presentation/kwon
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
COLLAPSE = 25  # of madvise, since Linux 6.1: now, not by and by


def page_bytes() -> int:
    """Size of a huge page, or 0 where the kernel has none or its owner allows none."""
    try:
        allowed = "[never]" not in (SETTINGS / "enabled").read_text()
        return int((SETTINGS / "hpage_pmd_size").read_text()) if allowed else 0
    except (OSError, ValueError):
        return 0


@functools.cache
def _madvise():
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return advise


def to_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Puts the memory of CPU ``tensors`` on huge pages, where it is; the bytes that now are.

    Addresses, contents and owners stay what they are, so nothing is counted twice or lives longer.
    Only pages at least half of which these tensors fill; what the kernel refuses (an older one,
    memory of a file, no memory in one piece) stays on ordinary pages, and is no error.
    """
    size = page_bytes()
    if not size:
        return 0
    filled: Counter[int] = Counter()
    for start, end in {(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors}:
        for page in range(start // size * size, end, size):
            filled[page] += min(end, page + size) - max(start, page)
    pages = [page for page, held in sorted(filled.items()) if 2 * held >= size]
    return size * sum(_madvise()(page, size, COLLAPSE) == 0 for page in pages)
