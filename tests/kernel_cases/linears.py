"""Linear layers with quantized weights."""

import torch
from torch.nn.functional import linear

from impl.machine import cpu_flags
from tests.kernel_cases import Case, Rival, Speed, bad, random

# rows, outputs, inputs: odd everywhere, one of each, none of each, more rows than any tile
LINEAR = [(5, 19, 97), (1, 64, 128), (3, 1, 130), (2, 3, 1), (0, 4, 8), (2, 0, 8), (3, 5, 0),
          (67, 33, 70)]  # fmt: skip
# several tiles of 128 rows, and of outputs and inputs one over; tiles of 256 outputs, few inputs
MANY = ((130, 129, 272), (257, 260, 40))


def _int8_linear(shape, dtype):
    from kernels.int8_linear import quantize

    m, n, k = shape
    if k == 0:
        weight, scale = torch.empty(n, 0, dtype=torch.int8), torch.ones(n)
    else:
        weight, scale = quantize(random(n, k))
    return [random(m, k, seed=2, dtype=dtype), weight, scale, random(n, seed=3)]


def _lm_head_argmax(shape, dtype):
    m, vocab, k = shape
    return [random(m, k, dtype=dtype), random(vocab, k, seed=1, dtype=dtype)]


CASES = [
    Case(
        "int8_linear",
        _int8_linear,
        LINEAR,
        large=(6, 700, 130),
        order_changes={"fp32": 32, "fp16": 32},
        shim_shapes=((3, 5, 70), (66, 3, 80)),  # dot products, tiles of 64 rows
        shim_elements=160_000,
        mma={"sm_80": "HMMA", "sm_90a": "HGMMA"},
        cuda_mma="HMMA",
    ),
    Case(
        "w8a8_linear",
        _int8_linear,
        [*LINEAR, *MANY],
        large=(6, 700, 130),
        shim_shapes=((3, 9, 70), (66, 3, 80)),  # by groups of 16 rows, by tiles of 128
        shim_elements=160_000,
        mma={"sm_80": "IMMA", "sm_90a": "IGMMA"},
        cuda_mma="IMMA",
        on_hopper={"gemm_\\w+": "IGMMA"},
        hopper_shapes=MANY,
    ),
    Case(
        "lm_head_argmax",
        _lm_head_argmax,
        [s for s in LINEAR if s[1]],
        large=(6, 700, 130),
        shim_shapes=((3, 9, 70), (5, 6, 64)),
    ),
]

# rows, outputs, inputs of a Llama of 8 billion: decoding one to 64 sequences, a prompt of 512
DECODE = ((1, 4096, 4096), (8, 4096, 4096), (64, 4096, 4096), (512, 4096, 4096))
LAYERS = (
    *DECODE,
    *((rows, *up_or_down) for up_or_down in ((14336, 4096), (4096, 14336)) for rows in (1, 8, 64)),
)


def _timed_linear(shape, dtype):
    x, weight, scale, _ = _int8_linear(shape, dtype)
    return [x, weight, scale, None]


def _dequantized(dtype=None):
    """x and the weights as they were, in x's dtype or another."""

    def prepare(x, weight, scale, bias):
        wide = (weight * scale[:, None]).to(dtype or x.dtype)
        return (x if dtype is None else x.to(dtype)), wide

    return prepare


def _int8pack(x, weight, scale, bias):
    """torch's int8 weights: activations and scales in bf16."""
    return x.bfloat16(), weight, scale.bfloat16()


def _onednn(x, weight, scale, bias):
    """Weights in oneDNN's own layout."""
    x, weight = _dequantized()(x, weight, scale, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return x, packed


def _onednn_linear(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _dynamic_int8(x, weight, scale, bias):
    """oneDNN's int8 product; x is quantized by torch, in the timed call.

    As unsigned bytes around 128: of signed ones oneDNN makes 0.1 GOP/s here, in its reference code.
    Without VNNI it adds up two products in 16 bits, which full ranges overflow.
    """
    if not {"avx512_vnni", "avx_vnni"} & cpu_flags():
        raise NotImplementedError("without VNNI oneDNN's sums of two products saturate")
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    return x, packed, scale, torch.zeros(weight.shape[0], dtype=torch.int32)


def _dynamic_int8_linear(x, packed, scale, zero):
    step = x.abs().amax().item() / 127
    q = ((x / step).round() + 128).to(torch.uint8)
    return torch.ops.onednn.qlinear_pointwise(q, step, 128, packed, scale, zero, None, 1.0, 0,
                                              x.dtype, "none", [], "")  # fmt: skip


def _int_mm(x, weight, scale, bias):
    return x, weight.t(), scale


def _int_mm_linear(x, weight, scale):
    """torch's int8 product (on GPUs from 17 rows on); x is quantized per row, in the timed call."""
    step = x.abs().amax(-1, keepdim=True).float() / 127
    q = (x / step).round().to(torch.int8)
    return (torch._int_mm(q, weight).float() * (step * scale)).to(x.dtype)


PEERS = {
    "bf16_linear": Rival(linear, _dequantized(torch.bfloat16)),
    "int8pack_mm": Rival(torch.ops.aten._weight_int8pack_mm, _int8pack),
    "onednn_linear": Rival(_onednn_linear, _onednn),
}
SPEEDS = [
    Speed("int8_linear", _timed_linear, LAYERS, core=4, eager=Rival(linear, _dequantized()),
          peers=PEERS, weights=True, compute={"bf16": "int16"}),
    Speed("w8a8_linear", _timed_linear, LAYERS, core=4, eager=Rival(linear, _dequantized()),
          peers={**PEERS, "onednn_dynamic_int8": Rival(_dynamic_int8_linear, _dynamic_int8),
                 "torch_int_mm": Rival(_int_mm_linear, _int_mm)},
          weights=True, compute={"": "int8"}),
    # the head of a Llama of 1 billion with the vocabulary of Llama 2
    Speed("lm_head_argmax", _lm_head_argmax,
          ((1, 32000, 2048), (8, 32000, 2048), (64, 32000, 2048)), core=2,
          eager=Rival(lambda x, weight: tuple(linear(x, weight).max(-1))), weights=True),
]  # fmt: skip

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
    bad("lm_head_argmax", "empty", r"a weight \(V, K\) with at least one token, not \(0, 4\)",
        lambda: (r(2, 4), r(0, 4))),
    bad("lm_head_argmax", "mixed", "needs weight and x alike, not torch.float16",
        lambda: (r(2, 4), r(3, 4).half())),
    bad("w8a8_linear", "x", r"weight \(3, 4\) needs x \(..., 4\), not \(2, 5\)",
        lambda: (r(2, 5), r(3, 4).to(torch.int8), r(3), None)),
]  # fmt: skip
