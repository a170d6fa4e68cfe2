"""The matrix: models x precisions x batches x stacks -> cells.

A cell that cannot exist on any machine is never generated (``impossible``); one that this machine
cannot run is generated and skipped with a sentence (``missing``); a test asks only for the cells
that can move its number (``moves``).  Ids are the same on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import impl  # registers every technique
from impl.core import PHASES, TECHNIQUES, StudyError, Technique, members, nearest, stack
from impl.machine import lacks, memory_bytes
from impl.models import SPECS, ModelSpec, cut_to_fit, footprint_bytes

PRECISIONS = ("fp32", "bf16", "fp16")
BATCHES = (1, 8, 32, 64)

# Each stack answers the question beside it.
STACKS: tuple[tuple[str, ...], ...] = (
    # Does a preallocated cache help once the step is compiled, and is the result still the same?
    ("static_kv_cache", "torch_compile"),
    # Do fewer weight bytes pay once overhead is gone?
    ("int8_weight_only", "torch_compile"),
    # Does int8 arithmetic beat int8 storage in a compiled step?
    ("int8_dynamic", "torch_compile"),
    # The fastest with the same tokens at fp32: does speculation add to compilation?
    ("prompt_lookup", "torch_compile"),
    ("draft_model", "torch_compile"),
    # Does speculation still pay when the step it saves is already cheap?
    ("int8_weight_only", "prompt_lookup", "torch_compile"),
    # One C++ call per step instead of a compiled graph: how far does fusing by hand go ...
    ("decode_step", "int8_weight_only"),
    # Does int8 arithmetic beat int8 storage where nothing but the weights' bytes is left?
    ("decode_step", "int8_dynamic"),
    # Do weights of half the bytes again make the step twice as fast?
    ("decode_step", "int4_weight_only_g32"),
    # ... and is there anything left for speculation to save?
    ("decode_step", "prompt_lookup"),
    ("decode_step", "int8_weight_only", "prompt_lookup"),
    # How far does joining operators by hand, in Python, go against a compiler?
    ("decode_attention", "flash_attention", "fused_mlp", "fused_norm", "fused_qkv"),
    # Does quantization shorten the steps of a full batch too?
    ("continuous_batching", "int8_weight_only"),
    # How much of serving is the step, and how much the arithmetic of prompts?
    ("continuous_batching", "decode_step"),
)


@dataclass(frozen=True)
class Cell:
    """One point of the study: a stack of techniques on a workload."""

    techniques: tuple[Technique, ...]
    model: str
    precision: str
    batch: int

    @property
    def stack(self) -> str:
        """The names of the techniques in phase order, joined by ``+``."""
        return "+".join(t.name for t in self.techniques)

    @property
    def workload(self) -> str:
        return f"{self.model}-{self.precision}-batch{self.batch}"

    @property
    def id(self) -> str:
        return f"{self.stack}-{self.workload}"

    def of(self, *names: str) -> Cell:
        """The same workload under another stack."""
        return Cell(stack(*names), self.model, self.precision, self.batch)


def impossible(
    techniques: Sequence[Technique], spec: ModelSpec, precision: str, batch: int
) -> tuple[str, str] | None:
    """Why this cell can exist on no machine, as (scope, reason), or None.

    ``scope`` is how far the reason reaches: ``stack``, ``model``, ``precision`` or ``batch``.
    """
    hosts = {t.host for t in techniques}
    if len(hosts) > 1:
        return "stack", "one technique runs on transformers' model, another on the lean decoder"
    taken: dict[str, Technique] = {}
    for t in techniques:
        for slot in sorted(t.replaces):
            if (other := taken.setdefault(slot, t)) is not t:
                return "stack", f"{other.name} and {t.name} both replace the {slot}"
    names = frozenset(t.name for t in techniques)
    for t in techniques:
        if t.idle and (reason := t.idle(names)):
            return "stack", reason
    for t in techniques:
        if lacking := t.needs - spec.needs:
            return "model", f"{t.name} needs {', '.join(sorted(lacking))}; {spec.name} has none"
    for t in techniques:
        if precision not in t.precisions:
            return "precision", f"{t.name} means nothing at {precision}"
    for t in techniques:
        if batch < t.min_batch:
            return "batch", f"{t.name} needs a batch of {t.min_batch} or more"
    return None


def missing(cell: Cell, spec: ModelSpec, device: str = "cpu") -> str | None:
    """What this machine lacks to run the cell, as a sentence, or None."""
    for t in members(cell.techniques, spec.needs):
        for requirement in sorted(t.requires):
            if reason := lacks(requirement, device):
                return f"{t.name} {reason}"
    if cell.precision == "fp16" and device == "cpu":
        return "needs cuda for fp16; CPUs compute it through fp32"
    if reason := spec.lacks():
        return reason
    have, spec = session_memory(device), fitted(spec, cell, device)
    want = footprint_bytes(spec, cell.precision, cell.batch, copies=1)
    if want > have:
        return (
            f"needs {want / 1e9:.1f} GB of memory at batch {cell.batch}; {device} has "
            f"{have / 1e9:.1f} GB free: take a smaller --batches or a lower --precisions"
        )
    return None


@functools.cache
def session_memory(device: str) -> int:
    """Bytes that cells may take on ``device``: what was free when this was asked first."""
    return memory_bytes(device)


def fitted(spec: ModelSpec, cell: Cell, device: str) -> ModelSpec:
    """The spec of the cell's model, cut where its weights are random and do not fit twice."""
    return cut_to_fit(spec, cell.precision, cell.batch, session_memory(device))


