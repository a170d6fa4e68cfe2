"""What the design claims about the core and the matrix."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from impl import core
from impl.core import PHASES, TECHNIQUES, Engine, StudyError, build, members, stack, technique
from impl.fidelity import ORDER, bitwise, budget, close, loosest, same_tokens
from impl.models import SPECS
from tests import matrix
from tests.inner import fresh_pytest
from tests.matrix import BATCHES, PRECISIONS, PROFILES, STACKS, Cell, Selection
from tests.plugins.cells import comes_late
from tests.plugins.sides import opponents

ROOT = Path(__file__).parent.parent
FULL = Selection("full")


@pytest.fixture
def register(monkeypatch):
    """Register throw-away techniques; the registry is restored afterwards."""
    monkeypatch.setattr(core, "TECHNIQUES", dict(TECHNIQUES))

    def register(name, phase="compress", **options):
        def apply(engine):
            engine.stats.setdefault("order", []).append(name)
            return engine

        apply.__name__, apply.__module__ = name, "impl.invented"
        options.setdefault("effect", lambda engine, run: "on")
        technique(phase=phase, **options)(apply)
        return core.TECHNIQUES[name]

    return register


def an_engine(model="digits_resnet"):
    return Engine(spec=SPECS[model], model=None, dtype=None, device=None)


def test_a_stack_is_a_set():
    for names in STACKS:
        orders = {stack(*order) for order in itertools.permutations(names)}
        assert len(orders) == 1, f"{names}: the order it is written in matters"


def test_a_stack_is_applied_in_phase_order(register):
    for name, phase in (("last", "capture"), ("first", "train"), ("middle", "compile")):
        register(name, phase)
    engine = build(an_engine(), stack("last", "first", "middle"))
    assert engine.stats["order"] == ["first", "middle", "last"]


def test_a_name_twice_in_a_stack_counts_once():
    assert stack("eager", "eager") == stack("eager")


def test_a_technique_must_return_its_engine(register):
    broken = register("forgets")
    broken = dataclasses.replace(broken, apply=lambda engine: None)
    core.TECHNIQUES["forgets"] = broken
    with pytest.raises(TypeError, match="forgets returned NoneType"):
        build(an_engine(), [broken])


def test_name_family_and_marker_come_from_the_code(register):
    made = register("noun_phrase", markers={"quantization"})
    assert (made.name, made.family, made.markers) == ("noun_phrase", "invented", {"quantization"})
    assert TECHNIQUES["eager"].family == "baseline"


def test_a_taken_or_malformed_name_is_refused(register):
    register("one")
    with pytest.raises(StudyError, match="'one' is taken"):
        register("one")
    with pytest.raises(StudyError, match="'No-Dash' is taken or not of the form"):
        register("No-Dash")


def test_an_unknown_phase_need_or_slot_is_refused(register):
    with pytest.raises(StudyError, match="unknown phase or host 'compile_'"):
        register("a", "compile_")
    with pytest.raises(StudyError, match=r"unknown needs or slots \['wings'\]"):
        register("b", needs={"wings"})
    with pytest.raises(StudyError, match=r"unknown needs or slots \['kv'\]"):
        register("c", replaces="kv")


def test_variants_register_one_technique_each(register, monkeypatch):
    seen = []

    def grouped(engine, group_size):
        seen.append(group_size)
        return engine

    grouped.__module__ = "impl.invented"
    technique(phase="compress", effect=lambda e, run: "on",
              variants={"grouped_g32": {"group_size": 32}, "grouped_g128": {"group_size": 128}}
              )(grouped)  # fmt: skip
    build(an_engine(), stack("grouped_g32"))
    build(an_engine(), stack("grouped_g128"))
    assert seen == [32, 128]
    assert "grouped" not in core.TECHNIQUES


def test_decoders_run_lean_unless_a_technique_is_hosted_by_transformers():
    needs = SPECS["lm_small"].needs
    assert members(stack("prompt_lookup"), needs)[0].name == "lean_decoder"
    assert [t.name for t in members(stack("no_kv_cache"), needs)] == ["no_kv_cache"]
    assert [t.name for t in members(stack("int8_weight_only"), SPECS["digits_resnet"].needs)] == [
        "eager", "int8_weight_only"]  # fmt: skip


def test_a_stack_promises_what_its_loosest_member_promises():
    assert loosest([bitwise, same_tokens]) == same_tokens
    assert loosest([same_tokens, close(40), close(30)]) == close(30)
    both = loosest([budget("perplexity", 0.003), budget("perplexity", 0.01, accuracy=0.02)])
    assert both.budgets == pytest.approx({"perplexity": 0.013, "accuracy": 0.02})
    assert both.kind == "budget"
    assert {t.fidelity.kind for t in TECHNIQUES.values()} <= set(ORDER)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_has_a_cell_on_some_machine(name):
    assert any(name in {t.name for t in c.techniques} for c in FULL.cells().values())


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_says_its_claim_and_its_source(name):
    t = TECHNIQUES[name]
    assert t.claim, f"{name} has no docstring"
    assert t.phase in PHASES
    assert t.peer is None or t.peer in TECHNIQUES, f"{name}: unknown peer {t.peer}"


def test_every_technique_is_in_the_smoke_profile():
    covered = {t.name for c in Selection("smoke").cells().values() for t in c.techniques}
    beyond = {
        name for name, t in TECHNIQUES.items()
        if not t.precisions & {"fp32", "bf16"} or "unaligned" in t.needs
    }  # fmt: skip
    assert set(TECHNIQUES) - beyond <= covered


def test_ids_are_unique_and_made_of_plain_tokens():
    cells = FULL.cells()
    for cell_id, cell in cells.items():
        names, model, precision, batch = cell_id.rsplit("-", 3)
        assert [t.name for t in cell.techniques] == names.split("+")
        assert (model, precision, batch) == (cell.model, cell.precision, f"batch{cell.batch}")
    assert len(cells) > 500


def test_no_token_of_the_axes_contains_another():
    tokens = [t for t in matrix.tokens() if t != "batch1"] + ["batch1-"]
    ids = [*SPECS, *PRECISIONS]
    assert not [(a, b) for a, b in itertools.permutations(ids, 2) if a in b]
    assert not [
        (a, b) for a, b in itertools.permutations([f"batch{n}" for n in BATCHES], 2) if a in b
    ]
    assert tokens


def test_two_owners_of_one_slot_are_impossible(register):
    a, b = register("cache_a", replaces="cache"), register("cache_b", replaces="cache")
    scope, why = matrix.impossible((a, b), SPECS["lm_small"], "fp32", 1)
    assert (scope, why) == ("stack", "cache_a and cache_b both replace the cache")


def test_a_model_without_the_need_is_impossible():
    scope, why = matrix.impossible(stack("prompt_lookup"), SPECS["digits_resnet"], "fp32", 1)
    assert scope == "model"
    assert "digits_resnet has none" in why


def test_a_precision_without_meaning_is_impossible(register):
    t = register("casts", precisions={"fp32"})
    assert matrix.impossible((t,), SPECS["lm_small"], "bf16", 1) == (
        "precision", "casts means nothing at bf16")  # fmt: skip


def test_a_batch_too_small_is_impossible(register):
    t = register("batches", min_batch=2)
    assert matrix.impossible((t,), SPECS["lm_small"], "fp32", 1)[0] == "batch"
    assert not matrix.impossible((t,), SPECS["lm_small"], "fp32", 8)


def test_the_impossible_cells_are_those_pinned():
    pinned = (ROOT / "tests/data/impossible.txt").read_text().splitlines()
    now = [f"{name}: {why}" for name, why in FULL.impossible().items()]
    assert now == pinned, "run `python -m tests.matrix > tests/data/impossible.txt` and review"


def test_impossible_lists_and_ends():
    """Also where nothing else is left of the selection; no cell runs."""
    none = ("--techniques", "prompt_lookup", "--models", "digits_resnet")
    done = fresh_pytest("--impossible", *none)
    assert done.returncode == 0
    why = "prompt_lookup needs generate, lean; digits_resnet has none"
    assert done.stdout == f"prompt_lookup-digits_resnet: {why}\n"
    done = fresh_pytest(*none)
    assert done.returncode == 4
    assert "every combination is impossible (the same command with --impossible" in done.stderr


def test_missing_hardware_is_a_sentence(register):
    t = register("on_gpu", requires={"cuda"})
    cell = Cell((t,), "lm_small", "fp32", 1)
    assert matrix.missing(cell, SPECS["lm_small"]) == "on_gpu needs cuda; this runs on cpu"


NO_TRITON = "needs the package triton (pip install triton)"
NO_CC = "needs a C compiler for Triton: install gcc or set CC"
NO_CXX = "needs a C++ compiler; install g++ or set CXX"
NEITHER = (
    "needs cuda-core with CUDA's headers (the extra [gpu]), or triton and a C compiler; install "
    "one of them"
)


@pytest.mark.parametrize(("here", "compiler_on_cuda", "kernels_on_cuda", "kernels_on_cpu"), [
    ({"g++"}, NO_TRITON, NEITHER, None),
    ({"g++", "triton"}, NO_CC, NEITHER, None),
    ({"triton", "gcc"}, None, None, NO_CXX),
    ({"cuda", "cuda.core"}, NO_TRITON, None, NO_CXX),
    ({"triton", "clang", "g++", "cuda", "cuda.core"}, None, None, None),
], ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else "")  # fmt: skip
def test_what_builds_code_is_asked_of_the_device(here, compiler_on_cuda, kernels_on_cuda,
                                                 kernels_on_cpu, monkeypatch):  # fmt: skip
    """A GPU's code is not compiled by the C++ compiler that a CPU's needs."""
    from impl import machine
    from kernels import build

    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name if name in here else None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in here else None)
    monkeypatch.setattr(build, "cuda_include", lambda: "headers")
    assert machine.lacks("compiler", "cuda:1") == compiler_on_cuda
    assert machine.lacks("kernels", "cuda") == kernels_on_cuda
    assert machine.lacks("kernels", "cpu") == kernels_on_cpu


def test_steps_on_cuda_ask_for_no_cpp_compiler(monkeypatch):
    from impl import machine

    monkeypatch.setattr(machine, "_lacks_kernels", lambda device: f"has none for {device}")
    for device in ("cpu", "cuda"):
        why = matrix.missing(Cell(stack("decode_step"), "lm_small", "fp32", 1), SPECS["lm_small"],
                             device)  # fmt: skip
        assert why == f"decode_step has none for {device}"


def test_a_missing_package_names_the_extra(register):
    t = register("with_package", requires={"no_such_package"})
    why = matrix.missing(Cell((t,), "lm_small", "fp32", 1), SPECS["lm_small"])
    assert "needs the package no_such_package (pip install no_such_package)" in why


def test_a_batch_that_cannot_fit_says_both_numbers(monkeypatch):
    monkeypatch.setattr(matrix, "session_memory", lambda device: 2**30)
    cell = Cell(stack("eager"), "llama_8b", "fp32", 64)
    why = matrix.missing(cell, SPECS["llama_8b"])
    assert "GB of memory at batch 64; cpu has 1.1 GB free" in why


@pytest.mark.parametrize(
    ("kind", "options", "hint"),
    [
        ("model", {"models": ["lm_smal"]}, "did you mean 'lm_small'?"),
        ("technique", {"techniques": ["int8_weigth_only"]}, "did you mean 'int8_weight_only'?"),
        ("precision", {"precisions": ["bf17"]}, "did you mean 'bf16'?"),
        ("profile", {"profile": "cor"}, "did you mean 'core'?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(kind, options, hint):
    with pytest.raises(StudyError, match=f"unknown {kind}") as error:
        Selection(**options).cells()
    assert hint in str(error.value)


def test_a_batch_must_be_positive():
    with pytest.raises(StudyError, match="batch 0 is not a positive number"):
        Selection(batches=[0])


def test_only_cells_that_move_the_number_are_generated():
    lookup = Cell(stack("prompt_lookup"), "lm_small", "fp32", 1)
    int8 = Cell(stack("int8_weight_only"), "lm_small", "fp32", 1)
    baseline = Cell(stack("eager"), "lm_small", "fp32", 1)
    served = Cell(stack("continuous_batching"), "lm_small", "fp32", 8)
    assert matrix.moves(lookup, ["decode"])
    assert not matrix.moves(lookup, ["model"])
    assert matrix.moves(int8, ["model"])
    assert not matrix.moves(int8, ["scheduler"])
    assert matrix.moves(served, ["scheduler"])
    assert not matrix.moves(served, ["model", "decode"])
    assert not matrix.moves(served.of("continuous_batching", "decode_step"), ["model"])
    assert all(matrix.moves(baseline, [slot]) for slot in ("model", "decode"))
    assert not matrix.moves(baseline, ["scheduler"])  # in the rounds of every scheduler


def test_a_peer_stands_beside_its_technique_where_the_profile_has_it():
    spec, core = SPECS["lm_small"], Selection("core")
    fp32 = Cell(stack("torch_compile"), "lm_small", "fp32", 1)
    bf16 = Cell(stack("torch_compile"), "lm_small", "bf16", 1)
    assert opponents(fp32, spec, "cpu", core).peer == fp32.of("peer_compiled_static")
    assert opponents(bf16, spec, "cpu", core).peer is None
    named = Selection("core", techniques=["torch_compile"])
    assert opponents(bf16, spec, "cpu", named).peer == bf16.of("peer_compiled_static")
    assert opponents(bf16, spec, "cpu", core).without == bf16.of("lean_decoder")


def test_peers_come_after_the_techniques_that_name_them():
    order = [cell.stack for cell in Selection("core").cells().values()]
    for name, t in TECHNIQUES.items():
        if t.peer in order and name in order:
            assert order.index(name) < order.index(t.peer)


def test_profiles_grow():
    sizes = [len(Selection(p).cells()) for p in ("smoke", "core", "full")]
    assert sizes[0] < sizes[1] < sizes[2]
    assert set(PROFILES) >= {"smoke", "core", "full", "headline"}


def test_importing_impl_starts_neither_cuda_nor_a_compiler():
    code = (
        "import subprocess, sys\n"
        "start, started = subprocess.Popen.__init__, []\n"
        "def noted(self, args, *a, **k): started.append(str(args)); start(self, args, *a, **k)\n"
        "subprocess.Popen.__init__ = noted\n"
        "import impl, torch\n"
        "compilers = [s for s in started if any(c in s for c in ('g++', 'gcc', 'nvcc', 'clang'))]\n"
        "assert not compilers, compilers\n"
        "assert not torch.cuda.is_initialized()\n"
        "for late in ('torch._dynamo', 'transformers', 'torchao', 'bitsandbytes'):\n"
        "    assert late not in sys.modules, f'{late} takes seconds to import'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_distribution_named_kernels_shadows_ours():
    from importlib import metadata

    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("kernels")
    import kernels

    assert Path(kernels.__file__).parent == ROOT / "kernels"


def test_each_technique_and_model_comes_before_low_precision():
    cells = Selection("core").cells().values()
    both = {cell.model for cell in cells if cell.precision == "fp32"}
    early = [cell for cell in cells if not comes_late(cell, both)]
    assert len(early) < len(cells)
    assert {t for c in early for t in c.techniques} == {t for c in cells for t in c.techniques}
    assert {c.model for c in early} == {c.model for c in cells}
