"""Runs constructed by a formula, for tests of what reports say of them; none was measured."""

import pytest

from reports.load import load_run
from tests.constructed_runs import constructed_run, save


@pytest.fixture(scope="module")
def constructed():
    """A whole run, as JSON."""
    return constructed_run()


@pytest.fixture(scope="module")
def small(constructed):
    """Enough for a page: quick to draw."""
    few = [b for b in constructed["benchmarks"] if b["group"] == "classify"]
    return {**constructed, "benchmarks": few}


@pytest.fixture
def run_of(tmp_path):
    """Save a constructed run and load it again."""
    made = iter(range(100))
    return lambda run: load_run(save(tmp_path / f"run{next(made)}.json", run))
