"""CUDA graphs without CUDA: a step's operators recorded once, and repeated on the same memory.

What is recorded is what a graph keeps: which operator ran, on which tensors, with which numbers.
Repeating it runs the same operators on the same tensors and puts what they give where their
results lay.  So a number of Python's that changes from token to token stays what it was, a tensor
made afresh for each token is not looked at, and who reads a value back to the host is refused, as
CUDA refuses it during a capture.  Like a capture, recording leaves no result and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKED = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# what reads memory on the host without an operator of torch's, where tensors are on a CPU
TO_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__,
           Tensor.__float__, Tensor.__index__}  # fmt: skip
# operators that compute nothing: a graph has no kernel for them
VIEWS = {"view", "_unsafe_view", "transpose", "permute", "slice", "select", "split", "reshape",
         "split_with_sizes", "unsqueeze", "squeeze", "expand", "t", "as_strided", "detach", "alias",
         "chunk", "_reshape_alias", "empty", "empty_like", "new_empty", "lift_fresh"}  # fmt: skip


class Synchronized(RuntimeError):
    """The step reads a value on the host: CUDA ends a capture there."""


class _NoReadingBack(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in TO_HOST:
            raise Synchronized(f"{func.__name__} is not permitted while a stream is captured")
        return func(*args, **(kwargs or {}))


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def asks(func, given: list[Tensor]) -> bool:
    """Whether the operator's result has a shape, or is a number, that memory decides."""
    if func is torch.ops.aten.index.Tensor:  # by a mask, not by numbers
        return any(t.dtype == torch.bool for t in given[1:])
    return any(tag in func.tags for tag in ASKED)


class Recording(TorchDispatchMode):
    """The operators that run inside, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory written to, and what it held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if asks(func, given):
            raise Synchronized(f"{func} is not permitted while a stream is captured")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, Tensor):
                whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
                self.before.setdefault(storage(value), (whole, whole.clone()))
        out = func(*args, **kwargs)
        lent = {storage(t) for t in given}
        made = [t if isinstance(t, Tensor) and storage(t) not in lent else None
                for t in tree_leaves(out)]  # fmt: skip
        self.calls.append((func, args, kwargs, made))
        return out

    def forget_results(self) -> None:
        """A capture computes nothing: what it wrote is undone, what it made is no number."""
        for whole, held in self.before.values():
            whole.copy_(held)
        for *_, made in self.calls:
            for t in made:
                if t is not None and storage(t) not in self.before:
                    t.fill_(torch.nan if t.is_floating_point() else -1)

    def kernels(self) -> Counter[str]:
        """Names of the operators that compute something."""
        names = (func._schema.name.removeprefix("aten::") for func, *_ in self.calls)
        return Counter(name for name in names if name not in VIEWS)

    def repeat(self) -> None:
        # a graph is launched past torch's dispatcher: nobody who watches it sees the operators
        with no_dispatch():
            for func, args, kwargs, made in self.calls:
                for old, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                    if old is not None:
                        old.copy_(new)


class Recorder:
    """``capture(step, before)`` as ``CudaGraphs``; ``graphs`` are those made so far."""

    def __init__(self) -> None:
        self.graphs: list[Recording] = []

    def __call__(self, step: Callable[[], None], before: Callable[[], None]) -> Callable[[], None]:
        for _ in range(2):  # compiles and loads, and leaves what it leaves
            before()
            step()
        recording = Recording()
        with _NoReadingBack(), recording:
            step()
        recording.forget_results()
        self.graphs.append(recording)
        return recording.repeat
