"""What the linear layers over packed weights share: checks of arguments, shapes, FLOPs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch

from . import build
from .build import SUFFIX
from .op import expect, rows_of


def expect_linear(name: str, x: torch.Tensor, n: int, k: int, weights: dict[str, torch.Tensor],
                  vectors: dict[str, torch.Tensor | None]) -> None:  # fmt: skip
    """Refuse, for a layer of K inputs and N outputs, what no implementation takes.

    x        (..., K) in fp32, bf16 or fp16, with evenly spaced dense rows
    weights  contiguous, on x's device; their own shapes and dtypes are the caller's to check
    vectors  contiguous fp32 (N,) on x's device, or None
    Raises ``KernelError`` naming the argument and the remedy.
    """
    expect(x.dtype in SUFFIX, f"{name} takes x in float32, bfloat16 or float16, not {x.dtype}")
    expect(x.dim() >= 1 and x.shape[-1] == k, f"{name} of a weight {(n, k)} needs x (..., {k}), "
           f"not {tuple(x.shape)}")  # fmt: skip
    for what, t in vectors.items():
        if t is not None:
            expect(t.shape == (n,) and t.dtype == torch.float32 and t.is_contiguous(),
                   f"{name} needs a contiguous float32 {what} of shape ({n},), not {t.dtype} "
                   f"{tuple(t.shape)}")  # fmt: skip
            expect(t.device == x.device, f"{name} needs {what} on {x.device}, not {t.device}")
    for what, t in weights.items():
        expect(t.is_contiguous(), f"{name} needs a contiguous {what}; call .contiguous()")
        expect(t.device == x.device, f"{name} needs {what} on {x.device}, not {t.device}")
    rows_of(x, f"x of {name}")


def int8_checks(name: str) -> Callable:
    """``check(x, weight, scale, bias)`` of a layer over int8 weights (N, K), a scale an output."""

    def check(x, weight, scale, bias=None):
        expect(weight.dim() == 2 and weight.dtype == torch.int8, f"{name} needs an int8 weight "
               f"(N, K), not {weight.dtype} {tuple(weight.shape)}; see quantize")  # fmt: skip
        n, k = weight.shape
        expect_linear(name, x, n, k, {"weight": weight}, {"scale": scale, "bias": bias})

    return check


def fp8_checks(name: str) -> Callable:
    """``check(x, weight, scale, bias)`` of a layer over e4m3 weights (N, K), a scale an output."""

    def check(x, weight, scale, bias=None):
        expect(weight.dim() == 2 and weight.dtype == torch.float8_e4m3fn, f"{name} needs a "
               f"float8_e4m3fn weight (N, K), not {weight.dtype} {tuple(weight.shape)}; see "
               "quantize")  # fmt: skip
        n, k = weight.shape
        expect_linear(name, x, n, k, {"weight": weight}, {"scale": scale, "bias": bias})

    return check


def int4_checks(name: str) -> Callable:
    """``check(x, packed, scale, outputs, bias)`` of a layer over ``int4_linear.quantize``'s."""

    def check(x, packed, scale, outputs, bias=None):
        expect(packed.dim() == 3 and packed.shape[2] == 16 and packed.dtype == torch.int32,
               f"{name} needs packed (N / 16, K / 8, 16) int32, not {packed.dtype} "
               f"{tuple(packed.shape)}; see quantize")  # fmt: skip
        blocks, octets, _ = packed.shape
        group = group_of(packed, scale) if scale.dim() == 3 else 0
        expect(scale.dtype == torch.bfloat16 and group in (32, 128) and octets * 8 % group == 0
               and scale.shape == (blocks, octets * 8 // group, 16),
               f"{name} needs scale ({blocks}, {octets * 8} / group, 16) bfloat16 of groups of 32 "
               f"or 128, not {scale.dtype} {tuple(scale.shape)}; see quantize")  # fmt: skip
        fewest = max(0, 16 * blocks - 15)
        expect(fewest <= outputs <= 16 * blocks, f"{name} of {blocks} blocks of 16 outputs has "
               f"{fewest} to {16 * blocks} outputs, not {outputs}")  # fmt: skip
        expect_linear(name, x, outputs, octets * 8, {"packed": packed, "scale": scale},
                      {"bias": bias})  # fmt: skip

    return check


def expect_aligned(name: str, **tensors: torch.Tensor) -> None:
    """Refuse tensors that CUDA kernels read 16 bytes at a time and that start between two such."""
    for what, t in tensors.items():
        expect(t.data_ptr() % 16 == 0, f"impl='cuda' of {name} needs {what} to start at a multiple "
               f"of 16 bytes; call .clone() on it, or take impl='triton'")  # fmt: skip


def group_of(packed: torch.Tensor, scale: torch.Tensor) -> int:
    """The inputs that share a scale, of ``int4_linear.quantize``'s tensors; 32 without inputs."""
    return packed.shape[1] * 8 // scale.shape[1] if scale.shape[1] else 32


def empty_output(x: torch.Tensor, n: int) -> torch.Tensor:
    """y (..., N) for x (..., K), contiguous, in its dtype."""
    return torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)


