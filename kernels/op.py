"""An operation: one meaning, several implementations, each an overload of one torch operator.

``torch.ops.study.rms_norm.cpu`` and ``.triton`` are ordinary operators of torch: they run under
``torch.compile`` without a graph break, and have a shape function and a FLOP formula.
Inference only: they have no gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from impl.core import StudyError, constant_when_compiled

_LIBRARY = torch.library.Library("study", "DEF")
OPS: dict[str, Op] = {}
IMPLS = ("reference", "cpu", "triton", "cuda")
MOST_PASSED = 1024  # kinds of arguments remembered by an operation: a cache grows by a slot a step


class KernelError(StudyError):
    """A kernel cannot take this input, or cannot be built here: one sentence with the remedy."""


def expect(condition: Any, sentence: str) -> None:
    """Raise ``KernelError(sentence)`` unless ``condition`` holds."""
    if not condition:
        raise KernelError(sentence)


class Op:
    """One operation and its implementations.

    name     folder under ``kernels``, and operator ``study::<name>``
    schema   torch's schema without the name: ``(Tensor x, Tensor weight, float eps) -> Tensor``
    check    ``check(*args)`` raises ``KernelError`` for wrong shapes, dtypes and devices
    fake     ``fake(*args)`` gives empty outputs of the right shape, dtype and device
    cpu      the CPU C++ implementation, as ``(*args) -> outputs``
    flops    ``flops(*shapes, out_shape=...)``: the count for ``FlopCounterMode``

    ``reference.py``, ``triton.py`` and ``cuda.py``-less folders declare what they have: reference
    and cpu are given here; a function named after the operation in ``triton.py`` and ``_cuda`` in
    the folder's module are found when first asked for.
    """

    def __init__(self, name: str, schema: str, *, check: Callable, fake: Callable,
                 reference: Callable, cpu: Callable | None = None, cuda: Callable | None = None,
                 triton: bool = True, flops: Callable | None = None):  # fmt: skip
        self.name, self.check, self.fake = name, check, fake
        self.passed: set[tuple] = set()  # what arguments looked like that ``check`` let through
        self.functions: dict[str, Callable] = {"reference": reference}
        if cpu is not None:
            self.functions["cpu"] = cpu
        if triton:
            self.functions["triton"] = self._triton
        if cuda is not None:
            self.functions["cuda"] = cuda
        self.overloads = {}
        for impl, function in self.functions.items():
            overload = f"{name}.{impl}"
            _LIBRARY.define(overload + schema)
            _LIBRARY.impl(overload, self._kernel(impl, function), "CompositeExplicitAutograd")
            torch.library.register_fake(f"study::{overload}", self._fake, lib=_LIBRARY)
            self.overloads[impl] = getattr(getattr(torch.ops.study, name), impl)
        if flops is not None:
            from torch.utils.flop_counter import register_flop_formula

            register_flop_formula(getattr(torch.ops.study, name))(flops)
        OPS[name] = self

    def __call__(self, *args, impl: str | None = None):
        """Run ``impl``, or the fastest that the device of the first argument has."""
        overload = self.overloads[ready(self.name, impl, args[0].device.type)]
        try:
            return overload(*args)
        except RuntimeError as error:
            reason = self._why_refused(str(error), *args)
            if reason is None:
                raise
        raise reason

    def _why_refused(self, said: str, *args) -> Exception | None:
        """The sentence for a call that C++ refused: its own for contents, else that of checks."""
        from kernels.calls import failure_of

        if said.startswith(f"{self.name} "):
            return KernelError(said)
        try:
            self.check(*args)
        except KernelError as reason:
            return reason
        return failure_of(self.name)

    def fastest(self, device: str) -> str:
        """The implementation chosen when none is named: compiled where it can be built."""
        order = ("cuda", "triton") if device == "cuda" else ("cpu",)
        for impl in order:
            if impl in self.functions and unavailable(impl, device) is None:
                return impl
        return "reference"

    def _kernel(self, impl: str, function: Callable) -> Callable:
        name, check = self.name, self._check_once

        def kernel(*args):
            device = args[0].device.type
            if (impl != "reference" and device != HOME[impl]) or impl == "triton":
                reason = unavailable(impl, device)
                expect(reason is None, f"{name}: {reason}")
            check(*args)
            return function(*args)

        return kernel

    def _check_once(self, *args) -> None:
        """``check``, but for arguments like some that passed it: it takes longer than a small row.

        Checks ask for shapes, strides, dtypes, devices and numbers alone, not for contents.
        """
        like = tuple([(a.shape, a.stride(), a.dtype, a.device) if isinstance(a, torch.Tensor) else a
                      for a in args])  # fmt: skip
        if like not in self.passed:
            self.check(*args)
            if len(self.passed) == MOST_PASSED:
                self.passed.clear()
            self.passed.add(like)

    def _fake(self, *args):
        self.check(*args)
        return self.fake(*args)

    def _triton(self, *args):
        module = importlib.import_module(f"kernels.{self.name}.triton")
        return getattr(module, self.name)(*args)


_READY: dict[tuple[str, str | None, str], str] = {}


@constant_when_compiled
def ready(name: str, impl: str | None, device: str) -> str:
    """The implementation that a call on ``device`` gets: ``impl``, or with None the fastest.

    Before the first call of a CPU implementation, its kernels are built and torch is told to call
    them in C++ (see ``calls``).  Raises ``KernelError`` for an unknown one and a failed build.
    """
    found = _READY.get((name, impl, device))
    if found is None:
        op = OPS[name]
        if impl is not None and impl not in op.overloads:
            known = ", ".join(op.overloads)
            raise KernelError(f"{name} has no implementation {impl!r}; it has {known}")
        found = impl or op.fastest(device)
        if found == device == "cpu":
            from kernels import calls

            calls.install(name)
        _READY[name, impl, device] = found
    return found


HOME = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


@constant_when_compiled
def unavailable(impl: str, device: str) -> str | None:
    """Why ``impl`` cannot run on tensors of ``device``, or None when it can."""
    from kernels import build

    if impl == "reference":
        return None
    if impl == "triton" and device == "cpu":
        if build.interpreting():
            return None
        return (
            "impl='triton' runs on CUDA tensors; move them there, or set TRITON_INTERPRET=1 "
            "before Python starts, to check numbers slowly on a CPU"
        )
    if device != HOME[impl]:
        return (
            f"impl={impl!r} runs on {HOME[impl]} tensors, not on {device}; move them, or take "
            f"impl='reference'"
        )
    return build.lacks_compiler() if impl == "cpu" else build.lacks_nvrtc(impl)


def rows_of(x: torch.Tensor, what: str) -> tuple[int, int]:
    """(number of rows, elements from one row's start to the next) of x (..., N).

    Raises ``KernelError`` when the last dimension is not dense or the rows are not evenly spaced.
    """
    n = x.shape[-1]
    if x.is_contiguous():
        return (x.numel() // n if n else x.shape[:-1].numel()), n
    expect(x.stride(-1) == 1 or n <= 1, f"{what} needs a last dimension of stride 1, not "
           f"{x.stride(-1)}; call .contiguous() on it")  # fmt: skip
    rows, step = 1, None
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        expect(stride == rows * step, f"{what} needs evenly spaced rows, not shape "
               f"{tuple(x.shape)} with strides {x.stride()}; call .contiguous() on it")  # fmt: skip
        rows *= size
    if 0 in x.shape:
        rows = 0
    return rows, n if step is None else step
