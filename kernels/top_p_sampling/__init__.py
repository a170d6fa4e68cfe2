"""The end of a sampled decoding step: a token of the nucleus, without sorting the vocabulary.

Source: Holtzman et al. 2020 (nucleus), https://arxiv.org/abs/1904.09751; a threshold searched by
pivots in place of a sort: Xing et al. 2025, https://flashinfer.ai/2025/03/10/sampling.html, and
Park et al. 2026, https://arxiv.org/abs/2602.01518
"""

from __future__ import annotations

import ctypes
import math

import torch

from kernels import build
from kernels.build import FLOAT, INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect, rows_of

from . import reference

NAME = "top_p_sampling"
FP32 = torch.finfo(torch.float32)


def _check(logits, uniform, temperature, top_p):
    expect(logits.dtype in SUFFIX, f"{NAME} takes logits in float32, bfloat16 or float16, not "
           f"{logits.dtype}")  # fmt: skip
    expect(logits.dim() >= 1 and 1 <= logits.shape[-1] < 2**31, f"{NAME} needs logits (..., V) "
           f"with at least one token, not {tuple(logits.shape)}")  # fmt: skip
    rows = logits.shape[:-1]
    expect(uniform.shape == rows and uniform.dtype == torch.float32 and uniform.is_contiguous(),
           f"{NAME} needs a contiguous float32 uniform of shape {tuple(rows)}, a number of [0, 1) "
           f"a row, not {uniform.dtype} {tuple(uniform.shape)}")  # fmt: skip
    expect(uniform.device == logits.device, f"{NAME} needs uniform on {logits.device}, not "
           f"{uniform.device}")  # fmt: skip
    expect(0 <= temperature < math.inf, f"{NAME} needs a finite temperature of 0 (greedy) or more, "
           f"not {temperature}")  # fmt: skip
    expect(0 <= top_p <= 1, f"{NAME} needs a top_p of [0, 1], not {top_p}; 1 keeps every token")
    rows_of(logits, f"logits of {NAME}")


def _fake(logits, uniform, temperature, top_p):
    return torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)


def scalars(temperature: float, top_p: float) -> tuple[float, float]:
    """(1 / temperature in fp32's range, top_p) as kernels take them; greedy is a nucleus of one."""
    if temperature == 0:
        return 1.0, 0.0
    return min(max(1 / temperature, FP32.tiny), FP32.max), top_p


_ARGTYPES = (POINTER, LONG, POINTER, POINTER, LONG, LONG, FLOAT, ctypes.c_double, INT)


def into_cpu(token, logits, uniform, temperature, top_p) -> None:
    """Write token (...), contiguous."""
    rows, stride = rows_of(logits, f"logits of {NAME}")
    function = build.cpu_function(NAME, f"{NAME}_{SUFFIX[logits.dtype]}", _ARGTYPES)
    function(logits.data_ptr(), stride, uniform.data_ptr(), token.data_ptr(), rows,
             logits.shape[-1], *scalars(temperature, top_p), torch.get_num_threads())  # fmt: skip


def into_cuda(token, logits, uniform, temperature, top_p) -> None:
    """Write token (...), contiguous: a block per row, which it reads some ten times."""
    (rows, stride), vocab = rows_of(logits, f"logits of {NAME}"), logits.shape[-1]
    symbol = f"{NAME}_{SUFFIX[logits.dtype]}"
    kernel = build.cuda_kernel(NAME, symbol, logits.device.index or 0)
    inverse, top_p = scalars(temperature, top_p)
    block = min(1024, max(32, -(-vocab // 128) * 32))
    build.launch(kernel, rows, block, logits, uniform, token, ctypes.c_int64(stride),
                 ctypes.c_int(vocab), ctypes.c_float(inverse), ctypes.c_float(top_p))  # fmt: skip


def _allocating(into):
    def implementation(logits, uniform, temperature, top_p):
        token = _fake(logits, uniform, temperature, top_p)
        if token.numel():
            into(token, logits, uniform, temperature, top_p)
        return token

    return implementation


_OP = Op(NAME, "(Tensor logits, Tensor uniform, float temperature, float top_p) -> Tensor",
         check=_check, fake=_fake, reference=reference.top_p_sampling,
         cpu=_allocating(into_cpu), cuda=_allocating(into_cuda))  # fmt: skip


def top_p_sampling(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0,
                   top_p: float = 1.0, *, impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """token = the first of the nucleus at which its running mass exceeds uniform x its whole mass.

    Masses are those of softmax(logits / temperature).  The nucleus is the shortest run of tokens,
    most probable first and of equal logits the first first, whose mass reaches ``top_p``; it holds
    one token at least.  The running mass goes through the nucleus in the vocabulary's order.

    logits       (..., V) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    uniform      (...) fp32 of [0, 1), contiguous; from 1 on the last token of the nucleus
    temperature  0 is greedy: the first of the largest logits
    top_p        of [0, 1]; 1 keeps every token, 0 the most probable
    impl         ``reference``, ``cpu``, ``triton``, ``cuda``; None takes the fastest there is
    Returns token (...) int64.  A row with a NaN or +infinity, or of -infinity alone, has no
    distribution, and neither has a row whose uniform is NaN: its token is -1, which no embedding
    takes.  A single -infinity is a token of probability 0: it is never drawn.
    All implementations return the same token for the same numbers, except where ``top_p`` or
    uniform lies within rounding of a token's border (2^-18 of the whole mass).
    Helps against a sort, always; costs a step of greedy decoding its fused ``lm_head_argmax``.
    Raises ``KernelError`` for other shapes, dtypes, strides, devices, and a missing compiler.
    """
    return _OP(logits, uniform, temperature, top_p, impl=impl)


def bytes_moved(rows: int, vocab: int, itemsize: int) -> int:
    """Logits and uniforms read once, a token a row written."""
    return rows * (vocab * itemsize + 12)


def flops(rows: int, vocab: int) -> int:
    """A comparison, a subtraction, a product, an exponential and a sum per token."""
    return 5 * rows * vocab
