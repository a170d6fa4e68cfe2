"""int4 weights in groups of inputs, read by one kernel at every precision of the activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from impl.core import Engine, NotEngaged, technique
from impl.fidelity import budget

from .int8 import expect_operator, quantize_modules, takes, values
from .layers import Int8Conv2d, Int8DynamicConv2d, Int8DynamicLinear, Int8Linear
from .numerics import NEAR_TIE

ZERO = -0x77777778  # eight nibbles of 8, which stands for 0


class Int4Linear(nn.Module):
    """x (..., K) -> x (scale * q)^T + bias (..., N) in x's dtype, q of four bits.

    packed  (ceil(N / 16), K / 8, 16) int32, scale (ceil(N / 16), K / group, 16) bf16: see
            ``kernels.int4_linear.quantize``
    bias    (N,) fp32 or None
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, packed: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.in_features, self.out_features = packed.shape[1] * 8, outputs

    @classmethod
    def from_float(cls, linear: nn.Linear, group: int) -> Int4Linear:
        """The int4 module of a float one whose inputs ``group`` divides."""
        from kernels.int4_linear import quantize

        return cls(*quantize(linear.weight, group), linear.out_features, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        from kernels.int4_linear import int4_linear

        return int4_linear(x.contiguous(), self.packed, self.scale, self.out_features, self.bias)

    def extra_repr(self) -> str:
        group = self.in_features // self.scale.shape[1]
        return f"({self.out_features}, {self.in_features}) int4, a scale per {group} inputs"


class Int4DynamicLinear(Int4Linear):
    """The same weights times activations in int8, a scale per token and group: int32 sums."""

    dynamic_activations = True

    def forward(self, x: Tensor) -> Tensor:
        from kernels.int4_a8_linear import int4_a8_linear

        return int4_a8_linear(x.contiguous(), self.packed, self.scale, self.out_features, self.bias)


def quantize_linears(model: nn.Module, group: int, linear: type[Int4Linear] = Int4Linear) -> None:
    """Put int4 modules in place of linear layers; int8 modules where four bits are too few.

    int8: the output layer of a language model, tied to its embedding or not, whose error no later
    layer averages out; layers whose inputs the group does not divide; convolutions.
    """
    tables = {id(m.weight) for m in model.modules() if type(m) is nn.Embedding}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or not takes(name, module):
            continue
        last = name.endswith("lm_head") or id(module.weight) in tables
        if last or module.in_features % group:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], linear.from_float(module, group))
    if linear is Int4DynamicLinear:
        quantize_modules(model, Int8DynamicLinear, Int8DynamicConv2d)
    else:
        quantize_modules(model, Int8Linear, Int8Conv2d)


@contextlib.contextmanager
def zeroed(modules: list[Int4Linear]):
    """The int4 weights are zero inside, and what they were after."""
    kept = [m.packed.clone() for m in modules]
    try:
        for module in modules:
            module.packed.fill_(ZERO)
        yield
    finally:
        for module, packed in zip(modules, kept, strict=True):
            module.packed.copy_(packed)


