"""The lean decoder: one readable transformer that runs Llama, Mistral, Qwen2, Qwen3 and Mixtral.

It computes what transformers computes, from the same weights (``from_transformers`` copies none),
without the framework around it: cosines and sines looked up in a table, one mask per step, a
preallocated cache, and no host synchronization, so that a step with tensor positions compiles to
one graph (``torch.compile(fullgraph=True)``).

``positions`` says where the tokens of a call stand: an int when every row starts at that place
(attention then reads just the slots in use), or a tensor (B, T) when rows stand at different
lengths or when shapes must not change from step to step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from impl.core import StudyError

from .kv_cache import GrowingCache, KVCache, causal_mask

__all__ = ["DecoderConfig", "GrowingCache", "KVCache", "LeanDecoder", "from_transformers"]

LEAN_TYPES = ("llama", "mistral", "qwen2", "qwen3", "mixtral")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
TABLE_POSITIONS = 16384  # rows of the cosine table made at first; it grows when asked


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; what ``LeanDecoder`` needs to be built, with no mention of its origin.

    ``rope_frequencies`` are the head_dim / 2 angles (radians) per position, after any scaling;
    ``rope_scale`` multiplies cosine and sine (yarn).  ``num_experts`` 0 is a dense MLP.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_frequencies: tuple[float, ...]
    rope_scale: float = 1.0
    rope_type: str = "default"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None
    num_experts: int = 0
    experts_per_token: int = 0

    @staticmethod
    def from_hf(hf) -> DecoderConfig:
        """The shape a transformers config describes; ``StudyError`` for what is not supported."""
        kind = hf.model_type
        if kind not in LEAN_TYPES:
            raise StudyError(
                f"the lean decoder runs {', '.join(LEAN_TYPES)}, not {kind!r}; use techniques that "
                "run on transformers' own model"
            )
        if hf.hidden_act not in ("silu", "swish"):
            raise StudyError(
                f"the lean decoder computes SwiGLU; {hf.hidden_act!r} in hidden_act of this {kind} "
                "checkpoint is not supported"
            )
        window = getattr(hf, "sliding_window", None)
        kinds = set(getattr(hf, "layer_types", None) or ())
        if kind in ("qwen2", "qwen3"):
            window = window if "sliding_attention" in kinds else None
            if len(kinds) > 1:
                raise StudyError(
                    f"this {kind} checkpoint mixes {' and '.join(sorted(kinds))} layers; the lean "
                    "decoder needs all layers alike: set use_sliding_window to false in config.json"
                )
        heads = hf.num_attention_heads
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
        frequencies, scale, rope_type = _rope(hf, head_dim)
        bias = bool(getattr(hf, "attention_bias", False))
        return DecoderConfig(
            vocab_size=hf.vocab_size, hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size, num_layers=hf.num_hidden_layers,
            num_heads=heads, num_kv_heads=getattr(hf, "num_key_value_heads", None) or heads,
            head_dim=head_dim, max_positions=hf.max_position_embeddings,
            norm_eps=hf.rms_norm_eps, rope_frequencies=frequencies, rope_scale=scale,
            rope_type=rope_type, qkv_bias=bias or kind == "qwen2", output_bias=bias,
            mlp_bias=bool(getattr(hf, "mlp_bias", False)), qk_norm=kind == "qwen3",
            tie_embeddings=bool(hf.tie_word_embeddings), sliding_window=window,
            num_experts=hf.num_local_experts if kind == "mixtral" else 0,
            experts_per_token=hf.num_experts_per_tok if kind == "mixtral" else 0,
        )  # fmt: skip


def _rope(hf, head_dim: int) -> tuple[tuple[float, ...], float, str]:
    """Angles per position, scale of cosine and sine, and type, by transformers' own rules."""
    parameters = dict(hf.rope_parameters or {})
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise StudyError(
            f"the lean decoder rotates whole heads with rope types {', '.join(ROPE_TYPES)}, not "
            f"{parameters}; use techniques that run on transformers' own model"
        )
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies, scale = 1.0 / parameters["rope_theta"] ** exponents, 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](hf, device="cpu")
    return tuple(frequencies.tolist()), float(scale), rope_type


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in fp32."""

    eps: Tensor

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.size, self.epsilon = size, eps
        self.register_buffer("eps", torch.tensor(eps, dtype=torch.float32), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if not self.eps.is_meta:  # stays fp32: fp16 would make 1e-6 a denormal
            self.eps = torch.tensor(self.epsilon, dtype=torch.float32, device=self.eps.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        # Few operations, because at batch 1 each costs as much as its arithmetic: 8 us against
        # 12 for pow, mean, add, rsqrt and 11 for F.rms_norm (eager, hidden 384, CPU).
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(torch.addcmul(self.eps, norm, norm, value=1.0 / self.size))
        normed = x * inverse
        if normed.dtype != x.dtype:
            normed = normed.to(x.dtype)
        return normed * self.weight

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.epsilon}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: x (B, T, H, D) by tables (B|1, T, 1, D) whose sine is negated in the first half.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values; ``layer`` is its place in the cache."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        c, D = config, config.head_dim
        self.layer, self.head_dim = layer, D
        self.grouped = c.num_heads != c.num_kv_heads
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * D, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * D, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * D, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * D, c.hidden_size, bias=c.output_bias)
        self.q_norm = RMSNorm(D, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(D, c.norm_eps) if c.qk_norm else None

    def forward(self, x, cos, sin, mask=None, cache=None, positions=0):
        B, T, _ = x.shape
        q, k, v = (part.view(B, T, -1, self.head_dim) for part in self.project(x))
        v = v.transpose(1, 2)  # (B, Hkv, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = rotate(k, cos, sin).transpose(1, 2)  # (B, Hkv, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)  # (B, Hkv, S, D)
        if hasattr(cache, "attend"):  # several requests in one row: it takes them apart
            out = cache.attend(self.attend, self.layer, q, k, v)
        else:
            out = self.attend(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H D), keys and values (B, T, Hkv D) of the tokens."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(D)) v; no mask is plain causal, or one query that sees all keys."""
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped
        )


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)).  Source: Shazeer 2020, https://arxiv.org/abs/2002.05202"""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """sum over the top k experts e of softmax(router(x))_e, renormalized, times expert_e(x).

    Source: Jiang et al. 2024 (Mixtral), https://arxiv.org/abs/2401.04088
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(config) for _ in range(config.num_experts))
        self.top_k = config.experts_per_token

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # (N, C)
        share = self.router(tokens).float().softmax(-1)  # (N, E)
        top, chosen = share.topk(self.top_k, dim=-1)  # (N, k)
        share = torch.zeros_like(share).scatter(1, chosen, top / top.sum(-1, keepdim=True))
        out = torch.zeros_like(tokens)
        if torch.compiler.is_compiling():  # which experts are hit is not known to a graph: all
            for e, expert in enumerate(self.experts):
                out = out + expert(tokens) * share[:, e, None].to(x.dtype)
            return out.view_as(x)
        for e in chosen.unique().tolist():
            hit = (chosen == e).any(-1).nonzero()[:, 0]  # tokens that go to this expert
            part = self.experts[e](tokens[hit]) * share[hit, e, None].to(x.dtype)
            out = out.index_add(0, hit, part)
        return out.view_as(x)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.post_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MixtureOfExperts(config) if config.num_experts else SwiGLU(config)

    def forward(self, x, cos, sin, mask=None, cache=None, positions=0):
        x = x + self.attention(self.input_norm(x), cos, sin, mask, cache, positions)
        return x + self.mlp(self.post_norm(x))


