"""What torch dispatches: the trace in which joined operations are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from impl.core import Engine, NotEngaged

# matrix products of torch, and ours over packed weights
PRODUCTS = ("mm", "addmm", "bmm", "linear", "_int_mm", "_weight_int8pack_mm",
            *(f"study::{name}_linear" for name in ("int8", "int4", "int4_a8", "w8a8", "fp8")),
            )  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the operators that do something inside: ``mm``, ``view``, ``study::rms_norm``.

    Operators that are only made of others (``linear``) are taken apart, as in a profiler's trace.
    """

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        self.seen[func._overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def operators_of(call: Callable[[], object]) -> Counter[str]:
    """The operators that ``call()`` dispatches."""
    with torch.inference_mode(), Operators() as count:
        call()
    return count.seen


def operators_of_a_step(engine: Engine, grows: bool = True) -> Counter[str]:
    """The operators of one decode step of one row, or of one small forward; nothing is compiled.

    grows  the step's cache grows, or all its slots are there and the position is a tensor
    """
    model = getattr(engine.model, "eager", engine.model)
    if engine.new_cache is not None:
        from impl.models.kv_cache import GrowingCache, KVCache

        kind = GrowingCache if grows else KVCache
        cache = kind(model.config, 1, 16, engine.dtype, engine.device)
        token = torch.full((1, 1), 5, device=engine.device)
        position = 8 if grows else torch.full((1, 1), 8, device=engine.device)
        return operators_of(lambda: model(token, position, cache))
    if engine.spec.kind == "classifier":
        from impl.models.inputs import images

        inputs = images(engine.spec, 1, 0).to(engine.device, engine.dtype)
    else:
        inputs = torch.full((1, 8), 5, device=engine.device)
    return operators_of(lambda: model(inputs))


def remember(engine: Engine, name: str, grows: bool = True) -> None:
    """Keep what a step dispatches before the technique ``name`` changes the model."""
    engine.stats.setdefault("unfused", {})[name] = operators_of_a_step(engine, grows)


def fewer_operators(
    engine: Engine, name: str, ours: Mapping[str, int], gone: tuple[str, ...] = (), saved: int = 1
) -> str:
    """A step has the operators ``ours``, none that is ``gone``, and ``saved`` fewer than before.

    Returns the sentence that says so; raises ``NotEngaged`` for any of them.
    """
    before = engine.stats.get("unfused", {}).get(name)
    if before is None:
        raise NotEngaged(f"{name} is not installed on this engine")
    now = operators_of_a_step(engine)
    for operator, count in ours.items():
        if now[operator] != count:
            raise NotEngaged(f"a step dispatches {operator} {now[operator]} times, not {count}")
    if left := sum(now[operator] for operator in gone):
        raise NotEngaged(f"a step still dispatches {left} of {', '.join(gone)}")
    if before.total() - now.total() < saved:
        raise NotEngaged(f"a step dispatches {now.total()} operators, {before.total()} before")
    used = ", ".join(f"{count} {operator}" for operator, count in ours.items())
    less = f"{now.total()} operators a step, {before.total()} without"
    return f"{used}: {less}" if used else less
