"""Would the tests notice? Each technique is broken in turn, and must turn red."""

import dataclasses

import pytest
import torch

from impl.core import TECHNIQUES
from tests.matrix import Selection
from tests.plugins.engines import Checks, Pool

SMOKE = Selection("smoke").cells()


def a_cell_of(name):
    """The smoke cell of this technique alone, the smallest batch first."""
    cells = [c for c in SMOKE.values() if c.stack == name]
    if not cells:
        pytest.skip(f"{name} has no cell on this machine's smoke profile")
    return min(cells, key=lambda c: (c.batch, c.precision != "fp32"))


@pytest.fixture(scope="module")
def shared():
    """One pool for the unbroken references."""
    pools = []

    def make(selection, device):
        if not pools:
            pools.append(Pool(selection.specs, device))
        return pools[0]

    yield make
    for pool in pools:
        pool.close_all()


class BrokenPool(Pool):
    """Builds the stack under test from a broken technique, all else from the real ones."""

    def __init__(self, healthy: Pool, broken):
        super().__init__(healthy.specs, healthy.device)
        self.healthy, self.broken = healthy, broken

    def get(self, techniques, cell, precision=None):
        if [t.name for t in techniques] == [self.broken.name] and precision is None:
            key = "broken", cell
            if key not in self._built:
                self._built[key] = self._build((self.broken,), cell, cell.precision)
            return self._built[key]
        return self.healthy.get(techniques, cell, precision)


def caught(checks, cell) -> str:
    """The complaint that a broken cell provokes, or '' when nothing notices."""
    for check in (checks.effect, checks.same_output, checks.quality):
        try:
            check(cell)
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture
def breaking(request, shared, device, monkeypatch):
    """``breaking(name, sabotage)``: the complaint about a technique whose engine is sabotaged."""
    from impl import core
    from tests import matrix

    opened = []

    def run(name, apply):
        cell = a_cell_of(name)
        spec = SMOKE_SPECS[cell.model]
        if reason := matrix.missing(cell, spec, device):
            pytest.skip(reason)
        broken = dataclasses.replace(TECHNIQUES[name], apply=apply(TECHNIQUES[name]))
        monkeypatch.setitem(core.TECHNIQUES, name, broken)
        selection = Selection("smoke")
        pool = BrokenPool(shared(selection, device), broken)
        opened.append(pool)
        return caught(Checks(pool, selection, device), cell)

    yield run
    for pool in opened:
        pool.close_all()


SMOKE_SPECS = Selection("smoke").specs


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_that_does_nothing_is_caught(name, breaking):
    assert breaking(name, lambda t: lambda engine: engine)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_that_zeroes_its_output_is_caught(name, breaking):
    def zeroed(t):
        def apply(engine):
            engine = t.apply(engine)
            if engine.generate is None:
                forward = engine.model.forward
                engine.model.forward = lambda *a, **k: _zero(forward(*a, **k))
                return engine
            engine.generate = _after(engine.generate, _zero_new)
            engine.serve = _after_each(engine.serve, lambda r: _zero_new(r.ids[None], 1)[0])
            return engine

        return apply

    assert breaking(name, zeroed)


@pytest.mark.parametrize("name", [n for n, t in TECHNIQUES.items() if "generate" in t.needs])
def test_a_technique_that_skips_a_token_is_caught(name, breaking):
    def skipping(t):
        def apply(engine):
            engine = t.apply(engine)
            engine.generate = _after(engine.generate, lambda out, prompt: out[:, :-1])
            engine.serve = _after_each(engine.serve, lambda r: r.ids[:-1])
            return engine

        return apply

    assert breaking(name, skipping)


def _zero(out):
    if isinstance(out, torch.Tensor):
        return torch.zeros_like(out)
    for key in ("logits", "last_hidden_state", "pooler_output"):
        if isinstance(getattr(out, key, None), torch.Tensor):
            out[key] = torch.zeros_like(out[key])
    return out


def _zero_new(out, prompt):
    out = out.clone()
    out[:, prompt:] = 0
    return out


def _after(generate, change):
    return lambda ids, *a, **k: change(generate(ids, *a, **k), ids.shape[1])


def _after_each(serve, change):
    def serving(requests):
        answers = serve(requests)
        for answer in answers:
            answer.ids = change(answer)
        return answers

    return serving
