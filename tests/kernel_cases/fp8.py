"""Linear layers over 8-bit floats."""

import torch
from torch.nn.functional import linear

from tests.kernel_cases import Case, Rival, Speed, bad, random
from tests.kernel_cases.linears import LAYERS, LINEAR, MANY


def _fp8_linear(shape, dtype):
    from kernels.fp8_linear import quantize

    m, n, k = shape
    return [random(m, k, seed=2, dtype=dtype), *quantize(random(n, k)), random(n, seed=3)]


CASES = [
    Case(
        "fp8_linear",
        _fp8_linear,
        [*LINEAR, *MANY],
        large=(6, 700, 130),
        order_changes={"fp32": 8, "bf16": 8, "fp16": 8},
        shim_shapes=((3, 9, 70), (66, 3, 80)),  # by groups of 16 rows, by tiles of 128
        shim_elements=160_000,
        archs=("sm_90a",),
        mma={"sm_90a": "QGMMA"},
        mma_kernels="gemm_kernel-",  # not gemm_kernel[half]-, which multiplies fp16
        cuda_mma="HMMA",  # what ptxas makes of mma.sync in e4m3 on sm_90a, after unpacking to fp16
        on_hopper={"gemm_(bf16|f16)": "QGMMA"},
        hopper_shapes=MANY,
    )
]


def _timed_linear(shape, dtype):
    return [*_fp8_linear(shape, dtype)[:3], None]


def _dequantized(dtype=None):
    """x and the weights as they were, in x's dtype or another."""

    def prepare(x, weight, scale, bias):
        wide = dtype or x.dtype
        return x.to(wide), (weight.float() * scale[:, None]).to(wide)

    return prepare


def _scaled_mm(x, weight, scale):
    """torch's own; x is quantized by torch, in the timed call, and comes out in bf16."""
    step = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-120)
    q = (x * (1 / step)).to(torch.float8_e4m3fn)
    return torch._scaled_mm(q, weight.t(), scale_a=step, scale_b=scale[None],
                            out_dtype=torch.bfloat16)  # fmt: skip


SPEEDS = [
    Speed("fp8_linear", _timed_linear, LAYERS, core=4, eager=Rival(linear, _dequantized()),
          peers={"bf16_linear": Rival(linear, _dequantized(torch.bfloat16)),
                 "scaled_mm": Rival(_scaled_mm, lambda *args: args[:3])},
          weights=True),
]  # fmt: skip

r = random
FP8 = torch.float8_e4m3fn
BAD = [
    bad("fp8_linear", "weight", r"needs a float8_e4m3fn weight \(N, K\), not torch.int8",
        lambda: (r(2, 4), r(3, 4).to(torch.int8), r(3), None)),
    bad("fp8_linear", "format", r"float8_e4m3fn weight \(N, K\), not torch.float8_e5m2",
        lambda: (r(2, 4), r(3, 4).to(torch.float8_e5m2), r(3), None)),
    bad("fp8_linear", "x", r"weight \(3, 4\) needs x \(..., 4\), not \(2, 5\)",
        lambda: (r(2, 5), r(3, 4).to(FP8), r(3), None)),
    bad("fp8_linear", "scale", "needs a contiguous float32 scale of shape",
        lambda: (r(2, 4), r(3, 4).to(FP8), r(3).half(), None)),
    bad("fp8_linear", "bias", "needs a contiguous float32 bias of shape",
        lambda: (r(2, 4), r(3, 4).to(FP8), r(3), r(4))),
    bad("fp8_linear", "strides", r"needs a contiguous weight; call .contiguous\(\)",
        lambda: (r(2, 4), r(3, 8).to(FP8)[:, ::2], r(3), None)),
]  # fmt: skip
