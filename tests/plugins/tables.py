"""Rounds of a cell: of its own, or those in which the cells of its table are sampled together.

The stacks of a table share their baseline and their inputs.  One after another, each would time
the baseline again, and most of a session would go into it: rounds that hold every stack once give
several times as many pairs in the same seconds.  What is sampled here is filed only by the test of
each cell, after its own checks.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pytest

from tests.plugins.blocks import matmul_yardstick, sample_blocks
from tests.plugins.sampler import Call, DoesNotFit, Limits, Rounds, sample_rounds
from tests.plugins.study import SEED, Study
from tests.plugins.turns import turns

MOST = 12  # cells sampled together: their records come late, and Ctrl-C must not cost much
AGAIN = " again"  # the second side of a stack paired with itself


def variant_name(own: str, names: Mapping[str, str]) -> str:
    """What the variant is called among its opponents; in an A/A trial it is one of them."""
    return own + AGAIN if own in names.values() else own


@dataclass(frozen=True)
class TableCell:
    """A cell of the table that is still to come: its stack and who it is measured against."""

    name: str  # of its test
    builders: Mapping[str, Callable[[], Call]]  # stack -> what builds its call


@dataclass
class Sides:
    """The sides of one cell: calls, seconds of one call before, and what the others are called."""

    calls: dict[str, Call]
    known: dict[str, float]
    names: Mapping[str, str]


@dataclass
class Company:
    """The stacks of a table that are built and run: calls, and seconds of one of each."""

    calls: dict[str, Call]
    known: dict[str, float]
    groups: list[list[str]] = field(default_factory=list)  # per cell: its stack and its opponents

    def join(self, cell: TableCell, x: Any, watch: Any) -> float:
        """Build and call once what the cell is measured with; the seconds it took.

        One whose stack fails is left out: its own test tells why.
        """
        start = time.perf_counter()
        with contextlib.suppress(Exception):
            for stack, build in cell.builders.items():
                if stack not in self.calls:
                    self._add(stack, build(), x, watch)
            self.groups.append(list(cell.builders))
        return time.perf_counter() - start

    def _add(self, stack: str, call: Call, x: Any, watch: Any) -> None:
        start = time.perf_counter()
        call(x)
        watch.synchronize()
        self.known[stack] = time.perf_counter() - start
        self.calls[stack] = call

    def sample(
        self, inputs: Sequence[Any], watch: Any, limits: Callable[[int], Limits], reference: str
    ) -> Rounds | None:
        """Rounds of as many cells as fit, the first ones; None where only one does.

        ``limits(cells)``: what so many cells may take.
        """
        groups = self.groups
        while len(groups) > 1:
            sides = {stack: self.calls[stack] for stack in dict.fromkeys(chain(*groups))}
            given = limits(len(groups))
            given.known = {stack: s for stack, s in self.known.items() if stack in sides}
            try:
                return sample_rounds(sides, inputs, watch, given, SEED, reference)
            except DoesNotFit:
                groups = groups[: len(groups) // 2]
        return None


class Sampling:
    """Takes the samples of one cell within the session's budget.

    ``seconds`` went into them, and into building the other cells of its table.
    """

    def __init__(self, study: Study, name: str) -> None:
        self.study, self.name = study, name
        self.seconds, self.pairs = 0.0, 0

    def rounds(
        self, info: dict[str, Any], sides: Sides, inputs: Sequence[Any], watch: Any,
        table: Sequence[TableCell] = (), take_turns: bool = False,
    ) -> Rounds:  # fmt: skip
        """Kept rounds in which all sides stood, the table's, or the cell's own."""
        kept, cell, timing = self.study.rounds, info["cell"], info["timing"]
        own = "+".join(cell["techniques"])
        stacks = {"variant": variant_name(own, sides.names)}
        stacks |= {side: sides.names[side] for side in sides.calls if side != "variant"}
        found = kept.find(cell, timing, stacks)
        if found is None and len(table) > 1 and not take_turns and "baseline" in sides.calls:
            if together := self._together(sides, stacks, inputs, watch, table):
                kept.keep(cell, timing, own, together.seconds)
            found = kept.find(cell, timing, stacks)
        if found is not None:
            whose, rounds = found
            if whose != own:
                info["sampled_with"] = whose
        else:
            rounds = self._alone(sides, inputs, watch, take_turns)
            named = {stacks[side]: seconds for side, seconds in rounds.seconds.items()}
            kept.keep(cell, timing, own, named)
        self.pairs = len(rounds)
        return rounds

    def _together(
        self, sides: Sides, stacks: Mapping[str, str], inputs: Sequence[Any], watch: Any,
        table: Sequence[TableCell],
    ) -> Rounds | None:  # fmt: skip
        company = Company(
            {stacks[side]: call for side, call in sides.calls.items()},
            {stacks[side]: seconds for side, seconds in sides.known.items()},
        )
        budget = self.study.budget
        for cell in table[:MOST]:
            own = cell.name == self.name
            if not own and not budget.affords(cell.name):
                break
            seconds = company.join(cell, inputs[0], watch)
            if not own:
                budget.prepay(cell.name, seconds)
                self.seconds += seconds
        try:
            with self._sampling():
                return company.sample(inputs, watch, self._limits, stacks["baseline"])
        except Exception as error:  # somebody else's: this cell is measured all the same
            self.study.marks.append(f"{self.name}: sampled alone, its table ended in {error!r}")
            return None

    def _alone(self, sides: Sides, inputs: Sequence[Any], watch: Any, take_turns: bool) -> Rounds:
        limits = self._limits()
        limits.known = sides.known
        try:
            with self._sampling():
                if not take_turns:
                    return sample_rounds(sides.calls, inputs, watch, limits, SEED)
                yardstick = matmul_yardstick(self.study.device)
                rounds, dropped = sample_blocks(sides.calls, inputs, watch, limits, yardstick, SEED)
        except DoesNotFit as error:
            pytest.skip(f"{error}; raise --bench-budget or name this cell")
        self.study.marks.append(
            f"{self.name}: no two of its models fit, so they took turns in memory; {dropped} "
            "rounds dropped because the machine drifted"
        )
        return rounds

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[None]:
        """Count these seconds as spent on samples."""
        began = turns.clock()
        try:
            yield
        finally:
            self.seconds += turns.clock() - began

    def _limits(self, cells: int = 1) -> Limits:
        budget, name = self.study.budget, self.name
        return Limits(
            seconds=budget.share(name, cells),
            precision=self.study.precision,
            overspend=lambda needs: budget.may_overspend(name, needs, cells),
            settling=2 if self.study.device.startswith("cuda") else 1,  # each was called once
            pause=turns.pass_on,
        )
