"""Linear layers with weights of four bits."""

import torch
from torch.nn.functional import linear

from tests.kernel_cases import Case, Rival, Speed, bad, random, seeded

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
        order_changes={"fp32": 16, "fp16": 16},
        shim_shapes=((3, 19, 96), (17, 3, 64), (66, 3, 64)),  # dot products, by 16 and by 64 rows
        shim_elements=160_000,
        mma={"sm_80": "HMMA", "sm_90a": "HGMMA"},
        cuda_mma="HMMA",
    ),
    Case(
        "int4_a8_linear",
        _int4_linear,
        LINEAR,
        large=(6, 700, 128),
        shim_shapes=((3, 19, 96), (66, 3, 128)),  # by groups of 16 rows, by tiles of 64
        shim_elements=160_000,
        mma={"sm_80": "IMMA", "sm_90a": "IGMMA"},
        cuda_mma="IMMA",
    ),
]

# rows, outputs, inputs, group of a Llama of 8 billion: decoding one to 64 sequences, a prompt
LAYERS = (
    *((rows, 4096, 4096, 128) for rows in (1, 8, 64, 512)),
    *((rows, 4096, 4096, 32) for rows in (1, 8)),
    *((rows, *up_or_down, 128) for up_or_down in ((14336, 4096), (4096, 14336)) for rows in (1, 8)),
)


def _timed_linear(shape, dtype):
    """Every word is a weight: no need to quantize one."""
    m, n, k, group = shape
    words = torch.randint(-(2**31), 2**31, (n // 16, k // 8, 16), generator=seeded(shape))
    scale = 0.02 + 0.01 * torch.rand(n // 16, k // group, 16, generator=seeded(shape))
    return [random(m, k, dtype=dtype), words.int(), scale.bfloat16(), n, None]


def _dequantized(dtype=None):
    """x and the weights, in x's dtype or another."""

    def prepare(x, packed, scale, outputs, bias):
        from kernels.int4_linear import dequantize

        dtype_ = dtype or x.dtype
        return x.to(dtype_), dequantize(packed, scale, outputs).to(dtype_)

    return prepare


def _int4pack(x, packed, scale, outputs, bias):
    """torch's int4 weights of either device: activations in bf16, weights q - 8 times a scale."""
    from kernels.int4_linear.reference import unpack

    q = unpack(packed).int() + 8
    if x.is_cuda:
        halves = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
        words = torch.ops.aten._convert_weight_to_int4pack(halves, 8)
    else:
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    groups = scale.shape[1]
    flat = scale.permute(1, 0, 2).reshape(groups, outputs)
    return (x.bfloat16(), words, x.shape[-1] // groups,
            torch.stack((flat, torch.zeros_like(flat)), -1))  # fmt: skip


def _int4pack_mm(x, words, group, scales):
    aten = torch.ops.aten
    return (aten._weight_int4pack_mm if x.is_cuda else aten._weight_int4pack_mm_for_cpu)(
        x, words, group, scales)  # fmt: skip


PEERS = {
    "bf16_linear": Rival(linear, _dequantized(torch.bfloat16)),
    "int4pack_mm": Rival(_int4pack_mm, _int4pack),
}


def _speed(op):
    def moved(shape, itemsize):
        from kernels import int4_linear

        return int4_linear.bytes_moved(*shape[:3], itemsize, shape[3])

    return Speed(
        op, _timed_linear, LAYERS, core=4, eager=Rival(linear, _dequantized()), peers=PEERS,
        weights=True, moved=moved,
        compute={"": "int4"} if "a8" in op else {"bf16": "int16"})  # fmt: skip


SPEEDS = [_speed("int4_linear"), _speed("int4_a8_linear")]

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
        ("remainder", r"needs scale \(2, 296 / group, 16\)",
         _with(x=lambda t: r(2, 296), packed=lambda t: t.repeat(1, 5, 1)[:, :37].contiguous(),
               scale=lambda t: t.repeat(1, 5, 1)[:, :9].contiguous())),
        ("blocks", "of groups of 32 or 128", _with(scale=lambda t: t[:1])),
        ("outputs", "of 2 blocks of 16 outputs has 17 to 32 outputs, not 40",
         _with(outputs=lambda n: 40)),
        ("bias", r"contiguous float32 bias of shape \(20,\)", _with(bias=lambda t: t[:5])),
        ("strides", r"needs a contiguous packed; call .contiguous\(\)",
         _with(packed=lambda t: t.repeat(1, 2, 1)[:, ::2])),
    )
]  # fmt: skip
