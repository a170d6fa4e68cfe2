"""What a profiler trace says: operations, layers, hidden synchronizations, idle time."""

import json

import pytest
import torch

from impl.core import StudyError
from tests.inner import Run
from tests.plugins import trace


class Block(torch.nn.Module):
    """A linear layer and, when ``planted``, a synchronization in the middle of it."""

    def __init__(self, planted: bool):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(256, 256), torch.nn.LayerNorm(256)
        self.planted = planted

    def forward(self, x):
        x = self.linear(x)
        if self.planted and x.sum().item() > 1e30:
            return x
        return self.norm(x)


def call_of(model):
    x = torch.randn(64, 256)

    def call():
        with torch.inference_mode():
            return model(x)

    return call


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Events of a clean model, and of one with a planted ``.item()``."""
    folder, found = tmp_path_factory.mktemp("traces"), {}
    for planted in (False, True):
        path = folder / f"{planted}.json.gz"
        trace.record(call_of(Block(planted)), path, stack=True)
        found[planted] = trace.load_events(path)
    return found


def test_operations_are_counted_per_call_and_shares_add_up(traced):
    rows = trace.top_operations(traced[False])
    calls = {row["name"]: row["calls"] for row in rows}
    assert trace.calls_in(traced[False]) == trace.ACTIVE
    assert calls["aten::addmm"] == calls["aten::layer_norm"] == 1
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["self_ms"] for row in rows] == sorted((r["self_ms"] for r in rows), reverse=True)


def test_time_goes_to_the_innermost_layer(traced):
    rows = {row["name"]: row for row in trace.layers(traced[False])}
    assert rows["Linear"]["top_op"] == "aten::addmm"
    assert rows["LayerNorm"]["top_op"] == "aten::native_layer_norm"
    assert rows["Linear"]["share"] + rows["LayerNorm"]["share"] > 0.9


def test_a_planted_synchronization_is_found_and_nothing_else(traced):
    assert trace.hidden_syncs(traced[False]) == []
    (found,) = trace.hidden_syncs(traced[True])
    assert (found["name"], found["calls"], found["after"]) == ("aten::item", 1, "aten::sum")


def test_profilers_do_not_nest(tmp_path):
    with (
        torch.profiler.profile(acc_events=True),
        pytest.raises(StudyError, match="already running"),
    ):
        trace.record(lambda: None, tmp_path / "x.json.gz")


def kernel(ts, dur, name="k", correlation=0):
    return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": 7,
            "args": {"correlation": correlation}}  # fmt: skip


def host(cat, name, ts, dur, correlation=0):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 1,
            "args": {"correlation": correlation}}  # fmt: skip


GPU_TRACE = [
    host("user_annotation", trace.SPAN, 0, 100),
    host("python_function", "nn.Module: Linear_0", 1, 20),
    host("cpu_op", "aten::addmm", 2, 10),
    host("cuda_runtime", "cudaLaunchKernel", 3, 2, 1),
    host("python_function", "nn.Module: LayerNorm_3", 30, 20),
    host("cpu_op", "aten::layer_norm", 31, 10),
    host("cuda_runtime", "cudaLaunchKernel", 32, 2, 2),
    host("cuda_runtime", "cudaStreamSynchronize", 60, 30),
    host("cuda_runtime", "cudaDeviceSynchronize", 110, 30),  # ours, after the call
    kernel(10, 40, "gemm", 1),
    kernel(40, 10, "overlapping", 1),
    kernel(60, 20, "norm", 2),
]


def test_kernels_count_for_the_layer_that_launched_them():
    rows = {row["name"]: row for row in trace.layers(GPU_TRACE)}
    assert rows["LayerNorm"]["self_ms"] == pytest.approx(0.02)
    assert rows["LayerNorm"]["top_op"] == "norm"
    assert trace.top_operations(GPU_TRACE)[0]["name"] == "gemm"


def test_only_waits_inside_the_call_are_its_own():
    (found,) = trace.hidden_syncs(GPU_TRACE)
    assert (found["name"], found["after"]) == ("cudaStreamSynchronize", "aten::layer_norm")
    assert found["ms"] == pytest.approx(0.03)


def test_idle_time_is_what_no_kernel_covers():
    assert trace.idle_share(GPU_TRACE) == pytest.approx(10 / 70)
    assert trace.idle_share([]) is None


def test_the_memory_in_a_trace_has_a_peak():
    sizes = (100, 50, -100, 200, -250)
    events = [{"name": "[memory]", "ts": i, "args": {"Bytes": n}} for i, n in enumerate(sizes)]
    assert trace.peak_of(events) == 250


def test_a_pipeline_is_broken_down_by_stage():
    stages = {
        "tokenize": str.split,
        "transfer": lambda words: torch.tensor([len(w) for w in words]),
        "execute": lambda x: x * 2,
        "decode text": lambda x: " ".join(map(str, x.tolist())),
    }
    found = trace.pipeline_breakdown(stages, "to be or not", rounds=3)
    assert list(found) == list(stages)
    assert sum(stage["share"] for stage in found.values()) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"traceEvents": 3}'])
def test_a_broken_trace_gets_one_sentence(tmp_path, text):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(StudyError, match="not a Chrome trace"):
        trace.load_events(path)


def test_saved_traces_name_no_host_and_no_folder(tmp_path):
    run = Run(tmp_path, "ends.py", "--save-trace=traces", "-k", "first")
    assert run.code == 0, run.text
    found = run.records()["test_first"]["extra_info"]["trace"]
    path = tmp_path / found["path"]
    assert path == tmp_path / "traces" / "test_first.json.gz"
    assert found["top_ops"][0]["name"] == "aten::mm"
    text = json.dumps(trace.load_events(path))
    assert str(tmp_path) not in text
    assert trace.platform.node() not in text or len(trace.platform.node()) < 4


def test_nothing_is_traced_under_ncu(tmp_path):
    run = Run(tmp_path, "ends.py", "--save-trace=traces", "-k", "first", NCU_CHILD="1")
    assert "trace" not in run.records()["test_first"]["extra_info"]
    assert not (tmp_path / "traces").exists()
