"""Several pytest processes that measure in turns: while one runs, the others wait.

``make headline`` starts them (reports.turns) and hands each the ends of two pipes in
``STUDY_TURNS``.  A turn passes on after every round of samples, so that all processes meet the
same machine, and what still differs between them is theirs: the layout of memory, compiled code.
Seconds of waiting are on no clock.
"""

from __future__ import annotations

import os
import time

import pytest

VARIABLE = "STUDY_TURNS"


class Turns:
    """The turn of this process; alone, or once the others' parent is gone, it always has it."""

    def __init__(self, ends: str | None = None):
        self.waited = 0.0
        self._go: int | None = None
        self._done: int | None = None
        if ends:
            self._go, self._done = map(int, ends.split(","))
        for end in (self._go, self._done):
            if end is not None:
                os.set_inheritable(end, False)

    def clock(self) -> float:
        """Seconds, without those of waiting."""
        return time.perf_counter() - self.waited

    def wait(self) -> float:
        """Wait for the turn; returns the seconds it took."""
        if self._go is None:
            return 0.0
        start = time.perf_counter()
        if not os.read(self._go, 1):
            self._go = self._done = None
        seconds = time.perf_counter() - start
        self.waited += seconds
        return seconds

    def pass_on(self) -> float:
        """Give the turn to the next process and wait for it to return; seconds of waiting."""
        self._say(b".")
        return self.wait()

    def leave(self) -> None:
        """Give the turn away for good."""
        self._say(b"x")
        self._go = self._done = None

    def _say(self, word: bytes) -> None:
        if self._done is not None:
            try:
                os.write(self._done, word)
            except BrokenPipeError:
                self._go = self._done = None


turns = Turns(os.environ.pop(VARIABLE, None))  # popped: no child of this process takes part


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart() -> None:
    """Collecting, building and checking are done in turns too."""
    turns.wait()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    turns.leave()
