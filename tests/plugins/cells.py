"""Cells become pytest items: options, parametrization, order, the plan, ``--impossible``."""

from __future__ import annotations

import dataclasses

import pytest

from impl.core import TECHNIQUES, StudyError
from impl.models import SPECS, spec_of
from impl.models.inputs import check_own_data
from tests import matrix


def pytest_addoption(parser):
    group = parser.getgroup("study: selection")
    add = group.addoption
    add("--profile", default="core", help=f"how much: {', '.join(matrix.PROFILES)}")
    add("--models", default="", help="models of the zoo, separated by commas")
    add("--model", default=None, metavar="PATH_OR_HUB_ID", help="study this checkpoint")
    add("--text", default=None, metavar="FILE", help="UTF-8 text to measure --model's quality on")
    add("--data", default=None, metavar="DIR", help="images, a folder per class, for --model")
    add("--techniques", default="", help="exact stacks, as a+b,c")
    add("--precisions", default="", help="fp32, bf16, fp16")
    add("--batches", default="", help="batch sizes, as 1,8")
    add("--impossible", action="store_true", help="list the cells that cannot exist, and why")


def _list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _batches(text: str) -> list[int]:
    try:
        return [int(word) for word in _list(text)]
    except ValueError:
        raise StudyError(f"--batches {text} is not a list of numbers; write 1,8") from None


def pytest_configure(config):
    families = {t.family for t in TECHNIQUES.values()}
    for family in sorted(families):
        config.addinivalue_line("markers", f"{family}: techniques of impl/{family}.py")
    for extra in sorted(set().union(*(t.markers for t in TECHNIQUES.values())) - families):
        config.addinivalue_line("markers", f"{extra}: techniques of several families")
    if config.option.help:
        return
    option = config.option
    try:
        specs, models = dict(SPECS), _list(option.models)
        if option.model:
            spec = spec_of(option.model)
            spec = dataclasses.replace(spec, text=option.text, data=option.data)
            check_own_data(spec)
            specs[spec.name], models = spec, [*models, spec.name]
        elif option.text or option.data:
            raise StudyError("--text and --data go with --model; name the checkpoint too")
        config.selection = matrix.Selection(
            option.profile, models, _list(option.precisions), _batches(option.batches),
            _list(option.techniques), specs)  # fmt: skip
        config.study_cells = config.selection.cells()
    except (StudyError, OSError) as error:
        raise pytest.UsageError(str(error)) from None
    if not config.study_cells and not option.impossible:
        raise pytest.UsageError("the selection holds no cell: every combination is impossible "
                                "(the same command with --impossible says why)")  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """``--impossible`` lists and ends, as ``--markers`` does."""
    if not config.option.impossible or config.option.help:
        return None
    config._do_configure()
    for name, why in config.selection.impossible().items():
        print(f"{name}: {why}")
    config._ensure_unconfigure()
    return pytest.ExitCode.OK


def pytest_report_header(config):
    n, lost = len(config.study_cells), len(config.selection.impossible())
    return f"matrix: profile {config.option.profile}, {n} cells; {lost} impossible (--impossible)"


def families_of(cell: matrix.Cell) -> list[str]:
    """The markers of a cell: the families of its techniques."""
    return sorted({t.family for t in cell.techniques}.union(*(t.markers for t in cell.techniques)))


def _param(cell: matrix.Cell, config):
    marks = [getattr(pytest.mark, family) for family in families_of(cell)]
    marks.append(pytest.mark.cell(
        techniques=cell.stack, model=cell.model, precision=cell.precision, batch=cell.batch
    ))  # fmt: skip
    spec = config.selection.specs[cell.model]
    if reason := matrix.missing(cell, spec, config.study_device):
        marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(cell.id, id=cell.id, marks=marks)  # a string: JSON keeps it


def pytest_generate_tests(metafunc):
    if "cell" not in metafunc.fixturenames or metafunc.definition.get_closest_marker("kernels"):
        return
    moves = metafunc.definition.get_closest_marker("moves")
    kinds = metafunc.definition.get_closest_marker("kinds")
    selection = metafunc.config.selection
    specs = selection.specs
    few = selection.profile in ("core", "headline") and not selection.asked
    few = few and metafunc.definition.get_closest_marker("sparse")
    taken = selection.sparse() if few else metafunc.config.study_cells
    cells = [
        cell
        for cell in metafunc.config.study_cells.values()
        if (moves is None or matrix.moves(cell, moves.args))
        and cell.id in taken
        and (kinds is None or specs[cell.model].kind in kinds.args)
    ]
    metafunc.parametrize("cell", [_param(cell, metafunc.config) for cell in cells], indirect=True)


def cell_of(item):
    """The cell an item runs, or None."""
    callspec = getattr(item, "callspec", None)
    return item.config.study_cells.get(callspec.params.get("cell")) if callspec else None


def comes_late(cell: matrix.Cell, both: set[str]) -> bool:
    """Whether model and techniques have an fp32 cell too, which comes first: time may run out.

    ``both``: models that have fp32 cells.
    """
    exists = all("fp32" in t.precisions for t in cell.techniques)
    return cell.precision != "fp32" and cell.model in both and exists


def models_at_fp32(config) -> set[str]:
    """The models of this session that have fp32 cells."""
    return {cell.model for cell in config.study_cells.values() if cell.precision == "fp32"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Tests of one cell run together, cells of one model together, the baseline first.

    Kernels come last: how they keep memory must not move a stack's time.
    """
    empty = [i for i in items if getattr(i, "callspec", None) and "cell" in i.fixturenames
             and cell_of(i) is None and not i.get_closest_marker("kernels")]  # fmt: skip
    if empty:  # no selected cell moves this test's number
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]
    place = {cell: i for i, cell in enumerate(config.study_cells.values())}
    models = {name: i for i, name in enumerate(config.selection.specs)}

    both = models_at_fp32(config)

    def order(item):
        if item.get_closest_marker("kernels"):
            return (2,)
        if (cell := cell_of(item)) is None:  # long ones early: no worker ends the run alone
            return 0, not item.get_closest_marker("slow")
        return 1, comes_late(cell, both), models[cell.model], cell.batch, place[cell]

    items.sort(key=order)


def pytest_runtest_setup(item):
    """Tests marked ``slow(on_request=True)`` take minutes: they run with ``-m slow``."""
    slow = item.get_closest_marker("slow")
    if slow and slow.kwargs.get("on_request") and "slow" not in item.config.option.markexpr:
        file = item.nodeid.split("::")[0]
        pytest.skip(f"takes minutes; run it with: pytest -m slow {file}")


@pytest.fixture
def cell(request) -> matrix.Cell:
    """The cell of this test."""
    return request.config.study_cells[request.param]
