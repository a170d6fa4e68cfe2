"""Linear layers that read the same input, as one product over one weight."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from impl.core import Engine, NotEngaged, StudyError, technique
from impl.fidelity import same_tokens
from impl.quantization.fp8 import Fp8Linear
from impl.quantization.int4 import Int4DynamicLinear, Int4Linear
from impl.quantization.layers import Int8DynamicLinear, Int8Linear

from .proofs import PRODUCTS, fewer_operators, operators_of, operators_of_a_step, remember

OURS = "study::swiglu"
BLOCK = 16  # outputs of ``Int4Linear`` that are packed together


# ---- [W1; W2] x = [W1 x; W2 x] -----------------------------------------------------------


def join(*linears: nn.Module) -> nn.Module:
    """One linear layer (..., K) -> (..., N1 + N2 + ...) with the outputs of all, in order.

    Float, int8, fp8 and int4 layers of ours, all alike; scales belong to outputs and are joined
    with them, and what quantizes activations by token quantizes them once.
    Raises ``StudyError`` for other kinds, and int4 layers that do not end between blocks.
    """
    kind = type(linears[0])
    if kind not in JOINED or any(type(m) is not kind for m in linears):
        kinds = " and ".join(sorted({type(m).__name__ for m in linears}))
        raise StudyError(
            f"layers of type {kinds} cannot be joined, only {', '.join(k.__name__ for k in JOINED)}"
            " with its like; leave fused_qkv and fused_mlp out of this stack"
        )
    return JOINED[kind](linears)


def _joined(tensors) -> Tensor | None:
    """The tensors behind one another, zeros in place of a bias that is not there."""
    return None if tensors[0] is None else torch.cat([t.detach() for t in tensors])


def _biases(linears) -> Tensor | None:
    biases = [m.bias for m in linears]
    if all(b is None for b in biases):
        return None
    like = next(b for b in biases if b is not None)
    return _joined([like.new_zeros(m.out_features) if m.bias is None else m.bias for m in linears])


def _join_float(linears) -> nn.Linear:
    if any(type(m.weight) not in (Tensor, nn.Parameter) for m in linears):
        raise StudyError(
            f"weights of type {type(linears[0].weight).__name__} cannot be joined; leave fused_qkv "
            "and fused_mlp out of this stack"
        )
    weight, bias = _joined([m.weight for m in linears]), _biases(linears)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear


def _join_bytes(linears) -> Int8Linear | Fp8Linear:
    dtype = linears[0].weight.dtype
    weight = _joined([m.weight.view(torch.int8) for m in linears]).view(dtype)
    return type(linears[0])(weight, _joined([m.scale for m in linears]), _biases(linears))


def _join_int4(linears) -> Int4Linear:
    if odd := [m.out_features for m in linears[:-1] if m.out_features % BLOCK]:
        raise StudyError(
            f"int4 layers of {odd[0]} outputs cannot be joined, only of multiples of {BLOCK}; "
            "leave fused_qkv and fused_mlp out of this stack"
        )
    packed, scale = (_joined([getattr(m, n) for m in linears]) for n in ("packed", "scale"))
    outputs = sum(m.out_features for m in linears)
    return type(linears[0])(packed, scale, outputs, _biases(linears))


JOINED = {
    nn.Linear: _join_float,
    Int8Linear: _join_bytes,
    Int8DynamicLinear: _join_bytes,
    Fp8Linear: _join_bytes,
    Int4Linear: _join_int4,
    Int4DynamicLinear: _join_int4,
}


# ---- proofs ------------------------------------------------------------------------------


def _remember(engine: Engine, name: str) -> None:
    from impl.models.costs import weight_bytes

    remember(engine, name)
    engine.stats.setdefault("unjoined_bytes", {})[name] = weight_bytes(engine.model)


def _products(seen) -> int:
    return sum(seen[name] for name in PRODUCTS)


def _one_product(engine: Engine, name: str, saved: int, ours=None) -> str:
    """A step has ``saved`` products fewer than before, and no weight is held twice."""
    from impl.models.costs import weight_bytes

    proof = fewer_operators(engine, name, ours or {})
    before = _products(engine.stats["unfused"][name])
    now = _products(operators_of_a_step(engine))
    if not saved or before - now < saved:
        raise NotEngaged(f"a step has {now} matrix products, {before} before")
    if weight_bytes(engine.model) != engine.stats["unjoined_bytes"][name]:
        raise NotEngaged("joining weights left copies of them behind")
    return f"{proof}; {now} products, {before} without, over as many bytes"


@contextlib.contextmanager
def _zeroed(linears: list[nn.Module]):
    """What the layers multiply by is zero inside, and what it was after."""
    tensors = [t for m in linears for t in (m.scale if hasattr(m, "scale") else m.weight,)]
    kept = [t.clone() for t in tensors]
    try:
        for t in tensors:
            t.zero_()
        yield
    finally:
        for t, values in zip(tensors, kept, strict=True):
            t.copy_(values)


# ---- q, k and v --------------------------------------------------------------------------


class FusedSelfAttention(nn.Module):
    """transformers' BERT-type self-attention with q, k and v from one product.

    x (B, T, C), mask (B, 1, T, T) or None -> ((B, T, C), None).
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.num_heads = attention.num_attention_heads
        self.qkv_proj = join(attention.query, attention.key, attention.value)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_):
        B, T, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(B, T, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return out.transpose(1, 2).reshape(B, T, -1), None

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """An encoder's attention over SDPA, its projections under BERT's names."""
        config = getattr(module, "config", None)
        return (
            type(module).__name__.endswith("SelfAttention")
            and all(isinstance(getattr(module, n, None), nn.Module) for n in BERT_NAMES)
            and getattr(config, "_attn_implementation", None) == "sdpa"
            and not getattr(config, "is_decoder", False)
        )


BERT_NAMES = ("query", "key", "value")


def _joint_projections(engine: Engine) -> list[nn.Module]:
    return [m.qkv_proj for m in engine.model.modules() if hasattr(m, "qkv_proj")]


def _q_k_v_are_one_product(engine: Engine, run) -> str:
    from impl.quantization.int8 import values

    joint = _joint_projections(engine)
    proof = _one_product(engine, "fused_qkv", 2 * len(joint))
    with _zeroed(joint):
        without = [t.clone() for t in values(run())]
    if all(torch.equal(a, b) for a, b in zip(values(run()), without, strict=True)):
        raise NotEngaged("the canonical call returns the same with zeros for the joint weights")
    return f"{proof}; the canonical call reads the joint weights of {len(joint)} layers"


def join_qkv(attention: nn.Module) -> None:
    """Give the lean decoder's attention one projection in place of three."""
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    widths = [p.out_features for p in parts]
    attention.qkv_proj = join(*parts)
    for name in ("q_proj", "k_proj", "v_proj"):
        delattr(attention, name)
    attention.project = lambda x: attention.qkv_proj(x).split(widths, -1)


@technique(phase="replace", needs={"qkv"}, replaces="qkv", fidelity=same_tokens,
           effect=_q_k_v_are_one_product)  # fmt: skip
def fused_qkv(engine: Engine) -> Engine:
    """[Wq; Wk; Wv] x = [q; k; v]: one product over one weight, cut into three views.

    The same sums over the same bytes, with grouped heads and biases; the three weights are let go,
    so nothing is held twice.  Quantized layers are joined as they are (scales belong to outputs),
    and int8 activations are quantized once instead of three times.
    Helps where a product costs more to call than its bytes to read: over quantized weights (a step
    of `lm_small` 1.08 times as fast with `int8_weight_only`, 1.06 with `int4_weight_only_g32`, 1.09
    with `int8_dynamic`).  Does not where bytes decide (fp32 1.00, bf16 1.03), nor in a compiled
    step, with no calls to save.
    Source: Shoeybi et al. 2019 (Megatron-LM, whose attention has one such weight),
    https://arxiv.org/abs/1909.08053
    """
    from impl.models.decoder import Attention

    model = engine.model
    _remember(engine, "fused_qkv")
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            join_qkv(module)
        elif FusedSelfAttention.takes(module):
            model.set_submodule(name, FusedSelfAttention(module))
    return engine


# ---- gate and up -------------------------------------------------------------------------


class FusedSwiGLU(nn.Module):
    """down(swiglu(gate(x), up(x))): one product for gate and up, one operator between."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_up_proj = join(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        from kernels.swiglu import swiglu

        gate, up = self.gate_up_proj(x).chunk(2, -1)  # views: (..., N) with rows 2 N apart
        return self.down_proj(swiglu(gate, up))


def _gate_and_up_are_one_product(engine: Engine, run) -> str:
    mlps = [m for m in engine.model.modules() if isinstance(m, FusedSwiGLU)]
    if not mlps:
        raise NotEngaged("no MLP of the model has its gate and up in one weight")
    active = _active_mlps(engine)
    proof = _one_product(engine, "fused_mlp", active, {OURS: active})
    run()  # whatever is compiled is compiled now
    seen = operators_of(run)
    if not seen[OURS] or seen["silu"]:
        raise NotEngaged(
            f"the canonical call dispatched {seen[OURS]} swiglu and {seen['silu']} silu"
        )
    return f"{proof}; {seen[OURS]} swiglu in one run"


def _active_mlps(engine: Engine) -> int:
    """MLPs that a token passes through: one a layer, or the experts chosen for it."""
    config = engine.model.config
    return config.num_layers * (config.experts_per_token if config.num_experts else 1)


@technique(phase="replace", needs={"generate", "lean"}, requires={"kernels"}, replaces="mlp",
           fidelity=same_tokens, effect=_gate_and_up_are_one_product)  # fmt: skip
def fused_mlp(engine: Engine) -> Engine:
    """down(silu(g) u) with [g; u] = [Wg; Wu] x: two products and one operator between them.

    Gate and up are one product over one weight (the two are let go); ``kernels.swiglu`` reads both
    halves where they lie and writes their product once, where eager writes silu(g) and reads it.
    Helps where activations outgrow the caches: 3 passes over them instead of 5.  Does not in a
    small step on a CPU (0.98 of the plain step's speed in fp32, 1.01 in bf16), nor where the
    products take the time.
    Source: Shazeer 2020 (SwiGLU), https://arxiv.org/abs/2002.05202; Hsu et al. 2024 (Liger kernels,
    the fused form), https://arxiv.org/abs/2410.10989
    """
    from impl.models.decoder import SwiGLU

    _remember(engine, "fused_mlp")
    for name, module in list(engine.model.named_modules()):
        if isinstance(module, SwiGLU):
            engine.model.set_submodule(name, FusedSwiGLU(module))
    return engine