def fits_one_at_a_time(cell: Cell, spec: ModelSpec, device: str) -> bool:
    """Whether the cell's model and its baseline must take turns in memory.

    Stacks that leave the weights as they are share them; the others hold their own, and
    ``eager`` at low precision stands beside fp32.
    """
    own = any(t.phase in ("train", "compress") or "weights" in t.replaces for t in cell.techniques)
    want = footprint_bytes(spec, cell.precision, cell.batch, copies=2 if own else 1)
    if cell.stack == "eager" and cell.precision != "fp32" and fits_in_fp32(cell, spec, device):
        want += footprint_bytes(spec, "fp32", cell.batch, copies=1)
    return want > session_memory(device)


def fits_in_fp32(cell: Cell, spec: ModelSpec, device: str) -> bool:
    """Whether the cell's model can be held against itself in fp32: beside it, or in turns."""
    if spec.layers:  # as many as fit at the cell's precision
        return cell.precision == "fp32"
    return footprint_bytes(spec, "fp32", cell.batch, copies=1) <= session_memory(device)


# What of the engine a phase writes; every other phase writes the model.
SLOT_OF_PHASE = {"decode": "decode", "schedule": "scheduler"}


def slots_of(t: Technique) -> set[str]:
    """What of the engine a technique writes: schedulers and decoders nothing but their slot."""
    for slot in ("scheduler", "decode"):
        if slot in t.replaces:
            return {slot}
    return {SLOT_OF_PHASE.get(t.phase, "model")} | (t.replaces & {"cache"})


def in_steps_only(t: Technique) -> bool:
    """Whether a forward without a cache is the same with this technique."""
    replaced = t.replaces - {"host"}
    return bool(replaced) and replaced <= {"cache", "step attention"}


def moves(cell: Cell, slots: Iterable[str]) -> bool:
    """Whether the cell can change a number measured over ``slots``.

    A test over ("model",) is moved by whatever rewrites the model; decoding techniques move only
    "decode", schedulers only "scheduler", caches "cache" as well as what they replace.  The
    baseline always can, as the yardstick of an A/A trial; but not where schedulers alone count:
    a replay of the trace takes seconds, and it is in the rounds of each of them.
    """
    wanted = set(slots)
    if any("scheduler" in t.replaces for t in cell.techniques):
        return "scheduler" in wanted  # one answer of it is that of the stack without a scheduler
    yardstick = wanted != {"scheduler"}
    return any(slots_of(t) & wanted or (yardstick and t.name == "eager") for t in cell.techniques)


