"""Element-wise operations and softmax over rows."""

import math

import torch
from torch.nn.functional import gelu, silu

from tests.kernel_cases import LONG, Case, Rival, Speed, bad, random

# odd, a power of two, one column, one row, no row, no column, longer than a block
ROWS = [(5, 123), (3, 2, 64), (4, 1), (1, 384), (0, 7), (2, 0), (2, 4097)]
# batch, positions, heads, head width
HEADS = [(3, 5, 2, 6), (2, 7, 3, 64), (1, 1, 1, 2), (0, 3, 2, 8), (2, 3, 0, 4), (2, 1, 5, 130)]


def _softmax(shape, dtype):
    return [4 * random(*shape, dtype=dtype)]


def _swiglu(shape, dtype):
    return [2 * random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)]


def _gelu_bias(shape, dtype):
    return [2 * random(*shape, dtype=dtype), random(shape[-1], seed=1, dtype=dtype), "none"]


def _rope(shape, dtype):
    _, length, _, width = shape
    frequency = 10000 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * frequency
    return [random(*shape, dtype=dtype), angle.cos(), angle.sin()]


CASES = [
    Case("softmax", _softmax, [*ROWS, (2, 20000)], large=(300, 1111), **LONG),
    Case("swiglu", _swiglu, ROWS, large=(300, 1111), row_args=(0, 1), uses=""),
    Case("gelu_bias", _gelu_bias, ROWS, large=(300, 1111), uses=""),
    Case("rope", _rope, HEADS, large=(7, 60, 4, 64), uses="",
         shim_shapes=((1, 2, 2, 32), (2, 3, 1, 10))),
]  # fmt: skip

# 128 MB in fp32: 8192 tokens of width 4096, attention over long rows, a vocabulary
SOFTMAX = ((8192, 4096), (512, 65536), (256, 128256))
# 8192 tokens of width 4096, and of the MLP of a Llama of 8 billion
ACTIVATIONS = ((8192, 4096), (2560, 14336))


def _eager_rope(x, cos, sin):
    """As transformers writes it: tables of the full width, halves swapped."""
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + swapped * sin


def _full_tables(x, cos, sin):
    return x, *(torch.cat((t, t), -1)[:, None].to(x.dtype) for t in (cos, sin))


def _erf_gelu(x, bias, _):
    """As BERT's first code wrote it."""
    z = x + bias
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


SPEEDS = [
    Speed("softmax", _softmax, SOFTMAX, core=1, eager=Rival(lambda x: torch.softmax(x, -1))),
    Speed("swiglu", _swiglu, ACTIVATIONS, core=1, eager=Rival(lambda gate, up: silu(gate) * up)),
    Speed("gelu_bias", _gelu_bias, ACTIVATIONS, core=1,
          eager=Rival(lambda x, bias, _: gelu(x + bias)),
          peers={"written_out": Rival(_erf_gelu)}),
    # 8192 positions of 32 heads, and a batch of 8 of 1024
    Speed("rope", _rope, ((1, 8192, 32, 128), (8, 1024, 32, 128)), core=1,
          eager=Rival(_eager_rope, _full_tables), rows=lambda b, t, h, d: b * t),
]  # fmt: skip

r = random
BAD = [
    bad("softmax", "dtype", "not torch.float64; convert x", lambda: (r(2, 4).double(),)),
    bad("softmax", "transposed", r"stride 1, not 4; call .contiguous\(\)", lambda: (r(3, 4).T,)),
    bad("softmax", "number", r"needs x \(..., N\), not a single number", lambda: (r(1)[0],)),
    bad("swiglu", "up", r"up shaped like gate \(2, 4\), not \(2, 5\)",
        lambda: (r(2, 4), r(2, 5))),
    bad("swiglu", "mixed", "needs up and gate alike", lambda: (r(2, 4), r(2, 4).half())),
    bad("gelu_bias", "bias", r"needs a bias of shape \(4,\), not \(5,\)",
        lambda: (r(2, 4), r(5), "none")),
    bad("gelu_bias", "mixed", "needs bias and x alike", lambda: (r(2, 4), r(4).half(), "none")),
    bad("gelu_bias", "form", "knows approximate='none' and 'tanh', not 'erf'",
        lambda: (r(2, 4), r(4), "erf")),
    bad("rope", "odd", r"an even D, not \(1, 2, 3, 5\)",
        lambda: (r(1, 2, 3, 5), r(2, 2), r(2, 2))),
    bad("rope", "table", r"float32 cos of shape \(2, 2\), not torch.float32 \(3, 2\)",
        lambda: (r(1, 2, 3, 4), r(3, 2), r(2, 2))),
]  # fmt: skip
