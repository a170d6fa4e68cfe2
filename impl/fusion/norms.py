"""Norms as one operator each, the residual addition before them included."""

from __future__ import annotations

from torch import Tensor, nn

from impl.core import Engine, NotEngaged, technique
from impl.fidelity import same_tokens

from .proofs import fewer_operators, operators_of, remember

LONE, ADDED, LAYER = "study::rms_norm", "study::add_rms_norm", "study::layer_norm"


def in_dtype(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of ``like``, which differs under autocast; no operator where it does not."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


class FusedRMSNorm(nn.Module):
    """``kernels.rms_norm`` with the weight of an ``RMSNorm``; x (..., C)."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.epsilon

    def forward(self, x: Tensor) -> Tensor:
        from kernels.rms_norm import rms_norm

        if x.dim() > 3:
            x = x.contiguous()  # heads cut out of a joint projection
        return rms_norm(in_dtype(x, self.weight), self.weight, self.epsilon)

    def after(self, delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + delta, x + delta), each (B, T, C)."""
        from kernels.add_rms_norm import add_rms_norm

        return add_rms_norm(in_dtype(delta, x), x, self.weight, self.epsilon)


class FusedLayerNorm(nn.Module):
    """``kernels.layer_norm`` with the parameters of an ``nn.LayerNorm``; x (..., C)."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        from kernels.layer_norm import layer_norm

        return layer_norm(in_dtype(x, self.weight), self.weight, self.bias, self.epsilon)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """A norm over the last dimension alone, with weight and bias."""
        return (
            type(module) is nn.LayerNorm
            and len(module.normalized_shape) == 1
            and module.bias is not None
        )


class FusedNormLayer(nn.Module):
    """A decoder layer whose additions are part of the norms behind them.

    What its MLP adds is handed on beside x, for the first norm of the next layer to add; the last
    layer has none behind it that sees all tokens, and adds by itself.
    """

    def __init__(self, layer: nn.Module, is_last: bool):
        super().__init__()
        self.input_norm, self.post_norm = layer.input_norm, layer.post_norm
        self.attention, self.mlp, self.is_last = layer.attention, layer.mlp, is_last

    def forward(self, x, cos, sin, mask=None, cache=None, positions=0):
        if isinstance(x, tuple):
            delta, x = x
            normed, x = self.input_norm.after(delta, x)
        else:
            normed = self.input_norm(x)
        delta = self.attention(normed, cos, sin, mask, cache, positions)
        normed, x = self.post_norm.after(delta, x)
        delta = self.mlp(normed)
        return x + delta if self.is_last else (delta, x)


def _norms_are_one_operator_each(engine: Engine, run) -> str:
    kinds = [type(m) for m in engine.model.modules()]
    if FusedNormLayer in kinds:
        added = 2 * kinds.count(FusedNormLayer) - 1
        ours = {ADDED: added, LONE: kinds.count(FusedRMSNorm) - added}
        gone = ("linalg_vector_norm", "rsqrt")
    else:  # one operator in place of one
        ours = {LAYER: kinds.count(FusedLayerNorm)}
        added, gone = 0, ("layer_norm", "native_layer_norm")
    proof = fewer_operators(engine, "fused_norm", ours, gone, added)
    run()  # whatever is compiled is compiled now
    seen = operators_of(run)
    used, left = sum(seen[name] for name in ours), sum(seen[name] for name in gone)
    if not used or left:
        raise NotEngaged(f"the canonical call dispatched {used} norms of ours and {left} others")
    return f"{proof}; {used} in one run"


@technique(phase="replace", needs={"attention"}, requires={"kernels"}, replaces="norms",
           fidelity=same_tokens, effect=_norms_are_one_operator_each)  # fmt: skip
def fused_norm(engine: Engine) -> Engine:
    """(x + d, norm(x + d) w) in one pass: x and d read once, each of the two written once.

    A decoder's residual additions move into the RMSNorms behind them, and a norm is one operator
    instead of five (bf16: six).  The sum is rounded to the precision before it is normalized, the
    norm once at its end.  Encoders keep their additions: their LayerNorms, one operator before
    and after, become ours.
    Helps where the tokens outgrow the caches, and where calls are cheap: a GPU's, or a step that is
    one call.  A small step on a CPU is 0.98 of the plain step's speed in fp32, 1.05 in bf16.  Does
    not in a compiled step, where it keeps the compiler from joining more.
    Source: Zhang and Sennrich 2019 (RMSNorm), https://arxiv.org/abs/1910.07467; Hsu et al. 2024
    (Liger kernels, the fused form), https://arxiv.org/abs/2410.10989
    """
    remember(engine, "fused_norm")
    fuse_norms(engine.model)
    return engine


def fuse_norms(model: nn.Module) -> None:
    """Put ours in place of the model's norms, and the additions of a lean decoder into them."""
    from impl.models.decoder import LeanDecoder, RMSNorm

    for name, module in list(model.named_modules()):
        if isinstance(module, RMSNorm):
            model.set_submodule(name, FusedRMSNorm(module))
        elif FusedLayerNorm.takes(module):
            model.set_submodule(name, FusedLayerNorm(module))
    if isinstance(model, LeanDecoder):
        last = len(model.layers) - 1
        model.layers = nn.ModuleList(
            FusedNormLayer(layer, i == last) for i, layer in enumerate(model.layers)
        )
