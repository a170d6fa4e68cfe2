"""int8 weights alone, and int8 weights times int8 activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from impl.core import Engine, NotEngaged, technique
from impl.fidelity import budget

from .layers import (
    Int8Conv2d,
    Int8DynamicConv2d,
    Int8DynamicLinear,
    Int8Embedding,
    Int8Linear,
    Int8Weight,
)
from .numerics import NEAR_TIE


def takes(name: str, module: nn.Module) -> bool:
    """Whether the module's weight is quantized: linear layers and plain convolutions.

    Routers of a mixture of experts stay as they are: a few columns that decide everything.
    """
    linear = isinstance(module, nn.Linear) and not name.endswith("router")
    return linear or Int8Conv2d.takes(module)


def quantize_modules(model: nn.Module, linear: type[Int8Weight], conv: type[Int8Conv2d],
                     embedding: type[Int8Weight] = Int8Embedding) -> None:  # fmt: skip
    """Put int8 modules in place of float ones; an embedding tied to a linear layer shares its int8.

    The float weights are let go one module at a time.
    """
    packed: dict[int, tuple] = {}  # id of a float weight -> (that weight, its int8 module)
    for make, chosen in (
        (None, takes),
        (embedding, lambda _, m: type(m) is nn.Embedding and id(m.weight) in packed),
    ):
        for name, module in list(model.named_modules()):
            if not chosen(name, module):
                continue
            parent = model.get_submodule(name.rpartition(".")[0])
            weight = module.weight
            known = packed.get(id(weight))
            into = make or (conv if isinstance(module, nn.Conv2d) else linear)
            int8 = into.from_float(module, known and (known[1].weight, known[1].scale))
            packed.setdefault(id(weight), (weight, int8))
            setattr(parent, name.rpartition(".")[2], int8)


def int8_modules(engine: Engine) -> list[Int8Weight]:
    """The int8 modules of the engine's model; raises ``NotEngaged`` when a float one is left."""
    found = [m for m in engine.model.modules() if isinstance(m, Int8Weight)]
    if not found:
        raise NotEngaged("no layer of the model holds int8 weights")
    left = [name for name, m in engine.model.named_modules() if takes(name, m)]
    if left:
        raise NotEngaged(f"{len(left)} layers still hold float weights: {', '.join(left[:3])}")
    for module in found:
        if module.weight.untyped_storage().nbytes() != module.weight.numel():
            raise NotEngaged(f"{module} takes more than one byte per weight")
    return found


@contextlib.contextmanager
def zeroed(modules: Sequence[Int8Weight]):
    """The int8 weights are zero inside, and what they were after."""
    kept = [m.weight.clone() for m in modules]
    try:
        for module in modules:
            module.weight.zero_()
        yield
    finally:
        for module, weight in zip(modules, kept, strict=True):
            module.weight.copy_(weight)


def values(out) -> list[torch.Tensor]:
    """The tensors of what a cell's call returns: ids, logits, or responses."""
    return [o.ids for o in out] if isinstance(out, list) else [getattr(out, "logits", out)]


def stored_as_int8(engine: Engine, run: Callable) -> str:
    """Every linear layer holds int8, its bytes are counted, and the run reads them."""
    from impl.models.costs import weight_bytes

    modules = int8_modules(engine)
    with zeroed(modules):
        without = [t.clone() for t in values(run())]
    if all(torch.equal(a, b) for a, b in zip(values(run()), without, strict=True)):
        raise NotEngaged("the output is the same with zeros for int8 weights: they are not read")
    packed = sum({m.weight.data_ptr(): m.weight.nbytes for m in modules}.values())
    total = weight_bytes(engine.model)
    engine.stats["int8_bytes"], engine.stats["weight_bytes"] = packed, total
    layers = sum(not isinstance(m, Int8Embedding) for m in modules)
    return f"{layers} layers read int8: {packed / 1e6:.2f} of {total / 1e6:.2f} MB of weights"


