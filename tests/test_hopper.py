"""Hopper's instructions on the host shim: it computes by the descriptor, and finds what is missing.

One tile is multiplied as the kernels do it, with one thing left out or wrong at a time; then so are
the kernels themselves, and the launch that gives them their shared memory.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys

import pytest
import torch

from kernels import build
from kernels.fp8_linear import quantize
from kernels.op import OPS, KernelError
from tests import kernel_tools
from tests.kernel_cases import CASES, excess

SOURCE = """
#include "simt.h"
#include "ring.cuh"

// y (64, 128) = a (64, 64) b^T, b (128, 64) in bf16; then y b, b's first 64 rows, from registers.
__global__ void multiply_once(const bf16* a, const bf16* b, float* y, int defect) {
    DYNAMIC_SHARED(char, dynamic);
    struct Memory {
        SwizzledTile<64, 128> a;
        SwizzledTile<128, 128> b;
        Mbarrier here;
    };
    Memory& memory = *reinterpret_cast<Memory*>(swizzled_memory(dynamic) + 128 * (defect == 1));
    if (threadIdx.x == 0 && defect != 2) set_up(memory.here, 128 + (defect == 3));
    __syncthreads();
    const auto fill = [&](auto& tile, const bf16* from) {
        tile.each_chunk([&](char* to, int row, int byte) {
            if (defect == 4) to += byte - (byte / 16 ^ row % 8) * 16;  // as it comes
            copy_async(to, from + row * 64 + byte / 2, true);
        });
    };
    fill(memory.a, a);
    fill(memory.b, b);
    commit_copies();
    if (defect != 5) wait_copies<0>();
    if (defect != 6) fence_async_proxy();
    arrive(memory.here);
    wait_until(memory.here, 0);
    float d[64];
    if (defect != 7) fence(d);
    for (int byte = 0; byte < 128; byte += 32)
        wgmma(d, memory.a.rows(0, byte),
              memory.b.rows(defect == 8 && threadIdx.x == 40 ? 8 : 0, byte), byte > 0, bf16());
    if (defect != 9) commit();
    if (defect == 10) put(memory.a.at[0], Pack<unsigned>{}), fence_async_proxy();
    if (defect == 11) d[5] = 0.f;
    if (defect != 12) wait_for<0>(d);
    unsigned weights[4][4];
    for (int i = 0; i < 16; ++i) weights[i / 4][i % 4] = pack(d[2 * i], d[2 * i + 1], bf16());
    float out[32] = {};
    fence(out, weights);
    for (int step = 0; step < 4; ++step)
        wgmma(out, weights[step], memory.b.columns(step * 16), bf16());
    commit();
    if (defect == 13) weights[1][2] = 0;
    wait_for<0>(out, weights);
    for (int i = 0; i < 64; ++i) y[row_of(i) * 128 + column_of(i)] = d[i];
    for (int i = 0; i < 32; ++i) y[64 * 128 + row_of(i) * 64 + column_of(i)] = out[i];
}
SIMT_ENTRY(multiply_once)
"""
CALL = """
import ctypes, sys, torch
random = torch.Generator().manual_seed(0)
a, b = (torch.randn(n, 64, generator=random).bfloat16() for n in (64, 128))
y = torch.zeros(64 * (128 + 64))
values = [*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, y)), ctypes.c_int(int(sys.argv[2]))]
pointers = (ctypes.c_void_p * 4)(*map(ctypes.addressof, values))
ctypes.CDLL(sys.argv[1]).host_multiply_once((ctypes.c_uint * 6)(1, 1, 1, 128, 1, 1),
                                      ctypes.c_size_t(1024 + 3 * 8192 + 256), pointers)
