"""The libraries, on the same module: bitsandbytes' own layers and torchao's ``quantize_``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from impl.core import Engine, NotEngaged, technique
from impl.fidelity import budget

from .numerics import NEAR_TIE

BLOCK = (32, 64)  # bitsandbytes packs four-bit weights for the CPU in blocks of rows and columns


def _linears(model: nn.Module, block: tuple[int, int] = (1, 1)) -> list[tuple[str, nn.Linear]]:
    """Names and linear layers that are whole blocks (outputs, inputs); routers are left alone."""
    rows, columns = block
    return [(n, m) for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and not n.endswith("router")
            and m.out_features % rows == 0 and m.in_features % columns == 0]  # fmt: skip


class _Namespaces(TorchDispatchMode):
    """Collects the libraries whose operations run inside."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def _sizes(engine: Engine, layers: int, what: str) -> str:
    from impl.models.costs import weight_bytes

    engine.stats["weight_bytes"] = weight_bytes(engine.model)
    return f"{layers} layers are {what}; {engine.stats['weight_bytes'] / 1e6:.2f} MB of weights"


def _bitsandbytes_layers(engine: Engine, run: Callable) -> str:
    """Every linear layer is bitsandbytes' own, packed, and calls its operations."""
    linears = _linears(engine.model, BLOCK)
    foreign = [n for n, m in linears if not type(m).__module__.startswith("bitsandbytes")]
    if foreign or not linears:
        raise NotEngaged(f"{len(foreign)} of {len(linears)} linear layers are not bitsandbytes'")
    wide = [n for n, m in linears if m.weight.dtype not in (torch.int8, torch.uint8)]
    if wide:
        raise NotEngaged(f"{len(wide)} layers hold unpacked weights: {', '.join(wide[:3])}")
    x = torch.ones(2, linears[0][1].in_features, dtype=engine.dtype, device=engine.device)
    with _Namespaces() as namespaces:
        linears[0][1](x)
    if "bitsandbytes" not in namespaces.seen:
        raise NotEngaged("the layer runs none of bitsandbytes' operations")
    run()
    return _sizes(engine, len(linears), f"bitsandbytes' {type(linears[0][1]).__name__}")


def _swap(engine: Engine, make: Callable[[nn.Linear], nn.Linear]) -> Engine:
    """Put ``make(linear)`` in place of linear layers; moving it to its device packs it."""
    for name, old in _linears(engine.model, BLOCK):
        new = make(old)
        new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(engine.model.get_submodule(parent), leaf, new.to(engine.device).eval())
    return engine


@technique(phase="compress", needs={"linear", "attention"}, requires={"bitsandbytes"},
           effect=_bitsandbytes_layers, replaces=("weights", "activations"),
           fidelity=budget("perplexity", 0.015, near_tie=NEAR_TIE, kl=0.005, accuracy=0.015,
                           cosine=0.01))  # fmt: skip
def bnb_int8(engine: Engine) -> Engine:
    """bitsandbytes' ``Linear8bitLt``: int8 rows times int8 columns.

    Helps memory, and speed where the library has int8 kernels (CUDA).  Rounds activations to fp16
    first, at every precision.  A tied embedding keeps its float table.
    Source: Dettmers et al. 2022 (LLM.int8), https://arxiv.org/abs/2208.07339
    """
    import bitsandbytes as bnb

    def make(old):
        new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, old.bias is not None,
                                  has_fp16_weights=False, device="meta")  # fmt: skip
        new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        return new

    logger = logging.getLogger("bitsandbytes.autograd._functions")  # it warns of fp16 at each call
    engine.undo.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.ERROR)
    return _swap(engine, make)


@technique(phase="compress", needs={"linear", "attention"}, requires={"bitsandbytes"},
           replaces="weights", effect=_bitsandbytes_layers,
           fidelity=budget("perplexity", 0.03, near_tie=0.2, kl=0.06, accuracy=0.02,
                           cosine=0.05))  # fmt: skip
def bnb_nf4(engine: Engine) -> Engine:
    """bitsandbytes' ``Linear4bit``: 16 levels at the quantiles of a normal, a scale per 64 weights.

    Helps memory: an eighth of fp32's bytes.  Does not help time where widening costs more than the
    bytes it saves.  Its CPU kernels compute in bf16 at every precision.  A tied embedding keeps its
    float table.
    Source: Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314
    """
    import bitsandbytes as bnb

    def make(old):
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, old.bias is not None, device="meta",
            compute_dtype=engine.dtype, quant_type="nf4")  # fmt: skip
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        return new

    return _swap(engine, make)


def _torchao_weights(engine: Engine, run: Callable) -> str:
    """Every linear layer's weight is a tensor of torchao's that holds int8."""
    linears = _linears(engine.model)
    foreign = [n for n, m in linears if not type(m.weight).__module__.startswith("torchao")]
    if foreign or not linears:
        raise NotEngaged(f"{len(foreign)} of {len(linears)} weights are not torchao's")
    weight: Any = linears[0][1].weight  # a tensor subclass
    inner = {n: getattr(weight, n) for n in weight.__tensor_flatten__()[0]}
    if not any(t.dtype == torch.int8 for t in inner.values()):
        raise NotEngaged(f"{type(weight).__name__} holds {[str(t.dtype) for t in inner.values()]}")
    activations = getattr(weight, "act_quant_kwargs", None) is not None
    run()
    kind = "int8 weights and activations" if activations else "int8 weights"
    return _sizes(engine, len(linears), f"torchao's {type(weight).__name__} ({kind})")


def _quantize(engine: Engine, config_name: str) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its import: compiled parts for other machines
        import torchao.quantization as ao

    config = getattr(ao, config_name)(set_inductor_config=False)  # other cells share this process
    ao.quantize_(engine.model, config, filter_fn=lambda m, n: isinstance(m, nn.Linear)
                 and not n.endswith("router"))  # fmt: skip
    return engine


@technique(phase="compress", needs={"linear", "attention"}, requires={"torchao"},
           replaces="weights", effect=_torchao_weights,
           fidelity=budget("perplexity", 0.003, kl=0.002, accuracy=0.01, cosine=0.002))  # fmt: skip
def torchao_int8_weight_only(engine: Engine) -> Engine:
    """torchao's ``Int8WeightOnlyConfig``: int8 per row, widened when used.

    Helps under ``torch.compile``, which fuses the widening.  A tied embedding keeps its float
    table.  Source: Or et al. 2025 (TorchAO), https://arxiv.org/abs/2507.16099
    """
    return _quantize(engine, "Int8WeightOnlyConfig")


@technique(phase="compress", needs={"linear", "attention"}, requires={"torchao"},
           replaces=("weights", "activations"), effect=_torchao_weights,
           fidelity=budget("perplexity", 0.015, near_tie=NEAR_TIE, kl=0.005, accuracy=0.015,
                           cosine=0.01))  # fmt: skip
def torchao_int8_dynamic(engine: Engine) -> Engine:
    """torchao's ``Int8DynamicActivationInt8WeightConfig``: activations quantized per token.

    Helps large products on hardware with int8 units, compiled.  A tied embedding keeps its float
    table.  Source: Or et al. 2025 (TorchAO), https://arxiv.org/abs/2507.16099
    """
    return _quantize(engine, "Int8DynamicActivationInt8WeightConfig")