def allocating(into: Callable, fake: Callable) -> Callable:
    """``implementation(*args)`` that runs ``into(y, *args)`` on an output it makes by ``fake``."""

    def implementation(*args):
        y = fake(*args)
        if y.numel():
            into(y, *args)
        return y

    return implementation


HOPPER_STEP = 128  # inputs that a step of ``hopper_gemm`` takes
# bytes of shared memory of its tiles, their barriers, and up to where tiles may start
HOPPER_SHARED = 6 * (128 + 128) * HOPPER_STEP + 128 + 1024


def hopper_tiles(rows: int, n: int, device: int) -> tuple[int, int]:
    """(blocks, outputs of a tile) of ``common/bytes_wgmma.cuh`` for y (rows, N).

    Tiles of 128 rows by 256 outputs read the least; where they are fewer than the multiprocessors,
    tiles of 128 outputs.
    """
    down, most = -(-rows // 128), build.multiprocessors(device)
    outputs = 256 if down * -(-n // 256) >= most else 128
    return min(most, down * -(-n // outputs)), outputs


def launch_bytes(name: str, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
                 scale: torch.Tensor, bias: torch.Tensor | None, few_rows: int,
                 wgmma: bool) -> None:  # fmt: skip
    """Write y (..., N) = (bytes(x) weight^T) * scale_x * scale + bias: quantize x, then multiply.

    The kernels are ``<name>_quantize``, ``_few`` (up to ``few_rows`` rows: weights are read once
    per 16 of them, 8 outputs at a time) and ``_gemm`` of ``kernels/<name>/cuda.cu``; ``wgmma``
    says that the last is that of Hopper.
    """
    (rows, stride), (n, k) = rows_of(x, f"x of {name}"), weight.shape
    few, suffix, device = rows <= few_rows, SUFFIX[x.dtype], x.device.index or 0
    wgmma = wgmma and not few
    step = HOPPER_STEP if wgmma else 64  # rows of bytes are filled up to whole ones
    padded = -(-k // step) * step
    q = torch.empty(rows, padded, dtype=torch.int8, device=x.device)
    scale_x = torch.empty(rows, dtype=torch.float32, device=x.device)
    quantize = build.cuda_kernel(name, f"{name}_quantize_{suffix}", device)
    build.launch(quantize, rows, 256, x, q, scale_x, ctypes.c_int64(stride), ctypes.c_int(k),
                 ctypes.c_int(padded))  # fmt: skip
    packs = k % 16 == 0 and weight.data_ptr() % 16 == 0  # rows of weights start at 16 bytes
    args = [q, scale_x, weight, scale, ctypes.c_void_p(0) if bias is None else bias, y,
            *map(ctypes.c_int, (rows, n, k, padded, packs))]  # fmt: skip
    kernel = build.cuda_kernel(name, f"{name}_{'few' if few else 'gemm'}_{suffix}", device)
    if few:
        build.launch(kernel, (-(-n // 8), -(-rows // 16)), 128, *args)
    elif wgmma:
        blocks, outputs = hopper_tiles(rows, n, device)
        build.launch(kernel, blocks, 384, *args, ctypes.c_int(outputs), shared=HOPPER_SHARED)
    else:
        build.launch(kernel, (-(-n // 128), -(-rows // 128)), 256, *args, ctypes.c_int(128))


def linear_flops(x_shape, *_, out_shape=None, **__) -> int:
    """2 M N K of x (..., K) and an output (..., N)."""
    return 2 * math.prod(x_shape) * out_shape[-1]
