"""The core: a technique is a function ``Engine -> Engine``, registered by ``@technique``.

    @technique(phase="compress", fidelity=budget("perplexity", 0.003), needs={"linear"},
               replaces="weights", effect=stored_as_int8)
    def int8_weight_only(engine): ...

The function's name is the technique's name and its id token; its module's name is its family and
a pytest marker.  ``stack`` orders a set of techniques by phase, ``build`` applies them.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .fidelity import Fidelity, same_tokens

if TYPE_CHECKING:  # importing torch takes two seconds; listing techniques must not
    import torch

    from .models import ModelSpec

PHASES = ("load", "train", "compress", "replace", "place", "compile", "decode", "schedule",
          "capture")  # fmt: skip
NEEDS = frozenset({"generate", "linear", "conv", "attention", "experts", "classify", "embed",
                   "lean", "unaligned", "draft", "qkv", "gelu"})  # fmt: skip
SLOTS = frozenset({"host", "weights", "activations", "cache", "decode", "scheduler", "compiler",
                   "prompt attention", "step attention", "norms", "qkv", "mlp",
                   "head"})  # fmt: skip


class StudyError(ValueError):
    """Bad input: one sentence that names the input and the remedy."""


class NotEngaged(AssertionError):
    """A technique that claims to be on is not."""


def nearest(kind: str, name: str, known: Iterable[str]) -> StudyError:
    """The error for an unknown ``name``: it names the nearest known one, or lists all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."
    return StudyError(f"unknown {kind} {name!r}; {hint}")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature 0 is greedy; ``top_p`` keeps the nucleus."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    """A prompt ``ids`` (T,) int64 that arrives ``arrival_s`` seconds after the replay starts."""

    id: int
    ids: torch.Tensor
    max_new_tokens: int
    arrival_s: float = 0.0


@dataclass
class Response:
    """Prompt and new tokens ``ids`` (T + new,); times in seconds after the replay starts."""

    id: int
    ids: torch.Tensor
    first_token_s: float
    done_s: float


@dataclass
class Engine:
    """A model and the ways to run it; what a technique receives, may change, and returns.

    ``generate(ids (B, T) int64, max_new_tokens, sampling=GREEDY, on_token=None)`` returns
    (B, T + max_new_tokens); ``serve(requests)`` returns responses in the same order.
    ``new_cache(batch, max_len)`` gives the KV cache that the lean decoder's loops write to.
    ``stats`` collects counters while the engine runs (``accept_rate``, ``kv_bytes``, ...).
    """

    spec: ModelSpec
    model: torch.nn.Module
    dtype: torch.dtype
    device: torch.device
    batch: int = 1
    generate: Any = None  # callables, as above; None where the model does not generate
    serve: Any = None
    new_cache: Callable[[int, int], Any] | None = None
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    stats: dict[str, Any] = field(default_factory=dict)

    def forward(self, inputs: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One forward: logits (B, T, V) or (B, classes), or embeddings (B, H)."""
        out = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
        return out.logits if hasattr(out, "logits") else out


Effect = Callable[[Engine, Callable[[], Any]], str]
Idle = Callable[[frozenset[str]], str | None]


@dataclass(frozen=True)
class Technique:
    """One row of the study; see ``technique`` for the fields."""

    name: str
    family: str
    phase: str
    apply: Callable[[Engine], Engine]
    fidelity: Fidelity
    effect: Effect
    needs: frozenset[str]
    requires: frozenset[str]
    replaces: frozenset[str]
    markers: frozenset[str]
    precisions: frozenset[str]
    min_batch: int
    host: str
    peer: str | None
    idle: Idle | None
    claim: str

    @property
    def is_peer(self) -> bool:
        """Somebody else's implementation: it stands in the table, it is not ours."""
        return self.name.startswith(("peer_", "bnb_", "torchao_"))


TECHNIQUES: dict[str, Technique] = {}


