"""Running CUDA kernels on the CPU, compiling kernels for GPUs that are not here, and the record.

``host_shim`` puts ``kernels/common/simt.h`` under the CUDA implementations: their own binding code
then computes on CPU tensors, block by block.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from kernels import build
from kernels.op import OPS, unavailable

ROOT = Path(__file__).resolve().parent.parent
LIMITS = ROOT / "tests/data/kernel_limits"
ARCHS = ("sm_80", "sm_90a")
ENTRIES = re.compile(r"ENTRY\((?!T)[\w ]+, (\w+)\)")


def entry_points(name: str) -> list[str]:
    """Kernels of ``kernels/<name>/cuda.cu``: its ``ENTRY(type, suffix)`` lines give their names."""
    text = (build.HERE / name / "cuda.cu").read_text()
    stems = re.findall(r"^    (\w+)_##name\(", text, re.M)
    return [f"{stem}_{suffix}" for stem in stems for suffix in ENTRIES.findall(text)]


def lacks_shim() -> str | None:
    """Why CUDA kernels cannot run on the CPU here, or None."""
    if build.compiler() is None:
        return "needs a C++ compiler"
    return None if build.cuda_include() else "needs CUDA's headers with nv/target (extra [gpu])"


def build_shim(name: str, *flags: str) -> Path:
    """``kernels/<name>/cuda.cu``, unchanged, as a library for this CPU."""
    source = build.HERE / name / "cuda.cu"
    unit = "\n".join(['#include "simt.h"', f'#include "{source}"',
                      *(f"SIMT_ENTRY({k})" for k in entry_points(name))])  # fmt: skip
    options = ["-std=c++20", "-O1", "-g", "-shared", "-fPIC", "-ffp-contract=off", "-w", "-pthread",
               f"-I{build.COMMON}", f"-isystem{build.cuda_include()}", *flags]  # fmt: skip
    headers = [p.read_bytes() for p in sorted(build.COMMON.glob("*"))]
    parts = [unit.encode(), source.read_bytes(), *headers, repr(options).encode()]
    path = (
        build.cache_folder() / f"{name}-host-{hashlib.sha256(b''.join(parts)).hexdigest()[:20]}.so"
    )
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        subprocess.run([*build.compiler(), "-xc++", "-", *options, "-o", part], input=unit,
                       text=True, check=True)  # fmt: skip
        part.replace(path)
    return path


HOPPER = "-DSIMT_HOPPER"  # kernels as for sm_90a: wgmma, mbarriers (common/simt_wgmma.h)


@contextlib.contextmanager
def host_shim(monkeypatch, recorded: list | None = None, *flags: str):
    """CUDA implementations launch on the CPU inside; launches are appended to ``recorded``.

    As on an sm_80, or with ``HOPPER`` among the compiler's ``flags`` as on an sm_90a, of three
    multiprocessors.
    """

    def cuda_kernel(name, symbol, device):
        return name, symbol

    def launch(kernel, grid, block, *args, shared=0):
        name, symbol = kernel
        grid = tuple(grid) if isinstance(grid, tuple) else (grid,)
        dims = (*(*grid, 1, 1)[:3], block, 1, 1)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        before = [_bytes(t) for t in tensors]
        library = ctypes.CDLL(str(build_shim(name, *flags)))
        run_on_host(library, symbol, dims, shared, build.typed(args))
        if recorded is not None:
            after = [_bytes(t) for t in tensors]
            scalars = [None if isinstance(a, torch.Tensor) else (type(a).__name__, a.value)
                       for a in args]  # fmt: skip
            recorded.append((symbol, dims, shared, scalars, before, after))

    with monkeypatch.context() as patch:
        patch.setattr(build, "cuda_kernel", cuda_kernel)
        patch.setattr(build, "launch", launch)
        patch.setattr(build, "cuda_arch", lambda device: "sm_90a" if HOPPER in flags else "sm_80")
        patch.setattr(build, "multiprocessors", lambda device: 3)
        yield


# routes of the host shim and their flags
ON_HOST: dict[str, tuple[str, ...]] = {"cuda_on_host": (), "hopper_on_host": (HOPPER,)}


def run_on(op: str, route: str, monkeypatch):
    """The operation by one route on this CPU; skips with a sentence.

    ``route``: ``reference``, ``triton`` (interpreted), one of ``ON_HOST``, or an instruction set.
    """
    if route in ON_HOST:
        if reason := lacks_shim():
            pytest.skip(reason)

        def on_host(*args):
            with host_shim(monkeypatch, None, *ON_HOST[route]):
                return OPS[op].functions["cuda"](*args)

        return on_host
    impl = route if route in ("reference", "triton") else "cpu"
    if reason := unavailable(impl, "cpu"):
        pytest.skip(reason)
    call = getattr(importlib.import_module(f"kernels.{op}"), op)
    if impl != "cpu":
        return lambda *args: call(*args, impl=impl)
    if route not in build.isas():
        pytest.skip(f"needs {route}; this processor's best is {build.isas()[0]}")

    def on_cpu(*args):
        with build.isa(route):
            return call(*args, impl="cpu")

    return on_cpu


def _bytes(t: torch.Tensor):
    """The storage that starts at t, as bytes: all rows, gaps between them included."""
    span = (
        1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    )
    return ctypes.string_at(t.data_ptr(), span * t.element_size())


def run_on_host(library, symbol, dims, shared, args) -> None:
    """One launch; ``args`` are addresses and ctypes scalars."""
    values = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in args]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    library[f"host_{symbol}"]((ctypes.c_uint * 6)(*dims), ctypes.c_size_t(shared), pointers)


REPLAY = """
import ctypes, pickle, sys
library, short = ctypes.CDLL(sys.argv[1]), sys.argv[3]
launches = pickle.load(open(sys.argv[2], "rb"))
for symbol, dims, shared, scalars, before, after in launches:
    buffers, values, at = [], [], 0
    for scalar in scalars:
        if scalar is not None:
            values.append(getattr(ctypes, scalar[0])(scalar[1]))
            continue
        size = len(before[at]) - (4 if short == str(at) else 0)
        # from malloc, so that AddressSanitizer knows where it ends
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        address = libc.malloc(size)
        ctypes.memmove(address, before[at], size)
        buffers.append((address, size, after[at]))
        values.append(ctypes.c_void_p(address))
        at += 1
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    library["host_" + symbol]((ctypes.c_uint * 6)(*dims), ctypes.c_size_t(shared), pointers)
    for address, size, expected in buffers:
        assert ctypes.string_at(address, size) == expected[:size], "another result than without"
