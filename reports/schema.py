"""The shape of a run's JSON (schema.json), and the one place that checks it.

A run is a pytest-benchmark file. ``extra_info`` of each benchmark is a *record*: every key of
the schema, null where it does not apply (``trace`` is there only with ``--save-trace``).
"""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from impl.core import StudyError

SCHEMA_FILE = Path(__file__).with_name("schema.json")

HIGHER_IS_BETTER = ("agreement", "accuracy", "cosine", "sqnr", "completion", "recall", "f1")


class SchemaError(StudyError):
    """A record or a file is not what the schema says; one sentence, naming the key."""


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of a whole run."""
    loaded: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return loaded


def record_keys() -> tuple[str, ...]:
    """The keys that every record has."""
    return tuple(schema()["$defs"]["record"]["required"])


def empty_record() -> dict[str, Any]:
    """A record with every key null: fill what applies."""
    return dict.fromkeys(record_keys())


@functools.cache
def _validator(definition: str | None) -> Any:
    from jsonschema import Draft202012Validator

    whole = schema()
    Draft202012Validator.check_schema(whole)
    if definition is None:
        return Draft202012Validator(whole)
    return Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": whole["$defs"]})


def validate_record(record: Any, source: str = "record") -> None:
    """Raise `SchemaError` unless ``record`` is an ``extra_info`` of the study."""
    _check(record, "record", source)
    low, middle, high = (record[k] for k in ("speedup_low", "speedup", "speedup_high"))
    if low is not None and not low <= middle <= high:
        raise SchemaError(f"{source}: speedup {middle} lies outside its interval {low}..{high}")


def validate_run(run: Any, source: str = "run") -> None:
    """Raise `SchemaError` unless ``run`` is a whole file of the study."""
    _check(run, None, source)
    for benchmark in run["benchmarks"]:
        validate_record(benchmark["extra_info"], f"{source}: {benchmark['fullname']}")


def load(path: str | Path) -> dict[str, Any]:
    """Read and validate a run; errors are one sentence that names the file and the remedy."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SchemaError(f"{path} cannot be read ({error.strerror}); give a saved run") from error
    except UnicodeDecodeError as error:
        raise SchemaError(f"{path} is not UTF-8 text; give a JSON file of this study") from error
    try:
        run = json.loads(text, parse_constant=_no_literal)
    except ValueError as error:
        raise SchemaError(f"{path} is not valid JSON ({error}); measure again") from error
    if not isinstance(run, dict) or "benchmarks" not in run or "not_run" not in run:
        raise SchemaError(
            f"{path} is not a run of this study; make one with "
            "`pytest --benchmark-only --benchmark-json FILE`"
        )
    validate_run(run, str(path))
    return run


def nulls(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by None, as JSON needs."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(item) for item in value]
    return value


def higher_is_better(metric: str) -> bool:
    """Whether more of this quality metric is better (accuracy), or less (perplexity, kl)."""
    return any(part in metric for part in HIGHER_IS_BETTER)


def over_budget(quality: dict[str, Any]) -> bool:
    """Whether a metric moved past the worst delta allowed; NaN counts as past it.

    ``budget`` has the sign of the bad direction: +0.03 for perplexity, -0.01 for accuracy.
    """
    if quality["budget"] is None:
        return False
    delta = quality["delta"]
    if delta is None or not math.isfinite(delta):
        return True
    if higher_is_better(quality["metric"]):
        return bool(delta < quality["budget"])
    return bool(delta > quality["budget"])


def _check(value: Any, definition: str | None, source: str) -> None:
    for path in _not_finite(value):
        raise SchemaError(f"{source}: {path} is NaN or infinite, which JSON lacks; write null")
    errors = sorted(_validator(definition).iter_errors(value), key=lambda e: list(map(str, e.path)))
    for error in errors:
        where = ".".join(map(str, error.absolute_path)) or "the top level"
        message = error.message if len(error.message) < 300 else error.message[-300:]
        raise SchemaError(f"{source}: {where}: {message}")


def _not_finite(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path or "the value"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _not_finite(item, f"{path}[{i}]")


def _no_literal(name: str) -> Any:
    raise ValueError(f"the literal {name}")
