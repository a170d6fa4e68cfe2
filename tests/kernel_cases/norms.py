"""Normalization over rows."""

import torch
from torch.nn.functional import layer_norm, rms_norm

from tests.kernel_cases import LONG, Case, Rival, Speed, bad, random

# odd, a power of two, one column, one row, no row, no column, longer than any one block
ROWS = [(5, 123), (3, 2, 64), (4, 1), (1, 384), (0, 7), (2, 0), (2, 4097), (2, 20000)]


def _rms_norm(shape, dtype):
    return [random(*shape, dtype=dtype), 1 + 0.1 * random(shape[-1], dtype=dtype), 1e-6]


def _add_rms_norm(shape, dtype):
    x, weight, eps = _rms_norm(shape, dtype)
    return [x, random(*shape, seed=1, dtype=dtype), weight, eps]


def _layer_norm(shape, dtype):
    x, weight, _ = _rms_norm(shape, dtype)
    return [x + 1, weight, random(shape[-1], seed=1, dtype=dtype), 1e-5]


CASES = [
    Case("rms_norm", _rms_norm, ROWS, large=(300, 1111), **LONG),
    Case(
        "add_rms_norm",
        _add_rms_norm,
        ROWS,
        large=(300, 1111),
        **LONG,
        row_args=(0, 1),
        short_argument=2,
    ),
    Case("layer_norm", _layer_norm, ROWS, large=(300, 1111), **LONG),
]

# 128 MB in fp32: the activations of 8192 tokens at a width of 4096, of 16384 at 2048; long rows
SIZES = ((8192, 4096), (16384, 2048), (512, 65536))


def _eager_add_rms_norm(x, residual, weight, eps):
    total = x + residual
    return rms_norm(total, weight.shape, weight, eps), total


def _manual_rms_norm(x, weight, eps):
    """As transformers writes it."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype)


SPEEDS = [
    Speed(
        "rms_norm",
        _rms_norm,
        SIZES,
        core=1,
        eager=Rival(lambda x, weight, eps: rms_norm(x, weight.shape, weight, eps)),
        peers={"transformers_eager": Rival(_manual_rms_norm)},
    ),
    Speed("add_rms_norm", _add_rms_norm, SIZES, core=1, eager=Rival(_eager_add_rms_norm)),
    Speed(
        "layer_norm",
        _layer_norm,
        SIZES,
        core=1,
        eager=Rival(lambda x, weight, bias, eps: layer_norm(x, weight.shape, weight, bias, eps)),
    ),
]

r = random
BAD = [
    bad("rms_norm", "dtype", "not torch.float64; convert x",
        lambda: (r(2, 4).double(), r(4).double(), 1e-6)),
    bad("rms_norm", "weight", r"needs a weight of shape \(4,\), not \(5,\)",
        lambda: (r(2, 4), r(5), 1e-6)),
    bad("rms_norm", "mixed", "needs weight and x alike", lambda: (r(2, 4), r(4).half(), 1e-6)),
    bad("rms_norm", "transposed", r"stride 1, not 4; call .contiguous\(\)",
        lambda: (r(3, 4).T, r(3), 1e-6)),
    bad("rms_norm", "uneven", "evenly spaced rows",
        lambda: (r(4, 3, 8)[:, :2], r(8), 1e-6)),
    bad("layer_norm", "bias", r"needs a bias of shape \(4,\), not \(5,\)",
        lambda: (r(2, 4), r(4), r(5), 1e-5)),
    bad("layer_norm", "mixed", "needs weight and x alike",
        lambda: (r(2, 4), r(4).half(), r(4), 1e-5)),
    bad("add_rms_norm", "residual", r"residual shaped like x \(2, 4\), not \(2, 5\)",
        lambda: (r(2, 4), r(2, 5), r(4), 1e-6)),
]  # fmt: skip