@dataclass(frozen=True)
class Profile:
    """How much of the matrix a run takes, and how large its workloads are."""

    models: tuple[str, ...]
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    requests: int


ZOO = tuple(name for name, spec in SPECS.items() if not spec.auxiliary)
PROFILES = {
    # every technique once: what CI runs
    "smoke": Profile(("lm_small", "digits_resnet", "minilm"), ("fp32", "bf16"), (1, 8), 32, 16, 8),
    # about ten minutes on two CPU cores
    "core": Profile(
        ("lm_small", "digits_resnet", "minilm", "llama_1b"), ("fp32", "bf16"), (1, 8), 64, 24, 44
    ),
    # the claims that the README prints
    "headline": Profile(("lm_small",), ("fp32",), (1,), 64, 128, 44),
    # everything
    "full": Profile(ZOO, PRECISIONS, BATCHES, 128, 128, 128),
}


# What the README claims: framework overhead, whole steps, fewer bytes, fewer passes.
HEADLINE = [
    set(names.split("+"))
    for names in (
        "eager", "lean_decoder", "torch_compile", "decode_step",
        "torch_compile+prompt_lookup", "decode_step+prompt_lookup",
        "int8_weight_only+torch_compile", "int8_dynamic+torch_compile",
        "int8_weight_only+decode_step", "int8_weight_only+torch_compile+prompt_lookup",
        "int8_weight_only+decode_step+prompt_lookup", "int8_dynamic+decode_step",
    )
]  # fmt: skip


# One cell in core beside its batched bf16: they share arithmetic or weights with int8 and int4.
ONCE = {"fp8_dynamic": (), "int4_dynamic_g32": ("bf16",)}


def in_profile(name: str, techniques: tuple[Technique, ...], model: str, precision: str,
               batch: int) -> bool:  # fmt: skip
    """Whether the profile takes this cell of its axes (all of them, unless said here)."""
    names = {t.name for t in techniques}
    if name == "headline":
        return names in HEADLINE
    if name != "core":
        return True
    baseline, peer = names <= {"eager", "lean_decoder"}, techniques[-1].is_peer
    if model == "llama_1b":  # seconds a step: what a lean step is worth beyond the cache
        return names == {"lean_decoder"} and precision == "bf16" and batch == 1
    if len(names) == 1 and (extra := ONCE.get(techniques[0].name)) is not None:
        once = precision == "fp32" and batch == 1
        return model == "lm_small" and (once or (precision in extra and batch == 8))
    if model != "lm_small":  # one batch through an encoder or a classifier
        weights_compiled = names == {"int8_weight_only", "torch_compile"}
        own_batch = 1 if SPECS[model].kind == "encoder" else 8
        return batch == own_batch and (baseline or (precision == "fp32" and not weights_compiled))
    if any(t.min_batch > 1 for t in techniques):  # schedulers: a replay of the trace takes seconds
        return precision == "fp32" and batch == 8 and len(names - {"decode_step"}) == 1
    if precision == "fp32":
        compiles = "torch_compile" in names and len(names) == 2
        return batch == 1 and not (compiles and names & {"prompt_lookup", "draft_model"})
    # low precision: other arithmetic, other code, and what exists only there
    (last, *more) = reversed(techniques)
    elsewhere = {"activations", "compiler"} if batch == 1 else {"activations"}
    own = last.replaces & elsewhere or last.name in ("decode_step", "int8_weight_only")
    return not more and not peer and bool(baseline or own or "fp32" not in last.precisions)


