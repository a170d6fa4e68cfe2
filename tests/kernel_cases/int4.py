"""Linear layers with weights of four bits."""

import torch

from tests.kernel_cases import Case, bad, random

# rows, outputs, inputs: whole groups of 32 or 128, one of each, none of each, more rows than a tile
LINEAR = [(5, 19, 96), (1, 64, 128), (3, 1, 160), (2, 100, 32), (0, 4, 32), (2, 0, 32), (3, 5, 0),
          (67, 33, 64), (12, 50, 256)]  # fmt: skip


def _int4_linear(shape, dtype):
    from kernels.int4_linear import quantize

    m, n, k = shape
    packed, scale = quantize(random(n, k), 128 if k % 128 == 0 and k else 32)
    return [random(m, k, seed=2, dtype=dtype), packed, scale, n, random(n, seed=3)]


CASES = [
    Case(
        "int4_linear",
        _int4_linear,
        LINEAR,
        large=(6, 700, 128),
        shim_shapes=((3, 19, 96),),
        mma={"sm_80": "HMMA", "sm_90a": "HGMMA"},
    ),
    Case("int4_a8_linear", _int4_linear, LINEAR, large=(6, 700, 128)),
]

r = random


def _good():
    return _int4_linear((2, 20, 64), torch.float32)


def _with(**changes):
    names = ("x", "packed", "scale", "outputs", "bias")
    return lambda: tuple(changes[n](v) if n in changes else v
                         for n, v in zip(names, _good(), strict=True))  # fmt: skip


BAD = [
    bad(op, name, sentence, args)
    for op in ("int4_linear", "int4_a8_linear")
    for name, sentence, args in (
        ("dtype", "not torch.float64", _with(x=lambda t: t.double())),
        ("x", r"weight \(20, 64\) needs x \(..., 64\), not \(2, 60\)",
         _with(x=lambda t: t[:, :60])),
        ("packed", r"needs packed \(N / 16, K / 8, 16\) int32, not torch.int64",
         _with(packed=lambda t: t.long())),
        ("scale", r"needs scale \(2, 64 / group, 16\) bfloat16 of groups of 32 or 128, not "
         "torch.float32", _with(scale=lambda t: t.float())),
        ("group", "of groups of 32 or 128", _with(scale=lambda t: t[:, :1].contiguous())),
        ("blocks", "of groups of 32 or 128", _with(scale=lambda t: t[:1])),
        ("outputs", "of 2 blocks of 16 outputs has 17 to 32 outputs, not 40",
         _with(outputs=lambda n: 40)),
        ("bias", r"contiguous float32 bias of shape \(20,\)", _with(bias=lambda t: t[:5])),
        ("strides", r"needs a contiguous packed; call .contiguous\(\)",
         _with(packed=lambda t: t.repeat(1, 2, 1)[:, ::2])),
    )
]  # fmt: skip
