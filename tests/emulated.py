"""Devices and clocks that need no hardware: an asynchronous device, a clock that work moves."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Stream(ThreadPoolExecutor):
    """One queue of work, done in order."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)


class Device:
    """Two streams; ``synchronize`` waits for both, events see the first only, as on a GPU."""

    def __init__(self) -> None:
        self.current, self.other = Stream(), Stream()

        class Event:
            def __init__(event, enable_timing: bool = True) -> None:
                event.reached: Future[float] | None = None

            def record(event) -> None:
                event.reached = self.current.submit(time.perf_counter)

            def elapsed_time(event, end: Any) -> float:
                """Milliseconds, as torch.cuda.Event."""
                return (end.reached.result() - event.reached.result()) * 1e3

        self.Event = Event

    def kernel(
        self, seconds: float, compute: Callable[[Any], Any], stream: Stream | None = None
    ) -> Callable[[Any], Any]:
        """A call that launches ``seconds`` of work and returns; its result is right at once."""

        def launch(x: Any) -> Any:
            (stream or self.current).submit(time.sleep, seconds)
            return compute(x)

        return launch

    def synchronize(self) -> None:
        """Wait until all streams are idle."""
        for future in (self.current.submit(int), self.other.submit(int)):
            future.result()


class Ticker:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class Behind(Ticker, TorchFunctionMode):
    """A device on a clock: a launch takes no time, and waiting takes that of all launched before.

    Entered, it waits wherever torch would have to: where a tensor's values come to the host.
    """

    READS = (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__,
             torch.Tensor.__int__)  # fmt: skip

    def __init__(self) -> None:
        Ticker.__init__(self)
        TorchFunctionMode.__init__(self)
        self.pending = 0.0

    def launch(self, seconds: float) -> None:
        """Let the device have this much to do."""
        self.pending += seconds

    def finish(self, device: Any = None) -> None:
        """Wait for the device."""
        self.work(self.pending)
        self.pending = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = func is torch.Tensor.to and torch.device("cpu") in (*args[1:], *kwargs.values())
        if func in self.READS or to_host:
            self.finish()
        return func(*args, **kwargs)
