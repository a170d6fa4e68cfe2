"""Linear layers with quantized weights."""

import torch

from tests.kernel_cases import Case, bad, random

# rows, outputs, inputs: odd everywhere, one of each, none of each, more rows than any tile
LINEAR = [(5, 19, 97), (1, 64, 128), (3, 1, 130), (2, 3, 1), (0, 4, 8), (2, 0, 8), (3, 5, 0),
          (67, 33, 70)]  # fmt: skip


def _int8_linear(shape, dtype):
    from kernels.int8_linear import quantize

    m, n, k = shape
    if k == 0:
        weight, scale = torch.empty(n, 0, dtype=torch.int8), torch.ones(n)
    else:
        weight, scale = quantize(random(n, k))
    return [random(m, k, seed=2, dtype=dtype), weight, scale, random(n, seed=3)]


CASES = [
    Case(
        "int8_linear",
        _int8_linear,
        LINEAR,
        large=(6, 700, 130),
        shim_shapes=((3, 5, 70),),
        mma={"sm_80": "HMMA", "sm_90a": "HGMMA"},
        uses="",
    ),
    Case("w8a8_linear", _int8_linear, LINEAR, large=(6, 700, 130)),
]

r = random
BAD = [
    bad("int8_linear", "weight", r"needs an int8 weight \(N, K\), not torch.float32",
        lambda: (r(2, 4), r(3, 4), r(3), None)),
    bad("int8_linear", "x", r"weight \(3, 4\) needs x \(..., 4\), not \(2, 5\)",
        lambda: (r(2, 5), r(3, 4).to(torch.int8), r(3), None)),
    bad("int8_linear", "scale", "needs a contiguous float32 scale of shape",
        lambda: (r(2, 4), r(3, 4).to(torch.int8), r(4), None)),
    bad("int8_linear", "bias", "needs a contiguous float32 bias of shape",
        lambda: (r(2, 4), r(3, 4).to(torch.int8), r(3), r(3).half())),
    bad("w8a8_linear", "x", r"weight \(3, 4\) needs x \(..., 4\), not \(2, 5\)",
        lambda: (r(2, 5), r(3, 4).to(torch.int8), r(3), None)),
]  # fmt: skip