class LeanDecoder(nn.Module):
    """A decoder-only language model: ids (B, T) int64 -> logits (B, T, V) in the weights' dtype."""

    # greedy_run(token (B, 1), position, count, cache, on_token) -> (B, count): plain steps in one
    # call, where a technique has made one of them
    greedy_run = None

    layers: Any  # an nn.ModuleList, whose type forgets what it holds: DecoderLayer or the like
    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        # cosine and signed sine (positions, 1, D) of every position, in the dtype of the model
        self.register_buffer("cos", torch.empty(0, 1, config.head_dim), persistent=False)
        self.register_buffer("sin", torch.empty(0, 1, config.head_dim), persistent=False)
        if not self.embed.weight.is_meta:
            self.extend_positions(min(config.max_positions, TABLE_POSITIONS))

    def extend_positions(self, length: int) -> None:
        """Make the rotary tables reach ``length`` positions (no work when they do already)."""
        if length <= len(self.cos):
            return
        config, weight = self.config, self.norm.weight
        if config.rope_type == "dynamic" and length > config.max_positions:
            raise StudyError(
                f"{length} positions are more than the {config.max_positions} up to which dynamic "
                "rope scaling is static; shorten the prompt or the number of new tokens"
            )
        with torch.inference_mode(False):  # the model may be trained later
            frequencies = torch.tensor(config.rope_frequencies, device=weight.device)
            angles = torch.arange(length, device=weight.device)[:, None].float() * frequencies
            cos, sin = angles.cos() * config.rope_scale, angles.sin() * config.rope_scale
            self.cos = torch.cat((cos, cos), -1)[:, None].to(weight.dtype)  # (length, 1, D)
            self.sin = torch.cat((-sin, sin), -1)[:, None].to(weight.dtype)

    def hidden(self, ids: Tensor, positions: Tensor | int | None = None, cache=None) -> Tensor:
        """Hidden states (B, T, C) before the last norm; arguments as in ``forward``."""
        T = ids.shape[1]
        positions = 0 if positions is None else positions
        if isinstance(positions, Tensor):
            cos, sin = self.cos[positions], self.sin[positions]  # (B, T, 1, D)
        else:
            if positions + T > len(self.cos):
                self.extend_positions(positions + T)
            cos, sin = self.cos[positions : positions + T], self.sin[positions : positions + T]
        x = self.embed(ids)
        mask = self.mask(positions, x, cache)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache, positions)
        return x

    def mask(self, positions: Tensor | int, x: Tensor, cache=None) -> Tensor | None:
        """What ``attend`` is told of who sees whom among tokens x (B, T, C); once per call."""
        T = x.shape[1]
        if cache is None:
            return causal_mask(T, T, self.config.sliding_window, x)
        return cache.mask(positions, T, x.dtype)

    def forward(self, ids: Tensor, positions: Tensor | int | None = None, cache=None,
                last_only: bool = False, columns: Tensor | None = None,
                head: Callable[[Tensor], Tensor] | None = None) -> Tensor:  # fmt: skip
        """Logits (B, T, V), (B, 1, V) of the last token with ``last_only``, or of ``columns``.

        ids        (B, T) int64
        positions  (B, T) int64, or an int: every row starts there; None is 0
        cache      keys and values of earlier tokens; this call's are written at ``positions`` and
                   a query at position p sees the slots up to p.  None: a full causal forward
        columns    (N,) int64: logits (B, N, V) of these tokens alone
        head       what is made of the last hidden states (B, N, C) in place of logits
        """
        x = self.hidden(ids, positions, cache)
        if columns is not None:
            x = x[:, columns]
        return (head or self.lm_head)(self.norm(x[:, -1:] if last_only else x))


