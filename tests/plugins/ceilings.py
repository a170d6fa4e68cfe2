"""What this machine can do at best, measured in the same run: the limit of every time.

Probes run first and last, on random data, lazily: only when a cell is really timed.  A cell uses
the read bandwidth of its own working set, caches included.  Nothing may beat its limit.
"""

import contextlib
import ctypes
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_SPREAD = 0.05  # faster than the limit by more than this is never the probe's noise
DRIFT = 0.03  # probes that moved further mark the run
SMALLEST_DRAM = 128 << 20  # B
SMALL = 256  # rows and columns of a first product on a CPU, 1024 of those that are not ...
SLOW = 30e9  # ... slower than this, FLOP/s: without instructions for it they would take seconds
CAN_COMPUTE = {  # arithmetic of the key may as well be done in any of these dtypes
    "fp32": ("fp32",),
    "tf32": ("tf32", "fp32"),
    "bf16": ("bf16", "fp16", "tf32", "fp32"),
    "fp16": ("fp16", "bf16", "tf32", "fp32"),
    "fp8": ("fp8", "fp16", "bf16", "tf32", "fp32"),
    "int16": ("int16", "fp16", "bf16", "tf32", "fp32"),
    "int8": ("int8", "int16", "fp8", "fp16", "bf16", "tf32", "fp32"),
    "int4": ("int4", "int8", "int16", "fp8", "fp16", "bf16", "tf32", "fp32"),
}
IN_REGISTERS = {"int16", "int4"}  # of a CPU: no library multiplies these, kernels of ours do

Run = Callable[[], Any]


@dataclass(frozen=True)
class Limit:
    """The shortest time physics allows: max(bytes / bandwidth, flops / peak)."""

    seconds: float
    bound: str  # 'memory' or 'compute'
    spread: float  # relative, of the probe that set it

    def beaten_by(self, seconds: float) -> bool:
        """Whether a measured time is impossible."""
        return self.seconds / seconds > 1 + min(self.spread, MOST_SPREAD)


