"""The last layer of greedy decoding: the largest logit of each row and its token, nothing else.

No logit is written: beside the weights, read once, almost nothing moves.
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
from kernels.linears import expect_linear
from kernels.op import Op, expect, rows_of

from . import reference

NAME = "lm_head_argmax"
BLOCKS = 1024  # at most so many blocks of impl='cuda' share the vocabulary
ROWS_AT_ONCE = 4


def _check(x, weight):
    expect(weight.dim() == 2 and len(weight), f"{NAME} needs a weight (V, K) with at least one "
           f"token, not {tuple(weight.shape)}")  # fmt: skip
    expect_linear(NAME, x, *weight.shape, {"weight": weight}, {})
    expect(weight.dtype == x.dtype, f"{NAME} needs weight and x alike, not {weight.dtype} and "
           f"{x.dtype}")  # fmt: skip


def _fake(x, weight):
    rows = x.shape[:-1]
    return (torch.empty(rows, dtype=torch.float32, device=x.device),
            torch.empty(rows, dtype=torch.int64, device=x.device))  # fmt: skip


_ARGTYPES = (POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG, LONG, INT)


def into_cpu(top, token, x, weight) -> None:
    """Write (top, token), contiguous."""
    rows, stride = rows_of(x, f"x of {NAME}")
    function = build.cpu_function(NAME, f"{NAME}_{SUFFIX[x.dtype]}", _ARGTYPES)
    function(x.data_ptr(), stride, weight.data_ptr(), top.data_ptr(), token.data_ptr(), rows,
             *weight.shape, torch.get_num_threads())  # fmt: skip


def into_cuda(top, token, x, weight) -> None:
    """Write (top, token), contiguous: each block finds the best of its tokens."""
    (rows, stride), (vocab, k) = rows_of(x, f"x of {NAME}"), weight.shape
    kernel = build.cuda_kernel(NAME, f"{NAME}_{SUFFIX[x.dtype]}", x.device.index or 0)
    each = max(4, -(-vocab // BLOCKS))  # tokens of a block: one or more for each of its 4 warps
    blocks = -(-vocab // each)
    tops = torch.empty(blocks, rows, dtype=torch.float32, device=x.device)
    tokens = torch.empty(blocks, rows, dtype=torch.int32, device=x.device)
    build.launch(kernel, (blocks, -(-rows // ROWS_AT_ONCE)), 128, x, weight, tops, tokens,
                 ctypes.c_int64(stride), ctypes.c_int(rows), ctypes.c_int(vocab), ctypes.c_int(k),
                 ctypes.c_int(each))  # fmt: skip
    reference.best_of_blocks(tops, tokens, top.view(-1), token.view(-1))


def _allocating(into):
    def implementation(x, weight):
        top, token = _fake(x, weight)
        if top.numel():
            into(top, token, x, weight)
        return top, token

    return implementation


def _flops(x_shape, weight_shape, *_, **__) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return flops(rows, *weight_shape)


_OP = Op(NAME, "(Tensor x, Tensor weight) -> (Tensor, Tensor)", check=_check, fake=_fake,
         reference=reference.lm_head_argmax, cpu=_allocating(into_cpu),
         cuda=_allocating(into_cuda), flops=_flops)  # fmt: skip


def lm_head_argmax(x: torch.Tensor, weight: torch.Tensor, *,
                   impl: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(top, token): token = argmax over v of x . weight[v], top = that logit.

    x       (..., K) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    weight  (V, K) in x's dtype, contiguous
    impl    ``reference``, ``cpu``, ``triton``, ``cuda``; None takes the fastest there is
    Returns top (...) fp32 and token (...) int64: the first of equal logits, a NaN before any
    number.  Logits are fp32 sums that are never rounded to x's dtype, so that in bf16 fewer of
    them tie than in a model that writes them.  A row of a batch has the same bits as alone.
    Helps at small batch; a sampler needs all logits, and this cannot serve it.
    Raises ``KernelError`` for other shapes, dtypes, strides, devices, and a missing compiler.
    """
    return _OP(x, weight, impl=impl)


def bytes_moved(rows: int, vocab: int, k: int, itemsize: int) -> int:
    """Weights and x read once, 12 bytes written per row."""
    return (vocab + rows) * k * itemsize + 12 * rows


def flops(rows: int, vocab: int, k: int) -> int:
    """A product and a sum per weight and row."""
    return 2 * rows * vocab * k