def technique(*, phase: str, effect: Effect, fidelity: Fidelity = same_tokens,
              needs: Iterable[str] = (), requires: Iterable[str] = (),
              replaces: Iterable[str] | str = (), markers: Iterable[str] = (),
              precisions: Iterable[str] = ("fp32", "bf16", "fp16"), min_batch: int = 1,
              host: str = "lean", peer: str | None = None, idle: Idle | None = None,
              variants: Mapping[str, Mapping[str, Any]] | None = None):  # fmt: skip
    """Register the decorated function under its own name, or once per entry of ``variants``.

    phase       where it stands in a stack, one of ``PHASES``
    effect      ``effect(engine, run) -> sentence`` proves that it is on, or raises ``NotEngaged``;
                ``run()`` performs the cell's canonical call once
    fidelity    how its output may differ from the stack without it
    needs       what the model must have (``NEEDS``)
    requires    what the machine must have (``cuda``, ``sm89``, ``avx512_vnni``, ``torchao``, ...)
    replaces    the slots it takes over alone (``SLOTS``)
    markers     further families it belongs to
    precisions  those at which it means something
    min_batch   the smallest batch at which it does anything
    host        for decoders: ``lean`` (ours), or ``transformers`` when it runs on theirs
    peer        the registered technique by somebody else that is measured in the same rounds
    idle        ``idle(names of a stack) -> sentence`` where another of them leaves it nothing to do
    variants    name -> keyword arguments of the function
    """
    slots = frozenset([replaces] if isinstance(replaces, str) else replaces)
    for word, known in ((phase, PHASES), (host, ("lean", "transformers"))):
        if word not in known:
            raise nearest("phase or host", word, known)
    if unknown := (set(needs) - NEEDS) | (slots - SLOTS):
        raise StudyError(f"unknown needs or slots {sorted(unknown)}; see NEEDS and SLOTS")

    def register(function):
        for name, options in (variants or {function.__name__: {}}).items():
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in TECHNIQUES:
                raise StudyError(f"technique name {name!r} is taken or not of the form [a-z0-9_]+")
            apply = (lambda o: lambda engine: function(engine, **o))(options)
            TECHNIQUES[name] = Technique(
                name, function.__module__.removeprefix("impl.").split(".")[0], phase, apply,
                fidelity, effect, frozenset(needs), frozenset(requires), slots,
                frozenset(markers), frozenset(precisions), min_batch, host, peer, idle,
                (function.__doc__ or "").strip().split("\n")[0])  # fmt: skip
        return function

    return register


def stack(*names: str) -> tuple[Technique, ...]:
    """The techniques of these names as a stack: a set, in the order of their phases."""
    for name in names:
        if name not in TECHNIQUES:
            raise nearest("technique", name, TECHNIQUES)
    return tuple(sorted({TECHNIQUES[n] for n in names},
                        key=lambda t: (PHASES.index(t.phase), t.name)))  # fmt: skip


def members(techniques: Iterable[Technique], needs: frozenset[str]) -> tuple[Technique, ...]:
    """The techniques to apply: a decoder that we can host runs on the lean decoder."""
    names = {t.name for t in techniques}
    if "lean" in needs and all(t.host == "lean" for t in techniques):
        names.add("lean_decoder")
    elif names and all(t.host == "lean" for t in techniques):
        names.add("eager")  # transformers' own module, generate and serve
    return stack(*names)


def build(engine: Engine, techniques: Iterable[Technique]) -> Engine:
    """Apply the techniques in phase order; each owns the engine it is given and returns it."""
    for t in members(techniques, engine.spec.needs):
        engine = t.apply(engine)
        if not isinstance(engine, Engine):
            raise TypeError(f"{t.name} returned {type(engine).__name__} instead of an Engine")
    return engine


def constant_when_compiled(function: Callable) -> Callable:
    """Mark ``function`` to be called while torch.compile traces, its result a constant.

    As ``torch.compiler.assume_constant_result``, which imports dynamo: a third of a second at each
    start of whoever compiles nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # dynamo looks for it
    return function