class Ceilings:
    """The probes of a run on one device, and the limits they set."""

    def __init__(self, device: str = "cpu", fast: bool = False) -> None:
        self.device, self.fast = device, fast
        self.first: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None

    def measure_first(self) -> dict[str, Any]:
        """Probe once; later calls return what the first one found."""
        if self.first is None:
            self.first = probe(self.device, self.fast)
        return self.first

    def measure_last(self) -> None:
        """Probe again, if this run measured anything."""
        if self.first is not None and self.last is None:
            self.last = probe(self.device, self.fast)

    def read_rate(self, working_set: float) -> tuple[float, float]:
        """(bytes/s, spread) of reading ``working_set`` bytes again and again."""
        points = sorted(self.measure_first()["read"], key=lambda p: p["working_set_bytes"])
        # a smaller set is never slower: a short call only hides the bandwidth it could have
        rates = list(itertools.accumulate((p["bytes_per_s"] for p in reversed(points)), max))[::-1]
        sizes = [p["working_set_bytes"] for p in points]
        i = sum(size < working_set for size in sizes)
        if i in (0, len(sizes)):
            i = min(i, len(sizes) - 1)
            return rates[i], points[i]["spread"]
        t = math.log(working_set / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
        rate = math.exp((1 - t) * math.log(rates[i - 1]) + t * math.log(rates[i]))
        return rate, max(points[i - 1]["spread"], points[i]["spread"])

    def copy_rate(self) -> tuple[float, float]:
        """(bytes/s, spread) of copying, bytes read plus written."""
        found = self.measure_first()["copy"]
        return float(found["bytes_per_s"]), float(found["spread"])

    def compute_rate(self, dtype: str) -> tuple[float, float]:
        """(FLOP/s, spread) of the best matrix product whose dtype can stand for ``dtype``."""
        gemm = self.measure_first()["gemm"]
        found = [gemm[d] for d in CAN_COMPUTE.get(dtype, CAN_COMPUTE["int8"]) if d in gemm]
        best = max(found or gemm.values(), key=lambda p: p["flops_per_s"])
        return best["flops_per_s"], best["spread"]

    def byte_seconds(
        self, moved: float, working_set: float, written: float = 0.0
    ) -> tuple[float, float]:
        """(least seconds, spread) to move so many bytes, ``written`` of them to memory.

        What is written goes, with as much that is read, at the copy probe's rate, the rest at the
        read probe's.  In a working set that fits the caches all of it is held to theirs.
        """
        rate, spread = self.read_rate(working_set)
        copied = min(2 * written, moved) if self.is_dram(working_set) else 0.0
        if not copied:
            return moved / rate, spread
        copy_rate, copy_spread = self.copy_rate()
        return (moved - copied) / rate + copied / copy_rate, max(spread, copy_spread)

    def limit(
        self,
        bytes_moved: float | None,
        flops: float | None,
        dtype: str,
        working_set: float,
        written: float = 0.0,
    ) -> Limit | None:
        """The limit of a call; None when neither its bytes nor its FLOPs are known."""
        limits = []
        if bytes_moved:
            seconds, spread = self.byte_seconds(bytes_moved, working_set, written)
            limits.append(Limit(seconds, "memory", spread))
        if flops:
            rate, spread = self.compute_rate(dtype)
            limits.append(Limit(flops / rate, "compute", spread))
        return max(limits, key=lambda x: x.seconds, default=None)

    def probe_again(self, working_set: float, dtypes: tuple[str, ...]) -> None:
        """Raise the ceilings a cell seems to beat, if a quieter moment shows more."""
        first = self.measure_first()
        largest = max(p["working_set_bytes"] for p in first["read"])
        first["read"].append(_read(self.device, round(min(working_set, largest)), 0.3))
        copy = _copy(self.device, int(first["copy"]["working_set_bytes"]) // 2, 0.3)
        if copy["bytes_per_s"] > first["copy"]["bytes_per_s"]:
            first["copy"] = copy
        able = {other for dtype in dtypes for other in CAN_COMPUTE.get(dtype, CAN_COMPUTE["int8"])}
        for dtype in sorted(able):
            if dtype in first["gemm"]:
                again = _gemm(self.device, dtype, 0.3)
                if again and again["flops_per_s"] > first["gemm"][dtype]["flops_per_s"]:
                    first["gemm"][dtype] = again

    def is_dram(self, working_set: float) -> bool:
        """Whether a working set is too large for any cache to hold a useful part of it."""
        return working_set >= 4 * self.measure_first()["last_level_cache_bytes"]

    def drift(self) -> float | None:
        """Largest relative change of a probe between first and last."""
        if not self.first or not self.last:
            return None
        changes = [self.last["copy"]["bytes_per_s"] / self.first["copy"]["bytes_per_s"]]
        first = {p["working_set_bytes"]: p["bytes_per_s"] for p in self.first["read"]}
        changes += [
            p["bytes_per_s"] / first[p["working_set_bytes"]]
            for p in self.last["read"]
            if p["working_set_bytes"] in first
        ]
        for dtype, p in self.last["gemm"].items():
            if dtype in self.first["gemm"]:
                changes.append(p["flops_per_s"] / self.first["gemm"][dtype]["flops_per_s"])
        return max(abs(change - 1) for change in changes)

    def as_json(self) -> dict[str, Any]:
        """The run's ``ceilings`` key."""
        return {"first": self.first, "last": self.last, "drift": self.drift()}


def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the largest cache: all of its instances together on a CPU, the L2 of a GPU."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    caches: dict[str, tuple[int, int]] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        with contextlib.suppress(OSError, ValueError):
            if (index / "type").read_text().strip() != "Instruction":
                level = int((index / "level").read_text())
                size = int((index / "size").read_text().strip().removesuffix("K")) << 10
                sharers = (index / "shared_cpu_list").read_text().strip()
                caches[f"{level} {sharers}"] = (level, size)
    top = max((level for level, _ in caches.values()), default=0)
    return sum(size for level, size in caches.values() if level == top)


def probe(device: str = "cpu", fast: bool = False) -> dict[str, Any]:
    """Measure read, copy and GEMM rates; a few seconds on a CPU, a third of that if ``fast``."""
    import torch

    start, seconds = time.perf_counter(), 0.02 if fast else 0.06
    cache = last_level_cache(device)
    dram = max(4 * cache, SMALLEST_DRAM)
    sizes = [cache // 32, cache // 8, cache // 2, cache, 2 * cache, dram]
    if fast:
        sizes = [cache // 8, cache // 2, dram]
    with torch.inference_mode():
        rates = [_read(device, size, seconds) for size in sizes if size >= 1 << 16]
        gemm = {dtype: _gemm(device, dtype, seconds) for dtype in CAN_COMPUTE}
        return {
            "device": device,
            "threads": torch.get_num_threads(),
            "last_level_cache_bytes": cache,
            "read": rates,
            "copy": _copy(device, dram // 2, seconds),
            "gemm": {dtype: found for dtype, found in gemm.items() if found},
            "seconds": time.perf_counter() - start,
        }


def _read(device: str, size: int, seconds: float) -> dict[str, Any]:
    """Read ``size`` bytes; the fastest of several reductions."""
    import torch

    with torch.inference_mode():
        x = torch.rand(size // 4, device=device)
        ints = x.view(torch.int32)
        paths: dict[str, Run] = {"sum": x.sum, "max": x.max, "int32 amax": ints.amax}
        found = _fastest(paths, x.nbytes, device, seconds)
        with _one_thread():  # on a busy machine waiting for the other threads costs more
            alone = _fastest(paths, x.nbytes, device, seconds / 2)
        if alone[1] > found[1]:
            found = (f"{alone[0]}, one thread", *alone[1:])
    return {"bytes_per_s": found[1], "working_set_bytes": size, "spread": found[2],
            "path": found[0]}  # fmt: skip


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _copy(device: str, size: int, seconds: float) -> dict[str, Any]:
    """Copy ``size`` bytes; read and written bytes both count."""
    import torch

    x = torch.rand(size // 4, device=device)
    y = torch.empty_like(x)
    paths: dict[str, Run] = {"copy": lambda: y.copy_(x), "scale": lambda: torch.mul(x, 2.0, out=y)}
    with contextlib.ExitStack() as stack:
        if not device.startswith("cuda"):
            pool = stack.enter_context(ThreadPoolExecutor())
            parts = torch.get_num_threads()
            paths["memcpy"] = lambda: _memcpy(pool, parts, y, x)
        found = _fastest(paths, 2 * x.nbytes, device, seconds)
    return {"bytes_per_s": found[1], "working_set_bytes": 2 * size, "spread": found[2],
            "path": found[0]}  # fmt: skip


def _memcpy(pool: ThreadPoolExecutor, parts: int, y: Any, x: Any) -> None:
    """The C library's copy, a part per thread: its stores bypass the caches, torch's do not."""
    part = -(-x.nbytes // parts)
    copied = [
        pool.submit(ctypes.memmove, y.data_ptr() + at, x.data_ptr() + at, min(part, x.nbytes - at))
        for at in range(0, x.nbytes, part)
    ]
    for piece in copied:
        piece.result()


def _registers(dtype: str, seconds: float) -> dict[str, Any] | None:
    """Products of whole numbers in registers: what the vector units could do without any memory."""
    import torch

    from kernels import build

    if build.lacks_compiler():
        return None
    steps, threads = 20_000, torch.get_num_threads()
    arguments = (ctypes.c_int64, ctypes.c_int)
    products = build.cpu_function("products", f"products_{dtype}", arguments, ctypes.c_int64)
    work = products(steps, threads)
    if not work:
        return None
    paths: dict[str, Run] = {"registers": lambda: products(steps, threads)}
    path, rate, spread = _fastest(paths, work, "cpu", seconds)
    return {"flops_per_s": rate, "spread": spread, "path": path}


def _gemm(device: str, dtype: str, seconds: float) -> dict[str, Any] | None:
    """A square product in the fastest way this machine offers, or None where it has none."""
    import torch

    if dtype in IN_REGISTERS:
        return None if device.startswith("cuda") else _registers(dtype, seconds)
    with torch.inference_mode(), _exact_fp32(dtype):
        paths: dict[str, Run] = {}
        n = 8192 if device.startswith("cuda") else SMALL
        for name, run in _products(device, dtype, n):
            with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
                run()
                paths[name] = run
        if not paths:
            return None
        if n == SMALL:  # then in its full size what this processor has instructions for
            quick = [p for p in paths if 2 * n**3 / _seconds(paths[p], 1, device) > SLOW]
            if quick:
                n = 1024
                large = dict(_products(device, dtype, n))
                paths = {name: large[name] for name in quick}
        path, rate, spread = _fastest(paths, 2 * n**3, device, seconds)
    return {"flops_per_s": rate, "spread": spread, "path": path}


def _products(device: str, dtype: str, n: int) -> Iterator[tuple[str, Run]]:
    import torch

    cuda = device.startswith("cuda")
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    if dtype == "int8":
        ai, bi = ((x * 30).clamp(-127, 127).to(torch.int8) for x in (a, b))
        yield "int_mm", lambda: torch._int_mm(ai, bi.t() if cuda else bi)
        if not cuda:  # without VNNI ``_int_mm`` is a plain loop: 2 GOP/s where this reaches 250
            unsigned = (ai.int() + 128).to(torch.uint8)
            packed = torch.ops.onednn.qlinear_prepack(bi, None)
            scale, zero = torch.ones(n), torch.zeros(n, dtype=torch.int32)
            product = torch.ops.onednn.qlinear_pointwise
            yield (
                "onednn",
                lambda: product(unsigned, 1.0, 128, packed, scale, zero, None, 1.0, 0,
                                torch.float32, "none", [], ""),
            )  # fmt: skip
    elif dtype == "fp8":
        if cuda and torch.cuda.get_device_capability(device) >= (8, 9):
            af, bf = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
            one = torch.ones((), device=device)
            yield (
                "scaled_mm",
                lambda: torch._scaled_mm(
                    af, bf, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
                ),
            )
    elif dtype != "tf32" or cuda:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
        ak, bk = a.to(kind), b.to(kind)
        yield "mm", lambda: torch.mm(ak, bk)
        if not cuda:
            yield "mm transposed", lambda: torch.nn.functional.linear(ak, bk)
            pointwise = torch.ops.mkldnn._linear_pointwise
            yield "onednn", lambda: pointwise(ak, bk, None, "none", [], "")


@contextlib.contextmanager
def _exact_fp32(dtype: str) -> Iterator[None]:
    """fp32 products in fp32; tf32 only when that is the question."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _fastest(
    paths: dict[str, Run], work: float, device: str, seconds: float
) -> tuple[str, float, float]:
    """(path, work per second, spread) of the path with the quickest repeat.

    Spread: how far the median repeat lies above the quickest, relative.
    """
    best = ("", 0.0, 0.0)
    for name, run in paths.items():
        run()
        once = _seconds(run, 1, device)
        calls = max(1, math.ceil(200e-6 / max(once, 1e-7)))
        times: list[float] = []
        while len(times) < 3 or (sum(times) * calls < seconds and len(times) < 200):
            times.append(_seconds(run, calls, device))
        quickest = min(times)
        if work / quickest > best[1]:
            best = (name, work / quickest, statistics.median(times) / quickest - 1)
    return best


def _seconds(run: Run, calls: int, device: str) -> float:
    """Seconds per call of back-to-back calls, device work included."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / calls
