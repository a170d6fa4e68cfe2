"""CUDA kernels on the CPU: the shim itself."""

import ctypes
import subprocess
import sys

import pytest

from kernels import build
from tests import kernel_tools

SOURCE = """
#include "simt.h"
__global__ void sums(const int* from, int* to) {  // of each warp, then of the block
    __shared__ int parts[8];
    int v = from[threadIdx.x];
    for (int bits = 16; bits; bits /= 2) v += __shfl_xor_sync(0xffffffffu, v, bits);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x >= 8) return;
    to[8 * blockIdx.x + threadIdx.x] = parts[threadIdx.x] + blockIdx.x;
}
__global__ void stuck(int) {
    if (threadIdx.x == 0) __syncwarp();
    else __syncthreads();
}
SIMT_ENTRY(sums)
SIMT_ENTRY(stuck)
"""
CALL = """
import ctypes, sys
argument = ctypes.c_int(0)
ctypes.CDLL(sys.argv[1]).host_stuck((ctypes.c_uint * 6)(1, 1, 1, 64, 1, 1), ctypes.c_size_t(0),
                                    (ctypes.c_void_p * 1)(ctypes.addressof(argument)))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if reason := kernel_tools.lacks_shim():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("shim") / "planted.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-I{build.COMMON}"]
    command = [*build.compiler(), "-xc++", "-", *options, f"-isystem{build.cuda_include()}"]
    command += ["-o", path]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    return path


def test_warps_and_blocks_meet_at_their_barriers(library):
    given, found = (ctypes.c_int * 256)(*range(256)), (ctypes.c_int * 24)()
    args = [ctypes.c_void_p(ctypes.addressof(a)) for a in (given, found)]
    addresses = (ctypes.c_void_p * 2)(*map(ctypes.addressof, args))
    dims = (ctypes.c_uint * 6)(3, 1, 1, 256, 1, 1)
    ctypes.CDLL(str(library)).host_sums(dims, ctypes.c_size_t(0), addresses)
    warps = [sum(range(32 * w, 32 * w + 32)) for w in range(8)]
    assert list(found) == [warp + block for block in range(3) for warp in warps]


def test_a_barrier_that_some_threads_never_reach_is_a_sentence(library):
    done = subprocess.run([sys.executable, "-c", CALL, library], capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert done.returncode == 70
    assert "never reach" in done.stderr
