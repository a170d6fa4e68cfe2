"""Linear layer in int8: weights per output, activations quantized here, per row; sums in int32.

Source: Yao et al. 2022 (ZeroQuant, token-wise activations), https://arxiv.org/abs/2206.01861
"""

from __future__ import annotations

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect, rows_of

from . import reference

NAME = "w8a8_linear"
_ARGTYPES = (POINTER, LONG, POINTER, POINTER, POINTER, POINTER, LONG, LONG, LONG, INT)


def _check(x, weight, scale, bias=None):
    expect(x.dtype in SUFFIX, f"w8a8_linear takes x in float32, bfloat16 or float16, not {x.dtype}")
    expect(weight.dim() == 2 and weight.dtype == torch.int8, "w8a8_linear needs an int8 weight "
           f"(N, K), not {weight.dtype} {tuple(weight.shape)}; see quantize")  # fmt: skip
    n, k = weight.shape
    expect(x.dim() >= 1 and x.shape[-1] == k, f"w8a8_linear of a weight {(n, k)} needs x (..., "
           f"{k}), not {tuple(x.shape)}")  # fmt: skip
    expect(k <= 131072, f"w8a8_linear adds at most 131072 products in int32, not {k}; split K")
    for name, t in (("scale", scale), ("bias", bias)):
        if t is not None:
            expect(t.shape == (n,) and t.dtype == torch.float32 and t.is_contiguous(),
                   f"w8a8_linear needs a contiguous float32 {name} of shape ({n},), not {t.dtype} "
                   f"{tuple(t.shape)}")  # fmt: skip
            expect(t.device == x.device, f"w8a8_linear needs {name} on {x.device}, not {t.device}")
    expect(weight.is_contiguous(), "w8a8_linear needs a contiguous weight; call .contiguous()")
    expect(weight.device == x.device, f"w8a8_linear needs weight on {x.device}, not "
           f"{weight.device}")  # fmt: skip
    rows_of(x, "x of w8a8_linear")


def _fake(x, weight, scale, bias=None):
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def into_cpu(y, x, weight, scale, bias=None) -> None:
    """Write y (..., N), contiguous."""
    rows, stride = rows_of(x, "x of w8a8_linear")
    n, k = weight.shape
    function = build.cpu_function(NAME, "w8a8_linear_" + SUFFIX[x.dtype], _ARGTYPES)
    function(x.data_ptr(), stride, weight.data_ptr(), scale.data_ptr(),
             None if bias is None else bias.data_ptr(), y.data_ptr(), rows, n, k,
             torch.get_num_threads())  # fmt: skip


def _cpu(x, weight, scale, bias=None):
    y = _fake(x, weight, scale)
    if y.numel():
        into_cpu(y, x, weight, scale, bias)
    return y


def _flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]


_OP = Op(NAME, "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor", check=_check,
         fake=_fake, reference=reference.w8a8_linear, cpu=_cpu,
         triton=False, flops=_flops)  # fmt: skip


def w8a8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
                bias: torch.Tensor | None = None, *,
                impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """y = (int8(x) weight^T) * scale_x * scale + bias, scale_x = max|x| / 127 of each row.

    x       (..., K) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    weight  (N, K) int8, contiguous; ``int8_linear.quantize`` makes it and scale (N,) fp32
    bias    (N,) fp32 or None
    impl    ``reference`` or ``cpu``
    Returns (..., N) in x's dtype; a row that holds a NaN or infinity gives NaN.
    Helps from a few rows on, where arithmetic counts: four products an instruction and lane.
    Costs accuracy where a few channels of x are much larger than the others.
    """
    return _OP(x, weight, scale, bias, impl=impl)


def bytes_moved(rows: int, n: int, k: int, itemsize: int) -> int:
    """Weights, scales and x read once, y written once."""
    return n * k + 4 * n + rows * (k + n) * itemsize
