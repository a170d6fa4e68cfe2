"""What this machine can do, asked once, and the sentence when it cannot."""

from __future__ import annotations

import functools
import importlib.util
import os
import re

# package -> the extra of pyproject.toml that brings it
PACKAGES = {
    "bitsandbytes": "",
    "torchao": "peers",
    "onnxruntime": "runtimes",
    "openvino": "runtimes",
}
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction set extensions of the processor, as Linux names them."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:  # noqa: PTH123
            found = re.search(r"^flags\s*:(.*)$", cpuinfo.read(), re.M)
    except OSError:
        found = None
    return frozenset(found.group(1).split() if found else ())


@functools.cache
def has_compiler() -> bool:
    """Whether torch.compile can build its CPU code: a C++ compiler and Python's headers."""
    import shutil
    import sysconfig

    headers = os.path.join(sysconfig.get_path("include"), "Python.h")  # noqa: PTH118
    return bool(shutil.which(os.environ.get("CXX", "g++"))) and os.path.exists(headers)  # noqa: PTH110


def has_c_compiler() -> bool:
    """Whether Triton can build the launchers of its kernels: ``$CC``, gcc or clang."""
    import shutil

    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def lacks(requirement: str, device: str = "cpu") -> str | None:
    """Why ``requirement`` is not met when running on ``device``, or None when it is.

    Requirements: ``cuda``, ``sm89`` (a compute capability, on CUDA), ``2gpu``, an instruction set
    of ``ISA``, the name of a package, and two that mean something else on each device:
    ``compiler`` (what torch.compile generates can be built: C++ on a CPU, Triton on CUDA) and
    ``kernels`` (ours can be built: C++ on a CPU, by NVRTC or Triton on CUDA).
    """
    if requirement == "compiler":
        return _lacks_triton() if device.startswith("cuda") else _lacks_cpp()
    if requirement == "kernels":
        return _lacks_kernels(device)
    if requirement in ISA:
        return None if requirement in cpu_flags() else f"needs {requirement}; this CPU has none"
    if re.fullmatch(r"cuda|sm\d+|\d+gpu", requirement):
        return _lacks_cuda(requirement, device)
    if importlib.util.find_spec(requirement) is None:
        extra = PACKAGES.get(requirement, "")
        what = f"the extra [{extra}]" if extra else f"pip install {requirement}"
        return f"needs the package {requirement} ({what})"
    return None


def _lacks_cpp() -> str | None:
    return None if has_compiler() else "needs a C++ compiler and Python's headers"


def _lacks_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton (pip install triton)"
    return None if has_c_compiler() else "needs a C compiler for Triton: install gcc or set CC"


def _lacks_kernels(device: str) -> str | None:
    """A CPU needs a C++ compiler alone; CUDA needs one of the two that our operators have there."""
    if not device.startswith("cuda"):
        import shlex
        import shutil

        command = shlex.split(os.environ.get("CXX") or "g++")
        found = shutil.which(command[0])
        return None if found else "needs a C++ compiler; install g++ or set CXX"
    from kernels.build import lacks_nvrtc

    if lacks_nvrtc("cuda") is None or _lacks_triton() is None:
        return None
    return (
        "needs cuda-core with CUDA's headers (the extra [gpu]), or triton and a C compiler; "
        "install one of them"
    )


def _lacks_cuda(requirement: str, device: str) -> str | None:
    if not device.startswith("cuda"):
        return f"needs {requirement}; this runs on {device}"
    import torch

    if match := re.fullmatch(r"sm(\d+)", requirement):
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor < int(match[1]):
            return f"needs {requirement}; this is sm{major}{minor}"
    if match := re.fullmatch(r"(\d+)gpu", requirement):
        here = torch.cuda.device_count()
        if here < int(match[1]):
            return f"needs {match[1]} GPUs; this machine has {here}"
    return None


def memory_bytes(device: str = "cpu") -> int:
    """Bytes that a cell may take on ``device`` now."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def finish(device) -> None:
    """Wait for a torch device: a token exists once it is computed, not once it is launched."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