print("replayed", len(launches))
"""


def sanitized(sanitizer: str) -> tuple[list[str], dict[str, str]]:
    """(command that a child's own follows, its environment): libraries find ``sanitizer`` there."""
    found = subprocess.run([*build.compiler(), f"-print-file-name=lib{sanitizer[0]}san.so"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST"))}
    env |= {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    # g++ 12's TSan refuses kernels that randomise addresses widely; containers may forbid it
    fixed = ["setarch", "-R"]
    if subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    # set after setarch, which would itself not survive it
    return [*fixed, "env", f"LD_PRELOAD={found.stdout.strip()}"], env


def replay(library: Path, launches: list, sanitizer: str | None = None,
           short_argument: int | None = None):  # fmt: skip
    """Run recorded launches again in a child, perhaps with ``sanitizer``; its CompletedProcess.

    It fails unless every byte comes out as recorded.
    ``short_argument``: the tensor argument whose last 4 bytes are missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        (record := Path(folder, "launches.pickle")).write_bytes(pickle.dumps(launches))
        command, env = sanitized(sanitizer) if sanitizer else ([], dict(os.environ))
        short = "" if short_argument is None else str(short_argument)
        return subprocess.run([*command, sys.executable, "-c", REPLAY, str(library), str(record),
                               short], env=env, capture_output=True, text=True,
                              timeout=300)  # fmt: skip


# ---- compiling for GPUs that are not here ---------------------------------------------------


@functools.cache
def nvcc() -> Path | None:
    """The CUDA compiler of the wheels, of ``CUDA_HOME`` or on the path."""
    include = build.cuda_include()
    beside = include.parent / "bin/nvcc" if include else None
    if beside and beside.exists():
        return beside
    found = shutil.which("nvcc")
    return Path(found) if found else None


def compile_cuda(name: str, arch: str) -> tuple[str, dict[str, dict[str, int]], dict[str, list]]:
    """(compiler's version, kernel -> registers, stack, spills, shared memory, kernel -> opcodes).

    The opcodes are those of tensor cores, read from machine code; where nothing disassembles it
    (the wheels of nvcc have no cuobjdump, Triton has one), from PTX, under the same names.
    """
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
    number = arch.removeprefix("sm_")
    tool = disassembler()
    with tempfile.TemporaryDirectory() as folder:

        def compiled(kind: str, *options: str) -> tuple[Path, str]:
            done = subprocess.run(
                [nvcc(), "-O3", "-std=c++17", f"-{kind}", *options, "-Werror", "all-warnings",
                 f"-I{build.COMMON}", "-o", f"{folder}/k.{kind}", build.HERE / name / "cuda.cu"],
                capture_output=True, text=True)  # fmt: skip
            assert done.returncode == 0, f"nvcc {arch}: {done.stderr[-3000:]}"
            # wgmma one after the other, or registers that no warpgroup hands over
            assert not re.search(r"C75\d\d|Potential Performance Loss", done.stderr), done.stderr
            return Path(folder, f"k.{kind}"), done.stderr

        cubin, log = compiled("cubin", f"-gencode=arch=compute_{number},code={arch}",
                              "-Xptxas=-v,--warn-on-spills")  # fmt: skip
        if tool is not None:
            opcodes = opcodes_of(disassembled(cubin, tool), "Function : ", MMA)
        else:
            code = compiled("ptx", f"-arch=compute_{number}")[0].read_text()
            opcodes = opcodes_of(code, ".entry ", PTX_MMA)
    label = "nvcc " + re.search(r"V([\d.]+)", version.stdout)[1]
    return label, ptxas_usage(log), opcodes


MMA = re.compile(r"\b(HGMMA|HMMA|IMMA|QGMMA|IGMMA)\b")  # in machine code
PTX_MMA = re.compile(
    r"\b(?:mma\.sync\.aligned\.\w+\.row\.col\.|wgmma\.mma_async\.sync\.aligned\.\w+\.)"
    r"([fs]32(?=\.\w+\.\w+\.[fs]32\b)|f32\.e4m3|f32\.b?f16|s32\.s8)"
)
IN_PTX = {"f32": "HMMA", "s32": "IMMA", "f32.bf16": "HGMMA", "f32.f16": "HGMMA",
          "f32.e4m3": "QGMMA", "s32.s8": "IGMMA"}  # fmt: skip


def disassembler() -> Path | None:
    """``cuobjdump`` beside nvcc, on the path, or of Triton; the wheels of nvcc have none."""
    beside = nvcc().parent / "cuobjdump" if nvcc() else None
    if beside and beside.exists():
        return beside
    if found := shutil.which("cuobjdump"):
        return Path(found)
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return bundled if bundled and bundled.exists() else None


def disassembled(cubin: Path, tool: Path) -> str:
    """Machine code as text; cuobjdump calls nvdisasm, which stands beside it."""
    env = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run([tool, "-sass", cubin], env=env, capture_output=True, text=True,
                          check=True).stdout  # fmt: skip


def opcodes_of(code: str, mark: str, pattern: re.Pattern) -> dict[str, list[str]]:
    """Kernel -> its tensor core opcodes; ``mark`` stands before each kernel's name."""
    return {re.match(r"\w+", part)[0]: sorted({IN_PTX.get(c, c) for c in pattern.findall(part)})
            for part in code.split(mark)[1:]}  # fmt: skip


def ptxas_usage(log: str) -> dict[str, dict[str, int]]:
    """kernel -> registers, stack, spills, shared memory, from ``ptxas -v``."""
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        kernel = part.split("'")[0]

        def number(pattern, part=part):
            found = re.search(pattern, part)
            return int(found[1]) if found else 0

        usage[kernel] = {
            "registers": number(r"Used (\d+) registers"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "shared": number(r"(\d+) bytes smem"),
        }
    return usage


# shared memory that one block may have
SHARED_LIMIT = {"sm_80": 166912, "sm_90a": 232448}

# ---- the record -----------------------------------------------------------------------------


def check_limits(compiler: str, kernel: str, arch: str, usage: dict[str, dict[str, int]]) -> None:
    """Compare with ``kernel_limits/<kernel>.json``: more of anything fails, and so does less.

    ``KERNEL_LIMITS=record`` writes what it sees.  A compiler that is not in the record fails only
    on spills: its numbers are another compiler's.
    """
    for entry, used in usage.items():
        assert used["spills"] == 0, f"{entry} for {arch} spills {used['spills']} bytes"
        assert used["shared"] <= SHARED_LIMIT[arch], f"{entry} would not launch on {arch}"
    path = LIMITS / f"{kernel}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if os.environ.get("KERNEL_LIMITS") == "record":
        record.setdefault(compiler, {})[arch] = usage
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        return
    known = {name for file in LIMITS.glob("*.json") for name in json.loads(file.read_text())}
    if compiler not in known:
        return
    expected = record.get(compiler, {}).get(arch)
    assert usage == expected, (
        f"{kernel} for {arch} by {compiler} uses {usage}, the record says {expected}; when that is "
        "meant, record it: KERNEL_LIMITS=record pytest tests/test_kernels.py -k compiles"
    )
