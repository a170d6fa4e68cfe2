"""Bytes: the allocator's peak in one call, resident weights, and giving memory back."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterable
from typing import Any


def peak_bytes(call: Callable[[], Any], device: str = "cpu", weight_bytes: int = 0) -> int | None:
    """Peak of memory in one untimed ``call``, resident weights included.

    CPU: the highest running sum of the profiler's ``[memory]`` events, plus ``weight_bytes``;
    the same to the byte every time.  CUDA: ``max_memory_allocated``.  None when a profiler is
    already running (nesting would silently end it).
    """
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if torch.autograd._profiler_enabled():
        call()
        return None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return weight_bytes + running_peak(e.nbytes() for e in events)


def running_peak(changes: Iterable[int]) -> int:
    """Highest partial sum of allocations (+) and frees (-), at least 0."""
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


def weight_bytes(model: Any) -> int:
    """Bytes of a module's parameters and buffers, each storage once (tied weights, views)."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _parts(tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr(), str(part.device)] = storage.nbytes()
    return sum(storages.values())


def _parts(tensor: Any) -> list[Any]:
    """The plain tensors inside a tensor subclass (quantized weights), or the tensor itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    return [tensor]


def release() -> None:
    """Between models: collect garbage, forget compiled code, return freed memory."""
    torch = sys.modules.get("torch")
    if torch is not None and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
