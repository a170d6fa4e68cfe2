"""Is the decode step timed as it should be?  Cells, bytes, sides, and llama.cpp's weights."""

import pytest
import torch

from impl.fidelity import sqnr_db
from kernels import build
from kernels.decode_step import DecodeStep
from tests import llama_peer, matrix, step_speed
from tests.plugins.kernels import asked_for
from tests.step_speed import KINDS, StepCell

SMALL = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
         "num_kv_heads": 2, "head_dim": 32}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Models of a few hundred kilobytes."""
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    monkeypatch.setattr(step_speed, "LAYER", step_speed.LAYER | SMALL)


def measured(kind, monkeypatch, **keywords):
    """What the ``bench`` fixture is asked to do."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    asked = {}

    def bench(**given):
        asked.update(given)
        with torch.inference_mode():
            for ids in given["inputs"]:
                given["agree"](given["sides"]["variant"](ids), ids)
            asked["told"] = given["effect"]()
            if "peer" in given["sides"]:
                asked["peer_db"] = sqnr_db(*(given["sides"][s](ids) for s in ("variant", "peer")))

    StepCell(kind).measure(bench, "cpu")
    return asked


def test_cells_are_those_of_the_profile():
    def kinds(profile, **narrowed):
        found = step_speed.cells(matrix.Selection(profile, **narrowed)).values()
        return [c.weights for c in found]

    assert sorted(kinds("smoke", precisions=("fp32", "bf16"))) == ["bf16", "fp32"]
    assert sorted(kinds("core", precisions=("fp32", "bf16"))) == sorted(KINDS)
    assert kinds("core", precisions=("bf16",)) == ["bf16"]
    assert not kinds("core", batches=(8,))
    assert not kinds("core", models=("lm_small",))


def test_naming_the_step_asks_for_its_cells():
    class Config:
        args = ("tests",)
        option = type("Option", (), {"benchmark_only": True, "collectonly": False,
                                     "keyword": "decode_step", "profile": "core"})  # fmt: skip

    assert asked_for(Config)
    Config.option.keyword = ""
    assert not asked_for(Config)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_beyond_the_caches(kind, monkeypatch):
    monkeypatch.undo()
    c, layers = step_speed.LAYER, KINDS[kind][1]
    C, D = c["hidden_size"], c["head_dim"]
    per_layer = C * (2 * C + 2 * c["num_kv_heads"] * D + 3 * c["intermediate_size"])
    bits = {"fp32": 32, "bf16": 16, "int4": 4.5}.get(kind, 8)
    assert layers * per_layer * bits / 8 >= 128 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_counted_once(kind):
    model = step_speed.decoder(StepCell(kind))
    linears = [m for n, m in model.named_modules() if n.endswith(("_proj", "lm_head"))]
    held = sum(getattr(m, name).nbytes for m in linears for name in ("weight", "packed", "scale")
               if getattr(m, name, None) is not None)  # fmt: skip
    row = model.embed.weight[0].nbytes
    step = DecodeStep(model)
    assert step.bytes_moved(0) == held + row
    cached = 2 * StepCell(kind).layers * SMALL["num_kv_heads"] * SMALL["head_dim"] * 4
    assert step.bytes_moved(10) - step.bytes_moved(9) == cached
    weights = sum(m.in_features * m.out_features for m in linears)
    assert step.flops(0) == 2 * weights


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_all_sides_compute_the_same(kind, monkeypatch):
    asked = measured(kind, monkeypatch)
    assert {"variant", "baseline", "without"} <= set(asked["sides"])
    assert "C function decode_step" in asked["told"]
    assert len({ids.item() for ids in asked["inputs"]}) > 1
    ids = asked["inputs"][0]
    before = ids.clone()
    restore = asked["change"](ids)
    assert not torch.equal(ids, before)
    restore()
    assert torch.equal(ids, before)
    wrong = asked["sides"]["variant"](ids) * 1.1
    with pytest.raises(AssertionError, match="dB from the decoder"):
        asked["agree"](wrong, ids)


def test_an_absent_llama_cpp_is_named(monkeypatch):
    monkeypatch.setattr(llama_peer.importlib.util, "find_spec", lambda name: None)
    told = measured("fp32", monkeypatch)["told"]
    assert "no llama.cpp here: needs llama_cpp and gguf (the extra [llama])" in told


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gets_the_same_weights(kind, monkeypatch):
    if reason := llama_peer.lacks():
        pytest.skip(reason)
    asked = measured(kind, monkeypatch)
    assert asked["names"]["peer"] == "llama_cpp"
    assert asked["peer_db"] >= (70 if kind == "fp32" else step_speed.PEER_DB)


def test_rows_are_turned_as_gguf_rotates_them():
    rows = torch.arange(8)[:, None]
    assert llama_peer.interleaved(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
