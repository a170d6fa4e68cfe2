"""Builds kernels when they are first called, and keeps them in the user's cache folder.

CPU C++: g++ (or ``$CXX``) for the best instruction set of this processor, loaded through ctypes.
CUDA C++: NVRTC through cuda-core, which needs neither nvcc nor a driver to compile.
A cached file's name is a hash of everything that went into it.

``KERNELS_ISA`` (or ``with isa("avx2")``) masks instruction sets; ``KERNELS_CACHE`` moves the cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch  # before any library of ours: the process must hold one OpenMP runtime, torch's

from impl.machine import cpu_flags

from .op import KernelError, expect

HERE = Path(__file__).resolve().parent
COMMON = HERE / "common"
TORCH_HOME = Path(torch.__file__).resolve().parent

# best first: name -> what the processor must have, compiler flags.  Never -march=native: a cached
# library would fault elsewhere.
ISA_LEVELS = {
    "avx512_bf16": ({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
                    ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"]),
    "avx512_vnni": ({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
                    ["-march=x86-64-v4", "-mavx512vnni"]),
    "avx2": ({"avx2", "fma", "f16c", "bmi2", "movbe"}, ["-march=x86-64-v3"]),
    "plain": (set(), ["-march=x86-64-v2"]),
}  # fmt: skip
# no -ffast-math: g++ before 13 then flushes denormals in the whole process.  No contraction: fused
# multiply-adds stand where the source says `fma`, so a result has the same bits wherever its code
# is inlined.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]  # of GCC's own AVX-512 header


def cache_folder() -> Path:
    """Where built kernels are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("KERNELS_CACHE") or Path(home) / "inference-optimization-study")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _best_isa() -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        return "plain"
    flags, torch_level = cpu_flags(), torch.backends.cpu.get_cpu_capability()
    for name, (needed, _) in ISA_LEVELS.items():
        if needed <= flags and (name[:6] != "avx512" or torch_level.startswith("AVX512")):
            return name
    return "plain"


def _checked(name: str) -> str:
    levels = list(ISA_LEVELS)
    expect(name in levels, f"unknown instruction set {name!r}; known: {', '.join(levels)}")
    expect(levels.index(name) >= levels.index(_best_isa()),
           f"this processor has no {name}; its best is {_best_isa()}")  # fmt: skip
    return name


_isa: str | None = None


def current_isa() -> str:
    """The instruction set that CPU kernels are built for and run with now."""
    global _isa
    if _isa is None:
        _isa = _checked(os.environ.get("KERNELS_ISA") or _best_isa())
    return _isa


def isas() -> list[str]:
    """Every level that this processor can run, best first."""
    levels = list(ISA_LEVELS)
    return levels[levels.index(_best_isa()) :]


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Run CPU kernels with instruction set ``name``, as if the processor had no better."""
    global _isa
    before, _isa = current_isa(), _checked(name)
    let_go_of_addresses()
    try:
        yield
    finally:
        _isa = before
        let_go_of_addresses()


ON_CHANGE: list[Callable[[], None]] = []  # called when addresses of CPU kernels are out of date


def let_go_of_addresses() -> None:
    """Tell who keeps addresses of CPU kernels to ask for them again."""
    for forget in ON_CHANGE:
        forget()


@functools.cache
def compiler() -> tuple[str, ...] | None:
    """The C++ compiler's command (``$CXX``, else g++), or None."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    return tuple(command) if shutil.which(command[0]) else None


def lacks_compiler() -> str | None:
    """Why CPU kernels cannot be built, or None."""
    if compiler() is not None:
        return None
    return "impl='cpu' needs a C++ compiler; install g++ or set CXX, or take impl='reference'"


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([*(compiler() or ()), "--version"], capture_output=True, text=True).stdout


def _headers(*suffixes: str) -> bytes:
    return b"".join(p.name.encode() + p.read_bytes() for p in sorted(COMMON.iterdir())
                    if p.suffix in (suffixes or (".h", ".cuh")))  # fmt: skip


def _cached(stem: str, suffix: str, *parts: str | bytes) -> Path:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return cache_folder() / f"{stem}-{digest.hexdigest()[:20]}{suffix}"


