"""Kernel cells: operations of ``kernels/`` timed as the study times stacks; see kernel_speed.

They are a question of their own and take no share of the study's budget unless they are asked
for: by naming ``tests/test_kernels.py``, an operation with ``-k``, or ``--profile full``; and only
where times are taken (``--benchmark-only``), or by the node id of one cell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import kernel_speed, step_speed

MARK = "kernels"


def asked_for(config: pytest.Config) -> bool:
    """Whether this run wants kernel cells."""
    option = config.option
    paths = [arg.partition("::") for arg in config.args]
    files = [Path(path).name for path, _, _ in paths]
    if any(node.startswith("test_speed") for _, _, node in paths):
        return True
    if not (option.benchmark_only or option.collectonly):
        return False
    ops = (*kernel_speed.SPEEDS, step_speed.OP)
    named = any(op in option.keyword for op in ops)
    return named or "test_kernels.py" in files or option.profile == "full"


def cells(selection: Any) -> dict[str, Any]:
    """Id -> cell: single operations, and the whole decode step."""
    return kernel_speed.cells(selection) | step_speed.cells(selection)


def is_kernel_test(item: pytest.Item) -> bool:
    """Whether a test times kernels."""
    return item.get_closest_marker(MARK) is not None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One parameter per kernel cell; those that cannot run here are skipped with the reason."""
    if metafunc.definition.get_closest_marker(MARK) is None:
        return
    config = metafunc.config
    device = config.study_device  # type: ignore[attr-defined]
    found = cells(config.selection) if asked_for(config) else {}  # type: ignore[attr-defined]
    params = []
    for name, cell in found.items():
        reason = cell.missing(device)
        skip = [pytest.mark.skip(reason=reason)] if reason else []
        params.append(pytest.param(name, id=name, marks=[cell.mark(), *skip]))
    if found:
        params += [undescribed(op) for op in kernel_speed.CASES if op not in kernel_speed.SPEEDS]
    metafunc.parametrize("cell", params)


def undescribed(op: str) -> Any:
    """An operation that nobody said how to time: it is not left out in silence."""
    reason = f"{op} has no Speed yet: describe one beside its Case in tests/kernel_cases"
    marks = [pytest.mark.cell(techniques=op, model=kernel_speed.MODEL, workload=op),
             pytest.mark.skip(reason=reason)]  # fmt: skip
    return pytest.param(op, id=f"{op}-{kernel_speed.MODEL}", marks=marks)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Nobody asked: no cell, and no skip either."""
    empty = [i for i in items if is_kernel_test(i) and not isinstance(cell_id(i), str)]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]


def cell_id(item: pytest.Item) -> object:
    """The id of an item's cell; not a string where there is none."""
    return item.callspec.params.get("cell")  # type: ignore[attr-defined]


@pytest.fixture
def kernel(request: pytest.FixtureRequest, cell: str) -> Any:
    """The kernel cell of this test."""
    return cells(request.config.selection)[cell]  # type: ignore[attr-defined]
