"""A record has every key, null where it does not apply, and never NaN."""

import copy
import json
import math

import pytest

from reports import schema

RECORD = {
    **schema.empty_record(),
    "cell": {
        "techniques": ["int8_weight_only"],
        "families": ["quantization"],
        "model": "lm_small",
        "precision": "fp32",
        "batch": 1,
        "device": "cpu",
        "workload": "decode",
    },
    "timing": "wall",
    "baseline": "eager",
    "speedup": 2.0,
    "speedup_low": 1.9,
    "speedup_high": 2.1,
    "pairs": 20,
    "verdict": "faster",
    "stop": "precise",
    "quality": [],
}


# ---- the schema --------------------------------------------------------------------------


def test_a_full_record_is_valid():
    schema.validate_record(RECORD)


@pytest.mark.parametrize("key", schema.record_keys())
def test_a_record_lacking_a_key_is_refused(key):
    record = {k: v for k, v in RECORD.items() if k != key}
    with pytest.raises(schema.SchemaError, match=key):
        schema.validate_record(record)


@pytest.mark.parametrize(
    "change",
    [
        {"speedup": math.nan},
        {"tokens_per_s": math.inf},
        {"speedup": 3.0},  # outside its interval
        {"pairs": 5},  # too few for the bounds it claims
        {"verdict": "great"},
        {"limit_fraction": 1.3},
        {"surprise": 1},
        {"effect": ""},
        {"quality": [{"metric": "kl"}]},
    ],
    ids=str,
)
def test_a_wrong_record_is_refused(change):
    with pytest.raises(schema.SchemaError):
        schema.validate_record({**copy.deepcopy(RECORD), **change})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ('{"benchmarks": [NaN], "not_run": []}', "NaN"),
        ("[]", "not a run of this study"),
        ('{"benchmarks": [], "machine_info": {}}', "not a run of this study"),
        ('{"benchmarks": [], "not_run": []}', "required"),
    ],
)
def test_a_foreign_or_broken_file_gets_one_sentence(tmp_path, text, says):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(schema.SchemaError, match=says) as error:
        schema.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_gets_one_sentence(tmp_path):
    with pytest.raises(schema.SchemaError, match="cannot be read"):
        schema.load(tmp_path / "none.json")


def test_nan_becomes_null():
    assert json.dumps(schema.nulls({"a": [math.nan, 1.0], "b": math.inf}), allow_nan=False) == (
        '{"a": [null, 1.0], "b": null}'
    )


@pytest.mark.parametrize(
    ("metric", "delta", "budget", "over"),
    [
        ("perplexity", 0.02, 0.03, False),
        ("perplexity", 0.04, 0.03, True),
        ("kl", math.nan, 0.03, True),
        ("top1_agreement", -0.02, -0.01, True),
        ("top1_agreement", 0.0, -0.01, False),
        ("accuracy", -0.5, None, False),
    ],
)
def test_quality_over_its_budget(metric, delta, budget, over):
    assert schema.over_budget({"metric": metric, "delta": delta, "budget": budget}) is over
