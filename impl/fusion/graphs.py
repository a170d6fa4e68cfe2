"""A decode step on CUDA: our fused kernels over static buffers, captured once, launched per token.

A step of few rows is a few hundred kernels of microseconds each, and launching one from Python
takes longer than it runs.  A CUDA graph keeps the launches, addresses and numbers of a step and
repeats them by one call.  So nothing in the step may change from token to token but what stands in
memory: tokens and positions are tensors, the cache stays where it is, and nobody reads a result.
Source: https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from impl.core import StudyError
from impl.machine import finish, lacks
from kernels.build import SUFFIX
from kernels.decode_attention import decode_attention
from kernels.decode_step import MOST_TOKENS
from kernels.lm_head_argmax import ROWS_AT_ONCE, lm_head_argmax
from kernels.op import expect
from kernels.rope import rope

from .norms import fuse_norms
from .projections import JOINED, FusedSwiGLU, join_qkv

if TYPE_CHECKING:
    from impl.models.decoder import LeanDecoder
    from impl.models.kv_cache import KVCache

Capture = Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]

# A graph holds the cache that it was captured over, so that its memory is never somebody else's;
# few graphs are few caches: greedy steps, logits and a verified draft over two of them, and two
# more.
MOST_GRAPHS = 8
SPARE = MOST_TOKENS - 1  # slots that a verified draft may count beyond the last position
WARM_UPS = 3  # calls before a capture, as torch's documentation has it


class CudaGraphs:
    """``capture(step, before)`` -> ``replay()``, which launches what ``step()`` launched.

    Before the capture ``step`` runs on a side stream, its inputs set by ``before`` each time:
    kernels are compiled and loaded then, libraries take their workspaces.  All graphs allocate
    from one pool, so the memory of intermediate results is that of the largest.  That is legal
    because they run one after another on one stream and results are copied before the next runs.
    """

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None], before: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    before()
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads ask of the driver meanwhile is their own affair
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                step()
        return graph.replay


@dataclass
class Captured:
    """A step over one cache: what it reads, what it leaves, and the call that repeats it."""

    ids: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64
    out: Tensor  # logits (B, T, V), or the text (B, slots + 1) that greedy steps write
    replay: Callable[[], None]
    held: tuple  # what the step reads by address


class GraphStep:
    """The step of one ``LeanDecoder`` as captured launches; called as ``DecodeStep`` is on a CPU.

    model    a dense ``LeanDecoder`` in fp32, bf16 or fp16; its linears are torch's, or ours over
             int8, int4 or fp8 weights.  Its norms, projections and MLPs are joined in place: a
             prompt takes the same kernels through the model's own ``forward``
    capture  ``capture(step, before) -> replay``: see ``CudaGraphs``
    stats    gets ``graph_replays`` and ``graphs_captured``
    Keys and values go to a ``KVCache`` in the model's dtype.  Tokens of a row stand one after
    another from its first position; places past its end, whose logits nobody reads, may share one.
    Raises ``KernelError`` for a mixture of experts, other dtypes, layers and caches, no room.
    """

    def __init__(self, model: LeanDecoder, capture: Capture, stats: dict[str, Any] | None = None):
        weight, config = model.norm.weight, model.config
        if reason := lacks("kernels", str(weight.device)):
            expect(False, f"decode_step {reason}")
        expect(not config.num_experts, "decode_step runs dense decoders; leave it out for a "
               "mixture of experts")  # fmt: skip
        expect(config.head_dim % 2 == 0, "decode_step needs an even head_dim; leave it out")
        expect(weight.dtype in SUFFIX, "decode_step takes a model in float32, bfloat16 or "
               f"float16, not {weight.dtype}; take --precisions bf16")  # fmt: skip
        for name, layer in model.named_modules():
            linear = isinstance(layer, nn.Linear) or hasattr(layer, "out_features")
            expect(not linear or type(layer) in JOINED, "decode_step holds linear layers of "
                   f"{', '.join(k.__name__ for k in JOINED)}, not the {type(layer).__name__} at "
                   f"{name}; leave one of the two out")  # fmt: skip
        self.model, self.config, self.capture = model, config, capture
        self.stats = {} if stats is None else stats
        self.stats.update(graph_replays=0, graphs_captured=0)
        self.graphs: OrderedDict[tuple, Captured] = OrderedDict()
        self._cache: tuple[Callable[[], object], tuple] = (lambda: None, ())
        # our CUDA C++ takes heads of up to 128, Triton larger ones
        wide = weight.device.type == "cuda" and config.head_dim > 128
        self.attention_impl = "triton" if wide else None
        self.cos = self.sin = torch.empty(0)
        join_layers(model)

    # ---- what is captured ------------------------------------------------------------------

    def hidden(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Normed hidden states (B, T, C) of tokens (B, T) at positions (B, T), both on the device.

        Keys and values are written at ``positions``.
        """
        model, (_, T) = self.model, ids.shape
        where = positions.view(-1)
        tables = self.cos[where], self.sin[where]  # (B T, D / 2) fp32
        lengths, mask = positions[:, 0] + T, None
        room = cache.keys[0].shape[2] - cache.max_len
        if cache.window or room < T - 1:  # a span cannot say who sees whom: a mask over all slots
            mask = cache.mask(positions, T, model.norm.weight.dtype)
        x, delta = model.embed(ids), None  # (B, T, C)
        for layer in model.layers:
            normed, x = (
                (layer.input_norm(x), x) if delta is None else layer.input_norm.after(delta, x)
            )
            q, k, v = self.turned(layer.attention, normed, *tables)
            delta = self.attend(layer.attention, q, k, v, positions, lengths, mask, cache)
            normed, x = layer.post_norm.after(delta, x)
            delta = layer.mlp(normed)
        return model.norm.after(delta, x)[0]

    def turned(self, attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor):
        """Queries (B, H, T, D), keys and values (B, Hkv, T, D) of x (B, T, C), rotated."""
        (B, T, _), c = x.shape, self.config
        heads = c.num_heads, c.num_kv_heads, c.num_kv_heads
        if hasattr(attention, "qkv_proj") and attention.q_norm is None:  # q and k turn together
            parts = attention.qkv_proj(x).view(1, B * T, sum(heads), c.head_dim)
            both = parts[:, :, : -c.num_kv_heads]
            both = rope(both if B * T == 1 else both.contiguous(), cos, sin)
            q, k = both.split(heads[:2], 2)
            v = parts[:, :, -c.num_kv_heads :]
        else:
            q, k, v = (p.view(1, B * T, -1, c.head_dim) for p in attention.project(x))
            if attention.q_norm is not None:
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k = (rope(t.contiguous(), cos, sin) for t in (q, k))
        return [t.reshape(B, T, -1, c.head_dim).transpose(1, 2) for t in (q, k, v)]

    def attend(self, attention, q, k, v, positions, lengths, mask, cache) -> Tensor:
        """What attention adds to the residual, (B, T, C); k and v go to the cache first."""
        keys, values = cache.update(attention.layer, k, v, positions)
        if mask is None:  # the spare slots too: spans are cut where keys end
            keys, values = cache.keys[attention.layer], cache.values[attention.layer]
            y = decode_attention(q, keys, values, lengths, impl=self.attention_impl)
        else:
            y = attention.attend(q, keys, values, mask)
        B, _, T, _ = q.shape
        return attention.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def best(self, x: Tensor) -> Tensor:
        """Tokens (B, 1) of the largest logits; few rows need no logits for it."""
        head = self.model.lm_head
        plain = type(head) is nn.Linear and head.bias is None and head.weight.dtype == x.dtype
        if plain and len(x) <= ROWS_AT_ONCE:
            return lm_head_argmax(x, head.weight)[1]
        return head(x).argmax(-1)

    # ---- graphs ----------------------------------------------------------------------------

    def addresses(self, cache) -> tuple:
        """Where a cache is and how it is cut; raises ``KernelError`` for one that is no rows."""
        from impl.models.kv_cache import GrowingCache, KVCache

        if cache is not None and cache is self._cache[0]():
            return self._cache[1]
        expect(type(cache) in (KVCache, GrowingCache), "decode_step writes to a preallocated "
               f"KVCache, not to {type(cache).__name__}; leave one of them out")  # fmt: skip
        dtype, first = self.model.norm.weight.dtype, cache.keys[0]
        expect(first.dtype == dtype, f"decode_step needs a cache in the model's {dtype}, not "
               f"{first.dtype}; ask the engine's new_cache for one")  # fmt: skip
        places = tuple(t.data_ptr() for t in (*cache.keys, *cache.values))
        # not kept alive: whoever lends caches must see when one is let go
        self._cache = weakref.ref(cache), (cache.max_len, *first.shape, *places)
        return self._cache[1]

    def captured(self, kind: str, ids: Tensor, positions: Tensor | int, cache) -> Captured:
        """The graph of this kind and shape over ``cache``, captured if need be, its inputs set."""
        B, T = ids.shape
        key = kind, B, T, self.addresses(cache)
        rows = cache.keys[0].shape[0]
        expect(rows == B, f"the cache holds {rows} rows, the ids have {B}; ask new_cache for {B}")
        if isinstance(positions, int):
            expect(0 <= positions <= cache.max_len - T, f"position {positions + T - 1} is outside "
                   f"the cache of {cache.max_len} slots; ask new_cache for more")  # fmt: skip
            expect(T == 1, "a captured step of several tokens needs their positions in a tensor")
        else:
            expect(positions.shape == ids.shape, "decode_step needs ids and positions of one "
                   f"shape, not {tuple(ids.shape)} and {tuple(positions.shape)}")  # fmt: skip
        if key not in self.graphs:
            self.graphs[key] = self.capture_step(kind, ids, positions, cache)
            self.stats["graphs_captured"] += 1
            if len(self.graphs) > MOST_GRAPHS:
                finish(ids.device)  # the oldest may be running
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        found = self.graphs[key]
        load(found, ids, positions)
        return found

    def capture_step(self, kind: str, ids: Tensor, positions: Tensor | int, cache) -> Captured:
        """Warm up and capture; the inputs are those of the step to come, so that the keys which
        warming up leaves in the cache are the right ones.
        """
        self.tables(cache.max_len)
        whole = copy.copy(cache)  # the same tensors, though its owner may ask for fewer slots
        whole.slots = whole.max_len
        held = whole, self.cos, self.sin
        made = Captured(torch.empty_like(ids), torch.empty_like(ids), ids, lambda: None, held)
        if kind == "greedy":
            made.out = ids.new_zeros(len(ids), cache.max_len + 1)

        def logits() -> None:
            made.out = self.model.lm_head(self.hidden(made.ids, made.positions, whole))

        def greedy() -> None:
            token = self.best(self.hidden(made.ids, made.positions, whole))
            made.positions.add_(1)
            made.out.scatter_(1, made.positions, token)
            made.ids.copy_(token)  # the input of the next

        def before() -> None:
            load(made, ids, positions)

        with torch.autocast(ids.device.type, enabled=False):  # weights are read as they are
            made.replay = self.capture(greedy if kind == "greedy" else logits, before)
        return made

    def tables(self, slots: int) -> None:
        """Cosine and sine (positions, D / 2) fp32; graphs keep those they were captured with."""
        self.model.extend_positions(slots)
        if len(self.cos) != len(self.model.cos):
            half = self.config.head_dim // 2
            self.cos = self.model.cos[:, 0, :half].float().contiguous()
            self.sin = self.model.sin[:, 0, half:].float().contiguous()  # its first half is -sin

    def replay(self, graph: Captured) -> None:
        graph.replay()
        self.stats["graph_replays"] += 1

    # ---- the interface of DecodeStep -------------------------------------------------------

    def takes(self, ids: Tensor, positions: Tensor | int, cache, last_only: bool) -> bool:
        """Whether a call is a step: a token a row, or a draft to verify.  Prompts are not."""
        tokens = ids.shape[1]
        if cache is None or not 0 < tokens <= MOST_TOKENS:
            return False
        return tokens == 1 or (isinstance(positions, Tensor) and not last_only)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor | int, cache) -> Tensor:
        """Logits (B, T, V) in the model's dtype, the caller's own."""
        graph = self.captured("logits", ids, positions, cache)
        self.replay(graph)
        return graph.out.clone()

    @torch.inference_mode()
    def generate(self, first: Tensor, start: int, count: int, cache, on_token=None) -> Tensor:
        """Greedy: ``count`` tokens (B, count) after ``first`` (B, 1) at position ``start``.

        Graph after graph: the token that one writes is the input of the next, and the host reads
        none of them.  ``on_token`` gets each (B, 1) once it is launched.
        """
        expect(start + count <= cache.max_len, f"{count} tokens from position {start} on do not "
               f"fit into the cache of {cache.max_len} slots; ask new_cache for more")  # fmt: skip
        if not count:
            return first[:, :0]
        graph = self.captured("greedy", first, start, cache)
        for at in range(start + 1, start + count + 1):
            self.replay(graph)
            if on_token is not None:
                on_token(graph.out[:, at : at + 1].clone())
        return graph.out[:, start + 1 : start + count + 1].clone()


