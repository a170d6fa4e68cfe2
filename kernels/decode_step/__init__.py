"""One step of the lean decoder as one C++ call: no operator is dispatched, no thread goes to sleep.

A step of a small model is hundreds of operators whose call takes longer than their arithmetic, and
each wakes the threads anew.  Here one parallel region holds the whole step; what remains is the
time of reading the weights.
Source: Spector et al. 2025 (megakernels),
https://hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from ctypes import POINTER, Structure, c_double, c_int, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels import build
from kernels.huge_pages import to_huge_pages
from kernels.linears import group_of, int4_checks
from kernels.op import KernelError, expect

if TYPE_CHECKING:
    from impl.models.decoder import LeanDecoder, RMSNorm

FP32, BF16, INT8, INT8_DYNAMIC, INT4 = range(5)
SMALLEST_CACHE = 32 << 20  # bytes of a last level that says nothing of itself


class _Linear(Structure):
    _fields_ = [("w", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("sums", c_void_p),
                ("n", c_int64), ("k", c_int64), ("kind", c_int64), ("group", c_int64)]  # fmt: skip


class _Layer(Structure):
    _fields_ = [*((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
                *((name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
                ("keys", c_void_p), ("values", c_void_p)]  # fmt: skip


class _Model(Structure):
    _fields_ = [*((name, c_int64) for name in ("layers", "hidden", "inner", "heads", "kv_heads",
                                               "head_dim", "vocab", "window", "cache_bf16",
                                               "slots", "narrow", "far")),
                ("eps", c_double),
                *((name, c_void_p) for name in ("final_norm", "cos", "sin")),
                ("embed", _Linear), ("head", _Linear), ("layer", POINTER(_Layer))]  # fmt: skip


class _Packed(Structure):
    _fields_ = [("starts", c_void_p), ("columns", c_void_p), ("wanted", c_int64)]


_STEP = (POINTER(_Model), c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64,
         c_void_p, c_int, c_int64, POINTER(_Packed))  # fmt: skip
MOST_TOKENS = 16  # of a row in one step; more are a prompt: other sums, for more arithmetic
MOST_ROWS = 256  # of a prompt in one call: its buffers stay in the caches


def is_far(weights: int, huge: int) -> bool:
    """Whether a step reads its weights best as four streams with nothing fetched ahead.

    That is so from memory, where ``huge`` bytes are on huge pages (bf16 1.12 times as fast, int8
    1.10, fp32 1.00 on a Zen 4); on ordinary pages, and from the caches, fetching pays there.
    """
    try:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (OSError, ValueError):  # another C library
        cache = 0
    return weights >= 2 * max(cache, SMALLEST_CACHE) and huge >= 0.9 * weights


class DecodeStep:
    """The step of one ``LeanDecoder`` on the CPU, over the very weights of its modules.

    model   a dense ``LeanDecoder``; its linears may hold fp32, bf16 or int8 weights (attributes
            ``weight`` (N, K) int8, ``scale`` (N,); with ``dynamic_activations`` true the
            activations are quantized per token, to int8), or int4 (``packed`` and ``scale`` as
            ``int4_linear.quantize`` makes them, ``out_features``; not the embedding)
    huge_pages  whether the weights' memory goes to pages of 2 MiB, where the kernel grants it
    Keys and values go to a ``KVCache``.  Activations are fp32 inside, whatever the weights.
    Raises ``KernelError`` for a mixture of experts, other dtypes, devices, caches.
    """

    def __init__(self, model: LeanDecoder, huge_pages: bool = True):
        config = self.config = model.config
        reason = build.lacks_compiler()
        expect(reason is None, f"decode_step: {reason}")
        expect(not config.num_experts, "decode_step runs dense decoders; leave it out for a "
               "mixture of experts")  # fmt: skip
        expect(config.head_dim % 2 == 0, "decode_step needs an even head_dim")
        self._keep: list[Tensor] = []  # what the C++ side points to
        self.layers = (_Layer * config.num_layers)()
        for to, layer in zip(self.layers, model.layers, strict=True):
            a, m = layer.attention, layer.mlp
            to.input_norm, to.post_norm = self._norm(layer.input_norm), self._norm(layer.post_norm)
            to.q_norm, to.k_norm = self._norm(a.q_norm), self._norm(a.k_norm)
            to.q, to.k, to.v, to.o = map(self._linear, (a.q_proj, a.k_proj, a.v_proj, a.o_proj))
            to.gate, to.up, to.down = map(self._linear, (m.gate_proj, m.up_proj, m.down_proj))
            kinds = [{(part.kind, part.group) for part in parts}
                     for parts in ((to.q, to.k, to.v), (to.gate, to.up))]  # fmt: skip
            expect(all(len(k) == 1 for k in kinds), "decode_step needs q, k and v stored alike, "
                   "and gate and up; quantize all of them or none")  # fmt: skip
        self.model = _Model(
            layers=config.num_layers, hidden=config.hidden_size, inner=config.intermediate_size,
            heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            vocab=config.vocab_size, window=config.sliding_window or 0, eps=config.norm_eps,
            final_norm=self._norm(model.norm), embed=self._linear(model.embed),
            head=self._linear(model.lm_head), layer=self.layers,
            narrow=model.norm.weight.dtype == torch.bfloat16)  # fmt: skip
        expect(self.model.embed.kind in (FP32, BF16, INT8), "decode_step needs a plain embedding")
        self.decoder, self._space = model, torch.empty(0)
        self.huge_bytes = to_huge_pages(self._keep) if huge_pages else 0
        self.model.far = is_far(self.bytes_moved(0), self.huge_bytes)
        # not kept alive: whoever lends caches must see when one is let go
        self._cache: Callable[[], object] = lambda: None
        self._tables(0)

    def _pointer(self, t: Tensor, dtype=None) -> int:
        expect(t.device.type == "cpu", f"decode_step runs on the CPU, not on {t.device}")
        t = t.detach().to(dtype or t.dtype).contiguous()
        self._keep.append(t)
        return t.data_ptr()

    def _norm(self, norm: RMSNorm | None) -> int | None:
        return None if norm is None else self._pointer(norm.weight, torch.float32)

    def _int4(self, module: Any) -> _Linear:
        packed, scale, n = module.packed, module.scale, module.out_features
        expect(not getattr(module, "dynamic_activations", False), "decode_step multiplies int4 "
               "weights with activations in fp32; take int4_weight_only_g32")  # fmt: skip
        x = torch.empty(0, packed.shape[1] * 8)
        int4_checks("decode_step")(x, packed, scale, n)
        bias = getattr(module, "bias", None)
        return _Linear(self._pointer(packed), self._pointer(scale),
                       None if bias is None else self._pointer(bias, torch.float32), None,
                       n, x.shape[1], INT4, group_of(packed, scale))  # fmt: skip

    def _linear(self, module: Any) -> _Linear:
        if hasattr(module, "packed"):
            return self._int4(module)
        weight = module.weight.detach()
        kinds = {torch.float32: FP32, torch.bfloat16: BF16, torch.int8: INT8}
        expect(weight.dtype in kinds and weight.dim() == 2 and weight.device.type == "cpu",
               "decode_step takes weights (N, K) in float32, bfloat16 or int8 on the CPU, not "
               f"{type(module).__name__} with {weight.dtype} {tuple(weight.shape)}")  # fmt: skip
        kind, scale, sums = kinds[weight.dtype], None, None
        if kind == INT8:
            scale = self._pointer(module.scale.reshape(-1), torch.float32)
            sums = self._pointer(weight.sum(1), torch.int32)
            if getattr(module, "dynamic_activations", "Dynamic" in type(module).__name__):
                kind = INT8_DYNAMIC
        bias = getattr(module, "bias", None)
        return _Linear(self._pointer(weight), scale,
                       None if bias is None else self._pointer(bias, torch.float32), sums,
                       *weight.shape, kind)  # fmt: skip

    def _tables(self, slots: int) -> None:
        self.decoder.extend_positions(slots)
        self.cos, self.sin = (t[:, 0].float().contiguous() for t in
                              (self.decoder.cos, self.decoder.sin))  # fmt: skip
        self.model.cos, self.model.sin = self.cos.data_ptr(), self.sin.data_ptr()

    def use(self, cache) -> None:
        """Keys and values of the next steps go to ``cache`` (a ``KVCache``)."""
        if cache is self._cache():
            return
        from impl.models.kv_cache import GrowingCache, KVCache

        expect(type(cache) in (KVCache, GrowingCache), "decode_step writes to a preallocated "
               f"KVCache, not to {type(cache).__name__}; leave one of them out")  # fmt: skip
        first = cache.keys[0]
        expect(first.dtype in (torch.float32, torch.bfloat16) and first.device.type == "cpu" and
               all(t.is_contiguous() for t in (*cache.keys, *cache.values)),
               f"decode_step needs a contiguous cache in float32 or bfloat16 on the CPU, not "
               f"{first.dtype} on {first.device}")  # fmt: skip
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self.model.slots, self.model.cache_bf16 = first.shape[2], first.dtype == torch.bfloat16
        if first.shape[2] > len(self.cos):
            self._tables(first.shape[2])
        self._cache = weakref.ref(cache)

    def _linears(self) -> list[_Linear]:
        names = ("q", "k", "v", "o", "gate", "up", "down")
        return [getattr(layer, name) for layer in self.layers for name in names] + [self.model.head]

    def bytes_moved(self, keys: int, batch: int = 1) -> int:
        """Least traffic of a step whose rows see so many ``keys``: every weight once.

        Norms are not counted; the cache's keys are those that ``use`` was given last.
        """
        m = self.model
        size = {FP32: 4, BF16: 2, INT8: 1, INT8_DYNAMIC: 1, INT4: 0.5}
        scales = {INT8: lambda w: 4 * w.n, INT8_DYNAMIC: lambda w: 4 * w.n,
                  INT4: lambda w: 2 * w.n * w.k // w.group}  # fmt: skip
        weights = sum(
            int(w.n * w.k * size[w.kind]) + scales.get(w.kind, lambda w: 0)(w)
            for w in self._linears()
        )
        cached = 2 * m.layers * m.kv_heads * m.head_dim * keys * (2 if m.cache_bf16 else 4)
        return int(weights + batch * (m.hidden * size[m.embed.kind] + cached))

    def flops(self, keys: int, batch: int = 1) -> int:
        """2 per weight and row; 4 per head dimension, query head and key."""
        m = self.model
        attention = 4 * m.layers * m.heads * m.head_dim * keys
        return batch * (2 * sum(w.n * w.k for w in self._linears()) + attention)

    def _expect_rows(self, batch: int, cache) -> None:
        rows = cache.keys[0].shape[0]
        expect(rows == batch, f"the cache holds {rows} rows, the ids have {batch}")

    def raw(self, batch: int, tokens: int, outputs: int, packed: _Packed | None = None):
        """``call(ids, positions, logits, argmax, steps=1)`` on addresses, for steps of one shape.

        ids and positions are int64 (B, T), argmax int64 (B, outputs) or 0, logits fp32
        (B, outputs, V); the threads are those that torch has now.  With several steps (T and
        outputs 1), ids are (steps, B), positions too, and argmax is the address of ids[1].
        """
        threads = torch.get_num_threads()
        step = build.cpu_function("decode_step", "decode_step", _STEP, c_int)
        sizes = (POINTER(_Model), *[c_int64] * 3, POINTER(_Packed))
        size = build.cpu_function("decode_step", "decode_step_workspace", sizes, c_int64)
        needed = size(self.model, batch, tokens, threads, packed)
        if self._space.numel() < needed:
            self._space = torch.empty(needed)
        model, space = ctypes.byref(self.model), self._space.data_ptr()

        def call(ids: int, positions: int, logits: int, argmax: int, steps: int = 1) -> None:
            status = step(model, ids, positions, batch, tokens, logits, argmax, outputs, space,
                          threads, steps, packed)  # fmt: skip
            if status:
                raise KernelError(
                    f"a token is outside the vocabulary of {self.model.vocab}" if status == 1 else
                    f"a position is outside the cache of {self.model.slots} slots; ask new_cache "
                    "for more")  # fmt: skip

        return call

    def __call__(self, ids: Tensor, positions: Tensor | int, cache, last_only: bool = False):
        """Logits (B, T, V) fp32, or (B, 1, V) of the last token; arguments as the decoder's.

        Without a cache the call has one of its own, of just its slots.
        """
        B, T = ids.shape
        if cache is None:
            cache = self._own_cache(positions, B, T)
        if not isinstance(positions, Tensor):
            positions = torch.arange(positions, positions + T).expand(B, T)
        expect(positions.shape == ids.shape and ids.dtype == positions.dtype == torch.int64,
               f"decode_step needs int64 ids and positions of one shape, not {tuple(ids.shape)} "
               f"{ids.dtype} and {tuple(positions.shape)} {positions.dtype}")  # fmt: skip
        self.use(cache)
        self._expect_rows(B, cache)
        most = max(MOST_ROWS // B, MOST_TOKENS)
        parts = list(zip(ids.split(most, 1), positions.split(most, 1), strict=True))
        logits = [self._part(*part, 0 if last_only else part[0].shape[1]) for part in parts[:-1]]
        logits.append(self._part(*parts[-1], 1 if last_only else parts[-1][0].shape[1]))
        return logits[0] if len(logits) == 1 else torch.cat(logits[-1:] if last_only else logits, 1)

    def _own_cache(self, positions: Tensor | int, batch: int, tokens: int):
        from impl.models.kv_cache import KVCache

        expect(isinstance(positions, int) and positions == 0, "decode_step without a cache starts "
               "at position 0; give it the cache that holds earlier tokens")  # fmt: skip
        return KVCache(self.config, batch, tokens, self.decoder.norm.weight.dtype)

    def packed(self, ids: Tensor, positions: Tensor, starts: Tensor, columns: Tensor, cache):
        """Logits (n, V) fp32 of ``columns`` (n,) of a step that holds tokens of several requests.

        ids, positions  (N,) int64, the place of each token in its own request
        starts          (N,) int64: the slot at which its request begins, in a cache of one row
        columns         (n,) int64, ascending

        A prompt's tokens stand in order; single tokens stand anywhere beside them.
        """
        self.use(cache)
        self._expect_rows(1, cache)
        given = ids, positions, starts, columns
        expect(all(t.dtype == torch.int64 and t.dim() == 1 for t in given) and
               ids.shape == positions.shape == starts.shape, "decode_step.packed needs int64 ids, "
               "positions and starts of one length, and int64 columns")  # fmt: skip
        tokens = [t.contiguous() for t in (ids, positions, starts)]
        ends = columns.tolist()
        expect(
            ends == sorted(ends) and all(0 <= e < len(ids) for e in ends),
            f"decode_step.packed needs ascending columns of {len(ids)} tokens, not {ends}",
        )
        logits, done = torch.empty(len(ends), self.model.vocab), 0
        for at in range(0, len(ids), MOST_ROWS):  # later tokens find earlier ones in the cache
            some, where, begin = (t[at : at + MOST_ROWS] for t in tokens)
            here = torch.tensor([e - at for e in ends[done:] if e < at + MOST_ROWS])
            packed = _Packed(begin.data_ptr(), here.data_ptr(), len(here))
            call = self.raw(len(some), 1, 1, packed)
            call(some.data_ptr(), where.data_ptr(), logits[done:].data_ptr(), 0)
            done += len(here)
        return logits

    def _part(self, ids: Tensor, positions: Tensor, outputs: int) -> Tensor:
        B, T = ids.shape
        logits = torch.empty(B, outputs, self.model.vocab)
        ids, positions = ids.contiguous(), positions.contiguous()
        self.raw(B, T, outputs)(ids.data_ptr(), positions.data_ptr(), logits.data_ptr(), 0)
        return logits

    def generate(self, first: Tensor, start: int, count: int, cache, on_token=None) -> Tensor:
        """Greedy: ``count`` tokens (B, count) after ``first`` (B, 1) at position ``start``.

        All steps are one call; with ``on_token``, who wants each token at once, one call a step.
        """
        B = len(first)
        self.use(cache)
        self._expect_rows(B, cache)
        tokens = torch.empty(count + 1, B, dtype=torch.int64)
        tokens[0] = first[:, 0]
        positions = torch.arange(start, start + count)[:, None].expand(count, B).contiguous()
        logits = torch.empty(B, self.model.vocab)
        call, at, row = self.raw(B, 1, 1), tokens.data_ptr(), 8 * B
        where, out = positions.data_ptr(), logits.data_ptr()
        if on_token is None:
            call(at, where, out, at + row, count)
            return tokens[1:].T
        for i in range(count):
            call(at + i * row, where + i * row, out, at + (i + 1) * row)
            on_token(tokens[i + 1][:, None])
        return tokens[1:].T
