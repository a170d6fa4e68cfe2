"""Does the kept study hold what it claims?"""

import copy
from collections import defaultdict
from pathlib import Path

import pytest

from reports import schema
from reports.load import newest_runs

RESULTS = Path(__file__).parent.parent / "reports/results"
FEWEST_PAIRS = 6
OURS_TO_FIX = ("six pairs need", "the budget of", "failed", "the run ended", "the run was")


def records_of(raw) -> list[dict]:
    return [benchmark["extra_info"] for benchmark in raw["benchmarks"]]


def left_out(raw) -> dict[str, list[str]]:
    """Techniques of the run's matrix without a cell of six pairs -> why, but for what the machine
    itself cannot run.
    """
    measured, reasons = set(), defaultdict(list)
    for record in records_of(raw):
        if record["pairs"] >= FEWEST_PAIRS:
            measured.update(record["cell"]["techniques"])
    for entry in raw["not_run"]:
        for name in entry["cell"]["techniques"]:
            reasons[name].append(entry["reason"])
    return {
        name: why
        for name, why in reasons.items()
        if name not in measured and any(reason.startswith(OURS_TO_FIX) for reason in why)
    }


@pytest.fixture(params=newest_runs([RESULTS]), ids=lambda run: run.slug)
def kept(request):
    """The newest run of a machine, as saved."""
    return request.param.raw


def test_a_kept_run_is_valid(kept):
    schema.validate_run(kept)


def test_every_technique_has_six_pairs(kept):
    assert not left_out(kept)


def test_every_cell_has_a_record_or_a_reason(kept):
    assert len(records_of(kept)) + len(kept["not_run"]) > 60  # the core profile, whole
    assert all(entry["cell"] and entry["reason"] for entry in kept["not_run"])


def test_nothing_beats_its_limit(kept):
    assert max(record["limit_fraction"] or 0 for record in records_of(kept)) <= 1.05


def test_a_technique_without_time_would_be_found(kept):
    raw, name = copy.deepcopy(kept), "eager"
    for record in records_of(raw):
        if name in record["cell"]["techniques"]:
            record["pairs"] = 0
    cell = {"techniques": [name]}
    raw["not_run"] = [{"fullname": "x", "cell": cell, "reason": "the budget of 1 s leaves"}]
    assert list(left_out(raw)) == [name]
