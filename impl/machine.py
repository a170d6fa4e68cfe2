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


def lacks(requirement: str, device: str = "cpu") -> str | None:
    """Why ``requirement`` is not met when running on ``device``, or None when it is.

    Requirements: ``cuda``, ``sm89`` (a compute capability, on CUDA), ``2gpu``, ``compiler``, an
    instruction set of ``ISA``, or the name of a package.
    """
    if requirement == "compiler":
        return None if has_compiler() else "needs a C++ compiler and Python's headers"
    if requirement in ISA:
        return None if requirement in cpu_flags() else f"needs {requirement}; this CPU has none"
    if re.fullmatch(r"cuda|sm\d+|\d+gpu", requirement):
        return _lacks_cuda(requirement, device)
    if importlib.util.find_spec(requirement) is None:
        extra = PACKAGES.get(requirement, "")
        what = f"the extra [{extra}]" if extra else f"pip install {requirement}"
        return f"needs the package {requirement} ({what})"
    return None


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