@torch.inference_mode(False)
def from_transformers(hf_model) -> LeanDecoder:
    """A ``LeanDecoder`` over the very parameters of a transformers model (nothing is copied).

    Raises ``StudyError`` for a type or an option that the lean decoder does not compute.
    """
    config = DecoderConfig.from_hf(hf_model.config)
    with torch.device("meta"):
        lean = LeanDecoder(config)

    def share(module: nn.Module, source, *names: str) -> None:
        for name in names or ("weight", "bias"):
            if getattr(module, name, None) is not None:
                setattr(module, name, getattr(source, name))

    def part(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight, requires_grad=weight.requires_grad)

    body = hf_model.model
    share(lean.embed, body.embed_tokens)
    share(lean.norm, body.norm)
    share(lean.lm_head, hf_model.lm_head)
    for ours, theirs in zip(lean.layers, body.layers, strict=True):
        share(ours.input_norm, theirs.input_layernorm)
        share(ours.post_norm, theirs.post_attention_layernorm)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            if getattr(ours.attention, name) is not None:
                share(getattr(ours.attention, name), getattr(theirs.self_attn, name))
        if not config.num_experts:
            for name in ("gate_proj", "up_proj", "down_proj"):
                share(getattr(ours.mlp, name), getattr(theirs.mlp, name))
            continue
        share(ours.mlp.router, theirs.mlp.gate)
        for e, expert in enumerate(ours.mlp.experts):
            gate, up = theirs.mlp.experts.gate_up_proj.detach()[e].chunk(2)  # each (inner, C)
            expert.gate_proj.weight, expert.up_proj.weight = part(gate), part(up)
            expert.down_proj.weight = part(theirs.mlp.experts.down_proj.detach()[e])
    for module in lean.modules():
        if isinstance(module, RMSNorm):
            device = module.weight.device
            module.eps = torch.tensor(module.epsilon, dtype=torch.float32, device=device)
    # made here, not on meta: empty tables of the right dtype and device, then filled
    like = lean.norm.weight
    lean.cos = lean.sin = torch.empty(0, 1, config.head_dim, dtype=like.dtype, device=like.device)
    lean.extend_positions(min(config.max_positions, TABLE_POSITIONS))
    return lean.train(hf_model.training)
