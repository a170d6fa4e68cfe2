"""Processes that run in turns: each goes on when the one before it says that it may."""

import os
import subprocess
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

VARIABLE = "STUDY_TURNS"  # file descriptors "to wait on,to write to" (tests/plugins/turns.py)


class Child:
    """A process that waits for a byte before each of its turns, and answers when it is over."""

    def __init__(self, command: Sequence[str], log: Path | None) -> None:
        wait_on, self.go = os.pipe()
        self.done, write_to = os.pipe()
        environment = {**os.environ, VARIABLE: f"{wait_on},{write_to}"}
        output = log.open("wb") if log else None
        try:
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=(wait_on, write_to), stdout=output,
                stderr=subprocess.STDOUT if output else None,
            )  # fmt: skip
        finally:
            os.close(wait_on)
            os.close(write_to)
            if output:
                output.close()

    def turn(self) -> bool:
        """Let it run until it passes its turn on; False when it has left, or ended."""
        try:
            os.write(self.go, b".")
        except BrokenPipeError:
            return False
        return os.read(self.done, 1) == b"."

    def close(self) -> None:
        for end in (self.go, self.done):
            os.close(end)


def in_turns(commands: Sequence[Sequence[str]], logs: Sequence[Path | None]) -> list[int]:
    """Run the commands in turns; their exit statuses (130: interrupted).

    ``logs``: where each one's output goes; None is here.
    """
    children = [Child(command, log) for command, log in zip(commands, logs, strict=True)]
    ring = deque(children)
    interrupted = False
    try:
        while ring:
            if ring[0].turn():
                ring.rotate(-1)
            else:
                ring.popleft()
    except KeyboardInterrupt:  # they got it too, and save what they have
        interrupted = True
    statuses = []
    for child in children:
        child.close()
        with suppress(KeyboardInterrupt):
            child.process.wait()
        statuses.append(130 if interrupted else child.process.returncode)
    return statuses