scores, out = y[: 64 * 128].view(64, 128), y[64 * 128 :].view(64, 64)
exact = a.double() @ b.double().T
assert torch.allclose(scores.double(), exact, rtol=0, atol=2**-18 * exact.abs().max()), "scores"
exact = scores[:, :64].bfloat16().double() @ b[:64].double()
assert torch.allclose(out.double(), exact, rtol=0, atol=2**-18 * exact.abs().max()), "out"
"""
DEFECTS = {
    "nothing": "",
    "a tile between two patterns": "starts between its patterns",
    "no set-up of a barrier": "nobody has set up",
    "an arrival too few": "never reach",
    "no swizzle": "scores",
    "no wait for copies": "no fence.proxy.async|scores",
    "no fence of the async proxy": "no fence.proxy.async",
    "no fence of registers": "without a fence",
    "another tile in one thread": "different tiles",
    "no commit": "out",
    "a tile written under way": "shared memory was written",
    "accumulators written under way": "accumulators were written",
    "no wait": "scores|registers|without a fence|out",
    "registers of a written under way": "registers of a",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if reason := kernel_tools.lacks_shim():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("hopper") / "planted.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w", kernel_tools.HOPPER,
               f"-I{build.COMMON}", f"-isystem{build.cuda_include()}"]  # fmt: skip
    subprocess.run([*build.compiler(), "-xc++", "-", *options, "-o", path], input=SOURCE, text=True,
                   check=True)  # fmt: skip
    return path


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_product_needs_all_its_parts(defect, library):
    number = str(list(DEFECTS).index(defect))
    done = subprocess.run([sys.executable, "-c", CALL, library, number], capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    if defect == "nothing":
        assert done.returncode == 0, done.stderr[-2000:]
        return
    assert done.returncode != 0
    assert any(word in done.stderr for word in DEFECTS[defect].split("|")), done.stderr[-2000:]


# operation, shape, header, what stands there, what is planted
PLANTED = [
    pytest.param("w8a8_linear", (130, 129, 272), "wgmma.cuh",
                 "(chunk % 8 ^ row % 8)", "(chunk % 8)", id="no-swizzle"),
    pytest.param("w8a8_linear", (130, 129, 900), "bytes_wgmma.cuh",
                 "wait_for<1>();\n                    memory.ring.hand_back(before);",
                 "memory.ring.hand_back(at);", id="handed-back-too-early"),
    pytest.param("fp8_linear", (130, 129, 272), "ring.cuh", "        fence_async_proxy();\n", "",
                 id="no-proxy-fence"),
    pytest.param("fp8_linear", (130, 129, 272), "bytes_wgmma.cuh", "memory.ring.await(at);\n", "\n",
                 id="not-awaited"),
    pytest.param("flash_attention", (1, 2, 1, 129, 641, 64, 2), "flash_wgmma.cuh",
                 "        memory.ring.await(at);\n        fence(out, weights);",
                 "        fence(out, weights);", id="values-not-awaited"),
    pytest.param("flash_attention", (1, 2, 1, 129, 641, 64, 2), "flash_wgmma.cuh",
                 "wait_for<1>(score)", "wait_for<2>(score)", id="scores-not-waited-for"),
]  # fmt: skip


def plant(folder, monkeypatch, header, there, planted):
    """From now on kernels include headers of which one is broken."""
    shutil.copytree(build.COMMON, folder / "common")
    text = (folder / "common" / header).read_text()
    assert there in text
    (folder / "common" / header).write_text(text.replace(there, planted))
    monkeypatch.setattr(build, "COMMON", folder / "common")


@pytest.mark.slow
@pytest.mark.parametrize(("op", "shape", "header", "there", "planted"), PLANTED)
def test_a_defect_in_a_kernel_is_found(op, shape, header, there, planted, tmp_path, monkeypatch):
    if reason := kernel_tools.lacks_shim():
        pytest.skip(reason)
    launches: list = []
    args = CASES[op].make(shape, torch.bfloat16)
    with kernel_tools.host_shim(monkeypatch, launches, kernel_tools.HOPPER):
        y = OPS[op].functions["cuda"](*args)
    assert excess(CASES[op], y, args) <= 1
    whole = kernel_tools.replay(kernel_tools.build_shim(op, kernel_tools.HOPPER), launches[-1:])
    assert whole.returncode == 0, whole.stderr[-2000:]
    plant(tmp_path, monkeypatch, header, there, planted)
    broken = kernel_tools.build_shim(op, kernel_tools.HOPPER)
    done = kernel_tools.replay(broken, launches[-1:])
    assert done.returncode != 0
    assert "simt: " in done.stderr or "another result" in done.stderr


@pytest.mark.slow
def test_e4m3_needs_its_partial_sums_in_fp32(tmp_path, monkeypatch):
    """Where tensor cores add up a whole row, small terms are lost: the model loses them too."""
    if reason := kernel_tools.lacks_shim():
        pytest.skip(reason)
    case = CASES["fp8_linear"]
    x = torch.ones(66, 4096).half()
    x[:, 1::2] = 1 / 64
    args = [x, *quantize(torch.ones(3, 4096)), None]

    def share_of_budget():
        with kernel_tools.host_shim(monkeypatch, None, kernel_tools.HOPPER):
            return excess(case, OPS["fp8_linear"].functions["cuda"](*args), args)

    assert share_of_budget() <= 1
    plant(tmp_path, monkeypatch, "bytes_wgmma.cuh", "F::PROMOTES", "(F::PROMOTES && false)")
    assert share_of_budget() > 1


# ---- the launch ------------------------------------------------------------------------------


class Kernel:
    handle = "handle"


@pytest.fixture
def asked(monkeypatch):
    """What ``build.launch`` asks of the driver, which is not here."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    core = pytest.importorskip("cuda.core", reason="needs cuda-core")
    asked = []
    success = driver.CUresult.CUDA_SUCCESS

    def set_attribute(attribute, size, kernel, device):
        asked.append((attribute.name.removeprefix("CU_FUNC_ATTRIBUTE_"), size, kernel, device))
        return (success if size < 240_000 else driver.CUresult.CUDA_ERROR_INVALID_VALUE,)

    monkeypatch.setattr(driver, "cuDeviceGet", lambda ordinal: (success, f"device {ordinal}"))
    monkeypatch.setattr(driver, "cuKernelSetAttribute", set_attribute)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(core, "LaunchConfig", lambda **config: config)
    monkeypatch.setattr(core, "launch", lambda *args: asked.append(args[1]["shmem_size"]))
    build._allow_shared.cache_clear()
    yield asked
    build._allow_shared.cache_clear()


def test_a_launch_asks_once_for_more_shared_memory_than_every_kernel_has(asked):
    kernel = Kernel()
    build.launch(kernel, 1, 128, shared=48 << 10)
    assert asked == [48 << 10]
    build.launch(kernel, 1, 384, ctypes.c_int(1), shared=197_760)
    build.launch(kernel, 1, 384, ctypes.c_int(1), shared=197_760)
    grant = ("MAX_DYNAMIC_SHARED_SIZE_BYTES", 197_760, "handle", "device 3")
    assert asked[1:] == [grant, 197_760, 197_760]


def test_more_shared_memory_than_there_is_is_one_sentence(asked):
    with pytest.raises(KernelError, match=r"240000 bytes .* refused \(CUDA_ERROR_INVALID_VALUE\)"):
        build.launch(Kernel(), 1, 384, shared=240_000)
