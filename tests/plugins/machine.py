"""What the machine is (``machine_info``, the storage's name) and the state it is in.

Nothing here touches CUDA: pytest-benchmark asks for ``machine_info`` before any test, and a
context made there would cost memory and time.  GPUs are asked through NVML.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

BUSY_LOAD = 0.5  # of the cores, before the run
GONE = ("node", "release", "python_build")  # differ from run to run (pytest-benchmark #255)
THROTTLE = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


@functools.cache
def nvml() -> Any:
    """The started NVML library, or None without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # absent, or no driver: both mean no GPU to ask
        return None
    return pynvml


@functools.cache
def gpu_handle() -> Any:
    """NVML's handle of the first GPU that CUDA_VISIBLE_DEVICES shows, or None."""
    lib = nvml()
    if lib is None:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    with contextlib.suppress(lib.NVMLError):
        if first.isdigit():
            return lib.nvmlDeviceGetHandleByIndex(int(first))
        if first:
            return lib.nvmlDeviceGetHandleByUUID(first)
    return None


def energy_joules() -> float | None:
    """The GPU's energy counter, J since the driver was loaded; None where it has none."""
    lib, handle = nvml(), gpu_handle()
    if handle is None:
        return None
    with contextlib.suppress(lib.NVMLError):
        return float(lib.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    return None


def gpu_info() -> dict[str, Any] | None:
    """Name, memory, compute capability, driver and CUDA of the GPU, without a CUDA context."""
    lib, handle = nvml(), gpu_handle()
    if handle is None:
        return None
    try:
        cuda = lib.nvmlSystemGetCudaDriverVersion()
        return {
            "name": _text(lib.nvmlDeviceGetName(handle)),
            "memory_bytes": int(lib.nvmlDeviceGetMemoryInfo(handle).total),
            "compute_capability": ".".join(
                map(str, lib.nvmlDeviceGetCudaComputeCapability(handle))
            ),
            "driver": _text(lib.nvmlSystemGetDriverVersion()),
            "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        }
    except lib.NVMLError:
        return None


def conditions_now() -> dict[str, Any]:
    """Load, clocks, power, temperature and throttle reasons at this moment; null if unknown."""
    import psutil

    state: dict[str, Any] = {
        "load_1m": os.getloadavg()[0],
        "cpu_mhz": None,
        "memory_available_bytes": int(psutil.virtual_memory().available),
        "gpu_sm_mhz": None,
        "gpu_memory_mhz": None,
        "gpu_power_w": None,
        "gpu_temperature_c": None,
        "throttle_reasons": None,
    }
    with contextlib.suppress(OSError):
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.M)
        state["cpu_mhz"] = max(map(float, found), default=None)
    lib, handle = nvml(), gpu_handle()
    if handle is not None:
        with contextlib.suppress(lib.NVMLError):
            state["gpu_sm_mhz"] = lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_SM)
            state["gpu_memory_mhz"] = lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_MEM)
            state["gpu_power_w"] = lib.nvmlDeviceGetPowerUsage(handle) / 1e3
            state["gpu_temperature_c"] = lib.nvmlDeviceGetTemperature(
                handle, lib.NVML_TEMPERATURE_GPU
            )
            bits = lib.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            state["throttle_reasons"] = [why for bit, why in THROTTLE.items() if bits & bit]
    return state


def busy(state: dict[str, Any]) -> str | None:
    """A warning when the machine had other work before the run."""
    cores = os.cpu_count() or 1
    if state["load_1m"] <= BUSY_LOAD * cores:
        return None
    return (
        f"the machine was busy before the run: load {state['load_1m']:.1f} on {cores} cores; "
        "ratios hold, milliseconds do not"
    )


def device_of(config: pytest.Config) -> str:
    """``cpu`` or ``cuda``: what ``--device`` asks for, else what this machine and torch have."""
    if known := getattr(config, "study_device", None):
        return str(known)
    if asked := config.getoption("device", None):
        return str(asked)
    has_cuda_torch = "+cpu" not in _version("torch")
    return "cuda" if has_cuda_torch and gpu_handle() is not None else "cpu"


def slug(config: pytest.Config) -> str:
    """The machine's name in paths: its GPU, or its CPU; ``[a-z0-9-]``."""
    if device_of(config).startswith("cuda"):
        name = (gpu_info() or {}).get("name") or "cuda"
    else:
        name = cpu_name()
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


@functools.cache
def cpu_name() -> str:
    """Brand of the processor and how many of it this process may use."""
    found = None
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found.group(1).strip() if found else 'cpu'} {cores}x"


def isa() -> list[str]:
    """Instruction sets that matter to inference, of those the processor has."""
    from impl.machine import ISA, cpu_flags

    return [name for name in ISA if name in cpu_flags()]


def fingerprint(config: pytest.Config) -> str:
    """12 hex digits of the hardware and the versions that numbers depend on."""
    parts = [slug(config), isa(), gpu_info(), _threads(), sys.version_info[:2]]
    parts += [_version(p) for p in ("torch", "transformers", "triton")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def code_version(root: Path) -> str:
    """12 hex digits of the study's own source: techniques, kernels, tests."""
    digest = hashlib.sha256()
    for folder in ("impl", "kernels", "tests"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".json"} and path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def pytest_configure(config: pytest.Config) -> None:
    """One storage per machine: ``.benchmarks/<gpu or cpu>``."""
    if getattr(config.option, "benchmark_storage", None) == "file://./.benchmarks":
        folder = config.rootpath / ".benchmarks" / slug(config)
        with contextlib.suppress(ValueError):
            folder = folder.relative_to(Path.cwd())  # else `compare` cannot name it
        config.option.benchmark_storage = f"file://{folder}"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Drop what differs every run, add what numbers depend on."""
    for key in GONE:
        machine_info.pop(key, None)
    cpu = machine_info.get("cpu", {})
    keep = {"brand": cpu.get("brand_raw") or cpu_name(), "arch": cpu.get("arch")}
    machine_info["cpu"] = {**keep, "count": os.cpu_count(), "isa": isa()}
    machine_info.update(
        torch=_version("torch"),
        transformers=_version("transformers"),
        triton=_version("triton"),
        threads=_threads(),
        gpu=gpu_info(),
        fingerprint=fingerprint(config),
    )


def _threads() -> int:
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