def stored_as_int4(engine: Engine, run: Callable) -> str:
    """The linear layers hold two weights a byte, none is left in float, and the run reads them."""
    from impl.models.costs import weight_bytes

    modules = [m for m in engine.model.modules() if isinstance(m, Int4Linear)]
    if not modules:
        raise NotEngaged("no layer of the model holds int4 weights")
    if left := [name for name, m in engine.model.named_modules() if takes(name, m)]:
        raise NotEngaged(f"{len(left)} layers still hold float weights: {', '.join(left[:3])}")
    for module in modules:
        padded = -(-module.out_features // 16) * 16
        if module.packed.untyped_storage().nbytes() * 2 != padded * module.in_features:
            raise NotEngaged(f"{module} takes more than half a byte per weight")
    with zeroed(modules):
        without = [t.clone() for t in values(run())]
    if all(torch.equal(a, b) for a, b in zip(values(run()), without, strict=True)):
        raise NotEngaged("the output is the same with zeros for int4 weights: they are not read")
    packed = sum(m.packed.nbytes + m.scale.nbytes for m in modules)
    total = weight_bytes(engine.model)
    engine.stats["int4_bytes"], engine.stats["weight_bytes"] = packed, total
    return f"{len(modules)} layers read int4: {packed / 1e6:.2f} of {total / 1e6:.2f} MB of weights"


def computed_from_int4(engine: Engine, run: Callable) -> str:
    """As ``stored_as_int4``, and the layers multiply int4 by int8."""
    proof = stored_as_int4(engine, run)
    module = next(m for m in engine.model.modules() if isinstance(m, Int4Linear))
    by = expect_operator(module, engine, "study::int4_a8_linear")
    return f"{proof}; activations int8 per token and group, sums int32 in {by}"


@technique(phase="compress", needs={"linear", "attention"}, replaces="weights",
           effect=stored_as_int4,
           fidelity=budget("perplexity", 0.015, kl=0.025, accuracy=0.02, cosine=0.05))  # fmt: skip
def int4_weight_only_g32(engine: Engine) -> Engine:
    """w ~ int4 * scale per output and 32 inputs: 4.5 bits a weight.

    Helps when the weights are read for few tokens: batch 1 decode, where the time is that of the
    bytes.  Does not for long prompts and large batches, where arithmetic decides.  Costs quality
    where int8 costs none: rounded to the nearest level, nothing is calibrated.  Measured: the
    perplexity of `lm_small` rises by 0.84 % (bf16 0.86 %), KL divergence 0.015; `minilm`'s cosine
    is 0.967.  A fused decode step of two layers of width 2048, 59 MB, one Zen 4 core (its CPU time,
    interleaved): 1.95 times int8 weights, 3.05 times bf16.
    Source: Dettmers and Zettlemoyer 2023 (small blocks at four bits),
    https://arxiv.org/abs/2212.09720
    """
    quantize_linears(engine.model, 32)
    return engine


@technique(phase="compress", needs={"linear", "attention"}, replaces="weights",
           effect=stored_as_int4,
           fidelity=budget("perplexity", 0.02, kl=0.035, accuracy=0.03, cosine=0.06))  # fmt: skip
def int4_weight_only_g128(engine: Engine) -> Engine:
    """w ~ int4 * scale per output and 128 inputs: 4.125 bits a weight, a coarser scale.

    As ``int4_weight_only_g32`` with 8 % fewer bytes and more error: the perplexity of `lm_small`
    rises by 1.3 % (bf16 1.35 %), KL divergence 0.020; `minilm`'s cosine is 0.956.  Layers whose
    inputs 128 does not divide are int8.
    Source: Frantar et al. 2022 (GPTQ, groups of 128), https://arxiv.org/abs/2210.17323
    """
    quantize_linears(engine.model, 128)
    return engine


@technique(phase="compress", needs={"linear", "attention"}, replaces=("weights", "activations"),
           effect=computed_from_int4,
           fidelity=budget("perplexity", 0.015, near_tie=NEAR_TIE, kl=0.025, accuracy=0.02,
                           cosine=0.05))  # fmt: skip
def int4_dynamic_g32(engine: Engine) -> Engine:
    """y = sum over groups of (int8(x) . int4(w)) * scale_x * scale_w: products of whole numbers.

    The weights of ``int4_weight_only_g32``, so its quality; activations are quantized as they
    come, with a scale for each token and 32 inputs, which costs little beside the weights' four
    bits: an outlier spoils its own group alone.  Measured (fp32, the texts of the smoke profile):
    the perplexity of `lm_small` rises by 0.46 %, KL divergence 0.016; `minilm`'s cosine is 0.968.
    The output layer is ``int8_dynamic``'s.
    Helps from one token to many where the processor adds products of int8 (VNNI, tensor cores):
    four bits to read, and a few instructions a cache line instead of widening to floats.  Does not
    where int8 runs at no higher rate than floats, nor for layers so small that quantizing the
    activations takes as long as they do.
    On a CPU ``decode_step`` does not hold it: it takes ``int4_weight_only_g32`` there.
    Source: Zhao et al. 2024 (Atom, grouped 4-bit weights, low-bit activations),
    https://arxiv.org/abs/2310.19102
    """
    quantize_linears(engine.model, 32, Int4DynamicLinear)
    return engine
