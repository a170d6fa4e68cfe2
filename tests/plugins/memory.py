"""Bytes: the allocator's peak in one call, and resident weights."""

from collections.abc import Callable, Iterable
from typing import Any


def peak_bytes(call: Callable[[], Any], device: str = "cpu", weight_bytes: int = 0) -> int | None:
    """Peak of memory in one untimed ``call``, with ``weight_bytes`` of resident weights.

    CPU: the highest running sum of the profiler's ``[memory]`` events, the same to the byte every
    time.  CUDA: how far ``max_memory_allocated`` rose above what was allocated before.  So other
    engines in memory count on neither.  None when a profiler is already running (nesting would
    silently end it).
    """
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return weight_bytes + torch.cuda.max_memory_allocated() - before
    if torch.autograd._profiler_enabled():
        call()
        return None
    return weight_bytes + running_peak(allocations(call))


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes that ``call`` allocated (+) and freed (-) on the CPU, in order.

    The profiler beneath ``torch.profiler.profile``, which would spend seconds on a tree of events
    that nobody reads.
    """
    from torch._C._profiler import ProfilerActivity, _ExperimentalConfig
    from torch.autograd import _disable_profiler, _enable_profiler, _prepare_profiler
    from torch.autograd.profiler import ProfilerConfig, ProfilerState

    shapes = stack = flops = modules = False
    config = ProfilerConfig(
        ProfilerState.KINETO, shapes, True, stack, flops, modules, _ExperimentalConfig()
    )
    _prepare_profiler(config, {ProfilerActivity.CPU})
    _enable_profiler(config, {ProfilerActivity.CPU})
    try:
        call()
    finally:
        found = _disable_profiler()
    events: list[Any] = [e for e in found.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


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