def load(graph: Captured, ids: Tensor, positions: Tensor | int) -> None:
    """Put a step's inputs where the graph reads them."""
    graph.ids.copy_(ids)
    if isinstance(positions, int):
        graph.positions.fill_(positions)
    else:
        graph.positions.copy_(positions)


def join_layers(model: LeanDecoder) -> None:
    """Norms with the additions before them; q, k and v, and gate and up, as one product each.

    Layers that cannot be joined (int4 whose outputs do not end between blocks) stay as they are.
    """
    from impl.models.decoder import SwiGLU

    for layer in model.layers:
        if not hasattr(layer.attention, "qkv_proj"):
            _unless_refused(lambda a=layer.attention: join_qkv(a))
        if type(layer.mlp) is SwiGLU:
            layer.mlp = _unless_refused(lambda m=layer.mlp: FusedSwiGLU(m)) or layer.mlp
    fuse_norms(model)


def _unless_refused(join: Callable[[], Any]) -> Any:
    try:
        return join()
    except StudyError:
        return None


def power_of_two(length: int, most: int) -> int:
    """Slots of a cache for ``length``, ``most`` positions being all that the model has.

    A graph is captured per size, and slots not in use cost a span nothing but their memory.
    """
    return max(length, min(most, max(256, 1 << (length - 1).bit_length())))
