"""Weights and activations in floats of eight bits (e4m3), multiplied by one kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from impl.core import Engine, NotEngaged, constant_when_compiled, technique
from impl.fidelity import budget

from .int8 import expect_operator, quantize_modules, takes, values, zeroed
from .layers import Float, Int8Conv2d, Int8Weight
from .numerics import NEAR_TIE

HARDWARE = (8, 9)  # compute capability from which tensor cores multiply e4m3


class Fp8Weight(Int8Weight):
    """``weight`` (N, K) e4m3, ``scale`` and ``bias`` (or None) (N,) fp32."""

    dtype: torch.dtype  # of the float module, which an embedding gives

    @classmethod
    def from_float(cls, module: Float, packed: tuple[Tensor, Tensor] | None = None):
        from kernels.fp8_linear import quantize

        made = cls(*(packed or quantize(module.weight.detach())), getattr(module, "bias", None))
        made.dtype = module.weight.dtype
        return made

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)} e4m3, a scale per output"


class Fp8Embedding(Fp8Weight):
    """Rows of an e4m3 table, scaled: ids (...) int64 -> (..., C), in the float table's dtype."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.view(torch.uint8)[ids].view(self.weight.dtype)
        return (rows.float() * self.scale[ids].unsqueeze(-1)).to(self.dtype)


class Fp8Linear(Fp8Weight):
    """x (..., K) -> (e4m3(x) @ weight.T) * scale_x * scale + bias (..., N) in x's dtype."""

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        from kernels.fp8_linear import fp8_linear

        impl = "reference" if x.is_cuda and not has_fp8(x.device) else None
        return fp8_linear(x.contiguous(), self.weight, self.scale, self.bias, impl=impl)


@constant_when_compiled
def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies e4m3: no CPU does, GPUs from sm_89 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= HARDWARE


def computed_in_fp8(engine: Engine, run: Callable) -> str:
    """Every linear layer holds e4m3, the run reads it, and the kernel of e4m3 multiplies it."""
    from impl.models.costs import weight_bytes
    from kernels.fp8_linear import EMULATED

    modules = [m for m in engine.model.modules() if isinstance(m, Fp8Weight)]
    linears = [m for m in modules if isinstance(m, Fp8Linear)]
    if not linears:
        raise NotEngaged("no layer of the model holds fp8 weights")
    if left := [name for name, m in engine.model.named_modules() if takes(name, m)]:
        raise NotEngaged(f"{len(left)} layers still hold float weights: {', '.join(left[:3])}")
    for module in modules:
        if module.weight.untyped_storage().nbytes() != module.weight.numel():
            raise NotEngaged(f"{module} takes more than one byte per weight")
    with zeroed(modules):
        without = [t.clone() for t in values(run())]
    if all(torch.equal(a, b) for a, b in zip(values(run()), without, strict=True)):
        raise NotEngaged("the output is the same with zeros for fp8 weights: they are not read")
    by = expect_operator(linears[0], engine, "study::fp8_linear")
    packed = sum({m.weight.data_ptr(): m.weight.nbytes for m in modules}.values())
    total = weight_bytes(engine.model)
    engine.stats["fp8_bytes"], engine.stats["weight_bytes"] = packed, total
    how = "EMULATED, this hardware multiplies no fp8" if by.rpartition(".")[2] in EMULATED else (
        "on tensor cores")  # fmt: skip
    return (
        f"{len(linears)} layers read e4m3: {packed / 1e6:.2f} of {total / 1e6:.2f} MB of weights; "
        f"activations e4m3 per token, in {by}: {how}"
    )


@technique(phase="compress", needs={"linear", "attention"}, replaces=("weights", "activations"),
           effect=computed_in_fp8,
           fidelity=budget("perplexity", 0.015, near_tie=NEAR_TIE, kl=0.012, accuracy=0.015,
                           cosine=0.01))  # fmt: skip
def fp8_dynamic(engine: Engine) -> Engine:
    """y = (e4m3(x) @ e4m3(w)) * scale_x * scale_w: eight-bit floats, a scale per token and output.

    Three bits of mantissa after the leading one: an error of up to 2^-4 of each number, whatever
    its size, where int8 errs by 1/254 of the row's largest.  So channels much larger than others
    cost it nothing, and well-behaved ones cost it more than ``int8_dynamic``.
    Helps on GPUs from sm_89 on, whose tensor cores multiply e4m3 at twice the rate of bf16 (not
    measured here yet), and wherever the time is that of reading a quarter of fp32's bytes.  Does
    not on CPUs for more than a few tokens: none multiplies e4m3, so the arithmetic is emulated by
    widening to bf16 or fp32, and the effect says so; nor where int8 is as fast and nearer.
    Measured (fp32, the texts of the smoke profile): the perplexity of `lm_small` rises by 0.57 %,
    KL divergence 0.005; `minilm`'s cosine is 0.998.
    On a CPU ``decode_step`` does not hold it: it takes int8 or int4 weights there.
    Source: Micikevicius et al. 2022 (FP8 formats), https://arxiv.org/abs/2209.05433
    """
    quantize_modules(engine.model, Fp8Linear, Int8Conv2d, Fp8Embedding)
    return engine