@contextlib.contextmanager
def _builds(*paths: Path) -> Iterator[bool]:
    """Whether these files are to be built: by one process at a time, for all who wait meanwhile."""
    if all(path.exists() for path in paths):
        yield False
        return
    with paths[0].with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not all(path.exists() for path in paths)


@functools.cache
def _library(name: str, level: str) -> ctypes.CDLL:
    lacks = lacks_compiler()
    expect(lacks is None, f"{name}: {lacks}")
    source = HERE / name / "cpu.cpp"
    march = ISA_LEVELS[level][1] if platform.machine() in ("x86_64", "AMD64") else []
    flags = [*FLAGS, *march, f"-I{COMMON}"]
    return _shared(f"{name}-{level}", source, flags)


def _shared(stem: str, source: Path, flags: list[str], *parts: str | bytes) -> ctypes.CDLL:
    """The library of one C++ file, from the cache or built; ``parts`` are what it includes."""
    path = _cached(stem, ".so", source.read_bytes(), *(parts or (_headers(),)), " ".join(flags),
                   _compiler_version())  # fmt: skip
    with _builds(path) as due:
        if due:
            _compile(stem, source, flags, path)
    return ctypes.CDLL(str(path))


def _compile(stem: str, source: Path, flags: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = compiler() or ()
        done = subprocess.run([*command, str(source), *flags, "-o", str(built)],
                              capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            raise KernelError(
                f"{stem}: {' '.join(command)} failed on {source.name}; take "
                f"impl='reference'. The compiler said:\n{done.stderr[-2000:]}"
            )
        built.replace(path)


@functools.cache
def call_library(name: str) -> ctypes.CDLL | None:
    """``kernels/<name>/call.cpp``: the operation as torch's dispatcher calls it.

    None where there is no such file, or no torch to build it against (its headers are missing).
    """
    source, torch_home = HERE / name / "call.cpp", TORCH_HOME
    if not source.exists() or not (torch_home / "include/torch/csrc/stable/c/shim.h").exists():
        return None
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{COMMON}",
             f"-I{torch_home}/include", f"-L{torch_home}/lib", "-ltorch_cpu"]  # fmt: skip
    return _shared(f"{name}-call", source, flags, _headers(".hpp"), torch.__version__)


def build_all(levels: Sequence[str] = ()) -> dict[str, str]:
    """Build all CPU kernels for these levels, else ``current_isa()``, a core each.

    name -> why it failed.
    """

    def attempt(what: tuple[str, str]) -> str | None:
        try:
            _library(*what)
            call_library(what[0])
        except KernelError as error:
            return str(error)
        return None

    sources = HERE.glob("*/cpu.cpp")
    longest_first = sorted(sources, key=lambda source: source.stat().st_size, reverse=True)
    names = [source.parent.name for source in longest_first]
    wanted = [(name, level) for name in names for level in levels or (current_isa(),)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        found = zip(wanted, workers.map(attempt, wanted), strict=True)
        return {name: why for (name, _), why in found if why is not None}


def cpu_address(name: str, symbol: str) -> int | None:
    """Where the C function ``symbol`` of ``kernels/<name>/cpu.cpp`` is, for ``current_isa()``."""
    function = getattr(_library(name, current_isa()), symbol)
    return ctypes.cast(function, ctypes.c_void_p).value


@functools.cache
def _function(name: str, symbol: str, argtypes: tuple, level: str, result=None):
    function = getattr(_library(name, level), symbol)
    function.argtypes, function.restype = argtypes, result
    return function


def cpu_function(name: str, symbol: str, argtypes: tuple, result=None):
    """The C function ``symbol`` of ``kernels/<name>/cpu.cpp``, built for ``current_isa()``."""
    return _function(name, symbol, argtypes, _isa or current_isa(), result)


SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# ---- CUDA -----------------------------------------------------------------------------------


def lacks_nvrtc(impl: str) -> str | None:
    """Why a CUDA implementation cannot be built, or None (Triton brings its own compiler)."""
    if impl == "triton":
        missing = None if importlib.util.find_spec("triton") else "the package triton"
    elif importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.core"):
        missing = None if cuda_include() else "CUDA's headers (nvidia-cuda-runtime, or CUDA_HOME)"
    else:
        missing = "the package cuda-core (the extra [gpu])"
    return (
        f"impl={impl!r} needs {missing}; install it, or take impl='reference'" if missing else None
    )


@functools.cache
def cuda_include() -> Path | None:
    """The folder of CUDA's own headers with ``nv/target``: a wheel's, else a toolkit's."""
    found = []
    for package in ("nvidia.cu13", "nvidia.cuda_runtime"):
        with contextlib.suppress(ModuleNotFoundError):
            spec = importlib.util.find_spec(package)
            found += (
                [Path(p) / "include" for p in spec.submodule_search_locations or ()] if spec else []
            )
    found.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include")
    return next((p for p in found if (p / "cuda_bf16.h").exists() and (p / "nv").exists()), None)


@functools.cache
def cubin(name: str, arch: str) -> tuple[Path, str]:
    """``kernels/<name>/cuda.cu`` compiled by NVRTC for ``arch`` (``sm_90a``): file and its log."""
    lacks = lacks_nvrtc("cuda")
    expect(lacks is None, f"{name}: {lacks}")
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    source = HERE / name / "cuda.cu"
    options = {"arch": arch, "std": "c++17", "ptxas_options": ["-v"],
               "include_path": [str(cuda_include()), str(COMMON)]}  # fmt: skip
    version = nvrtc.nvrtcVersion()
    path = _cached(f"{name}-{arch}", ".cubin", source.read_bytes(), _headers(), repr(options),
                   repr(version))  # fmt: skip
    log_path = path.with_suffix(".log")
    with _builds(path, log_path) as due:
        if due:
            from io import StringIO

            log = StringIO()
            program = Program(source.read_text(), "c++", ProgramOptions(**options))
            code = program.compile("cubin", logs=log).code
            log_path.write_text(log.getvalue())
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(code)
            part.replace(path)
    return path, log_path.read_text()


@functools.cache
def cuda_kernel(name: str, symbol: str, device: int):
    """The kernel ``symbol`` of ``kernels/<name>/cuda.cu`` for this CUDA device."""
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(str(cubin(name, cuda_arch(device))[0])).get_kernel(symbol)


@functools.cache
def cuda_arch(device: int) -> str:
    """What kernels are compiled for on this CUDA device: ``sm_90a``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def has_wgmma(device: int) -> bool:
    """Whether kernels on this CUDA device use Hopper's own instructions (common/wgmma.cuh)."""
    return cuda_arch(device) == "sm_90a"


@functools.cache
def multiprocessors(device: int) -> int:
    """How many there are: blocks that take one each run all at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


SHARED_UNASKED = 48 << 10  # bytes of dynamic shared memory that every kernel may have


@functools.cache
def _allow_shared(kernel, size: int, device: int) -> None:
    """Let ``kernel`` have ``size`` bytes of dynamic shared memory on this CUDA device, for good."""
    from cuda.bindings import driver

    def checked(code, *found):
        if code != driver.CUresult.CUDA_SUCCESS:
            raise KernelError(f"{size} bytes of shared memory are refused ({code.name}); take "
                              "impl='triton'")  # fmt: skip
        return found

    (handle,) = checked(*driver.cuDeviceGet(device))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(*driver.cuKernelSetAttribute(attribute, size, kernel.handle, handle))


def launch(kernel, grid, block: int, *args, shared: int = 0) -> None:
    """Launch on torch's current stream; tensors are passed by address, scalars must be typed.

    A bare Python int or float is refused: cuda-core would pack it as 8 bytes, and a kernel's
    ``float`` or ``int`` parameter would read the wrong ones.  Use ``ctypes.c_int`` and ``c_float``.
    """
    from cuda.core import LaunchConfig
    from cuda.core import launch as cuda_launch

    if shared > SHARED_UNASKED:
        _allow_shared(kernel, shared, torch.cuda.current_device())
    cuda_launch(torch.cuda.current_stream(), LaunchConfig(grid=grid, block=block,
                shmem_size=shared), kernel, *typed(args))  # fmt: skip


def typed(args: tuple) -> list:
    """Kernel arguments with tensors replaced by addresses; bare numbers are an error."""
    for arg in args:
        if isinstance(arg, (bool, int, float)):
            raise TypeError(f"kernel argument {arg!r} has no C type; wrap it in ctypes.c_int or "
                            "ctypes.c_float")  # fmt: skip
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