class _Operators(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def operators_of(module: Any, engine: Engine) -> set[str]:
    """The operators, such as ``study::w8a8_linear.cpu``, that the layer runs for three tokens.

    module  a convolution in int8, or a layer that has ``in_features``
    """
    shape: tuple[int, ...]
    if isinstance(module, Int8DynamicConv2d):
        shape = (1, module.weight.shape[1] // (module.kernel[0] * module.kernel[1]), 9, 9)
    else:
        shape = (3, module.in_features)
    with _Operators() as ran:
        module(torch.ones(shape, dtype=engine.dtype, device=engine.device))
    return ran.names


def expect_operator(module: nn.Module, engine: Engine, *names: str) -> str:
    """The operator of these names that the layer runs; raises ``NotEngaged`` for none."""
    ran = operators_of(module, engine)
    found = sorted(r for r in ran if r.rpartition(".")[0] in names or r in names)
    if not found:
        raise NotEngaged(f"{type(module).__name__} runs {', '.join(sorted(ran))}: none multiplies "
                         f"as {' or '.join(names)} does")  # fmt: skip
    return found[0]


def computed_in_int8(engine: Engine, run: Callable) -> str:
    """As ``stored_as_int8``, and each kind of layer multiplies int8 by int8."""
    proof, by = stored_as_int8(engine, run), set()
    for kind in {type(m) for m in int8_modules(engine)} - {Int8Embedding}:
        module = next(m for m in engine.model.modules() if type(m) is kind)
        if not isinstance(module, Int8DynamicLinear | Int8DynamicConv2d):
            raise NotEngaged(f"{kind.__name__} computes in {engine.dtype}")
        by.add(expect_operator(module, engine, "study::w8a8_linear", "aten::_int_mm"))
    return f"{proof}; activations int8 per token, sums int32 in {' and '.join(sorted(by))}"


@technique(phase="compress", needs={"linear"}, replaces="weights", effect=stored_as_int8,
           fidelity=budget("perplexity", 0.003, kl=0.002, accuracy=0.01, cosine=0.002),
           peer="torchao_int8_weight_only")  # fmt: skip
def int8_weight_only(engine: Engine) -> Engine:
    """w ~ int8 * scale per output channel: a quarter of fp32's bytes, arithmetic as before.

    Helps when the weights are read for few tokens: batch 1 decode.  Does not for long prompts and
    large batches in bf16, where arithmetic decides and widening comes on top.  Linear layers run
    on ``kernels.int8_linear``, which widens in registers (``Int8Linear`` says where they do not);
    convolutions are widened in memory.
    Generation of 24 tokens after 64 by `lm_small`, 2 threads of a Zen 4, calls interleaved on a
    busy machine, times eager: fp32 2.6 for 1 row and 1.9 for 8 (with torch's operators 0.8 and
    0.8); compiled 4.5 for 1 row and 2.0 for 8.  `minilm`, fp32, one sentence: 1.1 (0.86).
    Source: Dettmers et al. 2022 (the vector-wise scheme), https://arxiv.org/abs/2208.07339
    """
    quantize_modules(engine.model, Int8Linear, Int8Conv2d)
    return engine


@technique(phase="compress", needs={"linear"}, replaces=("weights", "activations"),
           fidelity=budget("perplexity", 0.015, near_tie=NEAR_TIE, kl=0.005, accuracy=0.015,
                           cosine=0.01),
           effect=computed_in_int8, peer="torchao_int8_dynamic")  # fmt: skip
def int8_dynamic(engine: Engine) -> Engine:
    """y = int8(x) @ int8(w) * scale_x * scale_w: activations quantized per token as they come.

    Helps wherever matrix products take the time and the processor multiplies int8 faster (VNNI,
    AMX, tensor cores), for one token as for many.  Does not when a few channels carry outliers
    (they set the token's scale) or when layers are so small that quantizing costs as much.
    Linear layers run on ``kernels.w8a8_linear``, compiled ones and convolutions on torch's product.
    Measured as for ``int8_weight_only``, times eager: fp32 1.8 for 1 row and 2.2 for 8, bf16 1.9
    and 1.4.
    Source: Yao et al. 2022 (ZeroQuant), https://arxiv.org/abs/2206.01861
    """
    quantize_modules(engine.model, Int8DynamicLinear, Int8DynamicConv2d)
    return engine