@dataclass
class Selection:
    """The cells of a run: a profile, narrowed or widened by what the user asked for."""

    profile: str = "core"
    models: Sequence[str] = ()
    precisions: Sequence[str] = ()
    batches: Sequence[int] = ()
    techniques: Sequence[str] = ()  # stacks written a+b
    specs: dict[str, ModelSpec] = field(default_factory=lambda: dict(SPECS))

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise nearest("profile", self.profile, PROFILES)
        for kind, names, known in (
            ("model", self.models, self.specs),
            ("precision", self.precisions, PRECISIONS),
        ):
            for name in names:
                if name not in known:
                    raise nearest(kind, name, known)
        for batch in self.batches:
            if batch < 1:
                raise StudyError(f"batch {batch} is not a positive number; write --batches 1,8")

    @property
    def size(self) -> Profile:
        return PROFILES[self.profile]

    def stacks(self) -> list[tuple[Technique, ...]]:
        if self.techniques:
            return [stack(*s.split("+")) for s in self.techniques]
        singles = [(t,) for t in sorted(TECHNIQUES.values(), key=_table_order)]
        return singles + [stack(*s) for s in STACKS]

    def every(self) -> Iterator[tuple[tuple[Technique, ...], ModelSpec, str, int]]:
        """Stacks x models x precisions x batches, the impossible ones included."""
        size = self.size
        for techniques, model, precision, batch in product(
            self.stacks(), self.models or size.models, self.precisions or size.precisions,
            self.batches or size.batches):  # fmt: skip
            yield techniques, self.specs[model], precision, batch

    @property
    def asked(self) -> bool:
        """Whether the user named parts of the matrix: then the profile leaves none of them out."""
        return bool(self.techniques or self.precisions or self.batches or self.models)

    def takes(self, cell: Cell) -> bool:
        """Whether the profile takes this cell of its axes."""
        return self.asked or in_profile(
            self.profile, cell.techniques, cell.model, cell.precision, cell.batch
        )

    def cells(self) -> dict[str, Cell]:
        """Id -> cell of this run, in table order."""
        found: dict[str, Cell] = {}
        once: set[tuple[str, str]] = set()
        for techniques, spec, precision, batch in self.every():
            if impossible(techniques, spec, precision, batch):
                continue
            cell = Cell(techniques, spec.name, precision, batch)
            if not self.takes(cell):
                continue
            if self.profile == "smoke" and not self.asked:  # one of each stack and kind of model
                key = cell.stack, spec.kind
                if key in once:
                    continue
                once.add(key)
            found[cell.id] = cell
        return found

    def sparse(self) -> set[str]:
        """Ids of each technique's first cell per model: what a ``sparse`` test takes in core.

        The headline claims are about whole generations: none.
        """
        if self.profile == "headline":
            return set()
        first: dict[tuple[str, str], str] = {}
        for cell_id, cell in self.cells().items():
            (last, *more) = cell.techniques
            few = not more and not last.is_peer and not in_steps_only(last)
            if few and not self.specs[cell.model].random_weights:
                first.setdefault((cell.stack, cell.model), cell_id)
        return set(first.values())

    def impossible(self) -> dict[str, str]:
        """``stack[-model[-precision|-batch]]`` -> why it can exist on no machine."""
        found: dict[str, str] = {}
        for techniques, spec, precision, batch in self.every():
            if reason := impossible(techniques, spec, precision, batch):
                scope, why = reason
                name = "+".join(t.name for t in techniques)
                at = {"stack": "", "model": f"-{spec.name}",
                      "precision": f"-{spec.name}-{precision}",
                      "batch": f"-{spec.name}-batch{batch}"}[scope]  # fmt: skip
                found[name + at] = why
        return found


def _table_order(t: Technique) -> tuple[int, bool, int, str]:
    first = {"eager": 0, "lean_decoder": 1}.get(t.name, 2)
    return first, t.is_peer, PHASES.index(t.phase), t.name  # peers after those they are peers of


def tokens() -> tuple[str, ...]:
    """Every token that ids are made of; no one contains another (but technique names)."""
    return (*SPECS, *PRECISIONS, *(f"batch{b}" for b in BATCHES))


__all__ = ["BATCHES", "PRECISIONS", "PROFILES", "STACKS", "Cell", "Selection", "impl",
           "impossible", "missing", "moves", "tokens"]  # fmt: skip

if __name__ == "__main__":  # python -m tests.matrix > tests/data/impossible.txt
    for _name, _why in Selection("full").impossible().items():
        print(f"{_name}: {_why}")
