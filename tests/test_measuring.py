"""The parts of the harness alone: ceilings, bytes, tokens, the machine."""

import ctypes
import itertools
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch

from kernels import build
from tests import kernel_cases
from tests.emulated import Ticker
from tests.plugins import ceilings as probes
from tests.plugins import machine, memory, tokens
from tests.plugins.ceilings import Ceilings, Limit, last_level_cache, probe

# ---- ceilings ----------------------------------------------------------------------------


def made_up(rates=((1 << 20, 100e9), (32 << 20, 50e9), (128 << 20, 10e9)), **gemm):
    ceilings = Ceilings()
    ceilings.first = {
        "last_level_cache_bytes": 32 << 20,
        "read": [
            {"working_set_bytes": s, "bytes_per_s": r, "spread": 0.01, "path": ""} for s, r in rates
        ],
        "copy": {"bytes_per_s": 8e9, "spread": 0.01},
        "gemm": {d: {"flops_per_s": r, "spread": 0.2} for d, r in (gemm or {"fp32": 1e12}).items()},
    }
    return ceilings


def test_a_cell_uses_the_bandwidth_of_its_own_working_set():
    rate = made_up().read_rate
    assert rate(1000)[0] == rate(1 << 20)[0] == 100e9
    assert 10e9 < rate(64 << 20)[0] < 50e9
    assert rate(1 << 40)[0] == 10e9
    slow_when_small = made_up(rates=((1 << 20, 20e9), (32 << 20, 50e9)))
    assert slow_when_small.read_rate(1 << 20)[0] == 50e9  # overhead is not bandwidth


def test_the_larger_of_bytes_and_flops_bounds():
    ceilings = made_up(fp32=1e12, bf16=2e12)
    limit = ceilings.limit(10e9, 2e12, "fp32", 1 << 40)
    assert (limit.bound, limit.seconds) == ("compute", pytest.approx(2.0))
    assert ceilings.limit(10e9, 1e12, "bf16", 1 << 40).bound == "memory"
    assert ceilings.limit(None, None, "fp32", 1) is None
    assert ceilings.compute_rate("fp16")[0] == 2e12, "fp16 work may be done in bf16"
    assert ceilings.compute_rate("fp32")[0] == 1e12, "fp32 work may not"


def test_what_is_written_is_held_to_the_copy_probe():
    ceilings, dram = made_up(), 256 << 20
    assert ceilings.limit(8e9, None, "fp32", dram).seconds == pytest.approx(0.8)
    assert ceilings.limit(8e9, None, "fp32", dram, 4e9).seconds == pytest.approx(1.0)
    two_reads_a_write = ceilings.limit(12e9, None, "fp32", dram, 4e9)
    assert two_reads_a_write.seconds == pytest.approx(1.0 + 0.4)
    in_cache = ceilings.limit(8e9, None, "fp32", 1 << 20, 4e9)
    assert in_cache.seconds == pytest.approx(0.08), "a copy beyond the caches is no limit inside"


def test_only_the_impossible_beats_a_limit():
    assert not Limit(1.0, "memory", 0.2).beaten_by(0.96), "within 5 %"
    assert Limit(1.0, "memory", 0.2).beaten_by(0.94), "a noisy probe excuses 5 %, not more"
    assert Limit(1.0, "memory", 0.001).beaten_by(0.98)


def test_drift_is_the_largest_change_of_a_probe():
    ceilings = made_up()
    assert ceilings.drift() is None
    ceilings.last = json.loads(json.dumps(ceilings.first))
    assert ceilings.drift() == 0
    ceilings.last["gemm"]["fp32"]["flops_per_s"] *= 0.9
    assert ceilings.drift() == pytest.approx(0.1)


def test_the_probes_of_this_machine_are_plausible():
    """No kernel of ours beats them, and they find more than a Python loop would."""
    found = probe("cpu", fast=True)
    assert all(1e9 < p["bytes_per_s"] < 1e13 for p in (*found["read"], found["copy"]))
    assert 1e9 < found["gemm"]["fp32"]["flops_per_s"] < 1e15
    assert max(p["working_set_bytes"] for p in found["read"]) >= 4 * last_level_cache()


def test_a_product_without_instructions_is_probed_small(monkeypatch):
    """A full-size probe of one took seconds: half a minute of each run on a CPU without bf16."""
    sizes: dict[str, set] = {"quick": set(), "slow": set()}

    def products(device, dtype, n):
        def slow():
            sizes["slow"].add(n)
            time.sleep(2 * n**3 / (probes.SLOW / 4))

        yield "quick", lambda: sizes["quick"].add(n)
        yield "slow", slow

    monkeypatch.setattr(probes, "_products", products)
    found = probes._gemm("cpu", "bf16", 0.001)
    assert found["path"] == "quick"
    assert sizes == {"quick": {256, 1024}, "slow": {256}}
    monkeypatch.setattr(probes, "_products", lambda *args: list(products(*args))[1:])
    found = probes._gemm("cpu", "bf16", 0.001)
    assert found["path"] == "slow"
    assert found["flops_per_s"] == pytest.approx(probes.SLOW / 4, rel=0.5)


def test_int8_is_probed_by_what_is_quick_without_vnni():
    assert "onednn" in dict(probes._products("cpu", "int8", 64))


def test_whole_numbers_are_probed_in_registers():
    """What kernels do with int4 and int16 no library does: its products are no limit of theirs."""
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    found = {dtype: probes._gemm("cpu", dtype, 0.05) for dtype in ("int4", "int16", "fp32")}
    if found["int4"] is None:
        pytest.skip("needs an x86 processor")
    rates = {dtype: p["flops_per_s"] for dtype, p in found.items()}
    assert found["int4"]["path"] == found["int16"]["path"] == "registers"
    assert rates["int16"] < rates["int4"] < 1e14
    assert rates["int16"] > rates["fp32"] / 4, "of one core while another waits"
    assert probes._gemm("cuda", "int16", 0.05) is None


def test_every_kernel_is_held_to_an_arithmetic_that_is_probed():
    speeds, precisions = kernel_cases.SPEEDS.values(), ("fp32", "bf16")
    held = {(s.op, p): s.limited_by(p) for s in speeds for p in precisions}
    assert set(held.values()) <= set(probes.CAN_COMPUTE)
    assert held["int8_linear", "bf16"] == "int16"  # 16 bits of bf16, exactly
    assert held["int8_linear", "fp32"] == held["softmax", "fp32"] == "fp32"
    assert held["int4_a8_linear", "fp32"] == "int4"


def test_products_are_counted_as_they_are_made():
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    arguments = (ctypes.c_int64, ctypes.c_int)
    for level in build.isas():
        with build.isa(level):
            made = {
                kind: build.cpu_function("products", f"products_{kind}", arguments, ctypes.c_int64)
                for kind in ("int16", "int4")
            }
            counts = {kind: call(3, 1) for kind, call in made.items()}
            assert made["int16"](3, 2) == 2 * counts["int16"]
        assert counts["int4"] == 2 * counts["int16"]
        vector = {"plain": 16, "avx2": 32}.get(level, 64)
        assert counts["int4"] == 2 * vector * 10 * 3


def test_probing_again_takes_the_arithmetic_that_set_the_limit(monkeypatch):
    """bf16 work is held to fp32's rate where that is higher: a quiet moment must show that one."""
    ceilings = made_up(fp32=1e12, bf16=1e10, int8=2e12)
    ceilings.first["copy"]["working_set_bytes"] = 1 << 20
    rate = {"bytes_per_s": 1.0, "working_set_bytes": 1 << 20, "spread": 0.0, "path": ""}
    quiet = {"flops_per_s": 4e12, "spread": 0.0, "path": ""}
    monkeypatch.setattr(probes, "_read", lambda *args: rate)
    monkeypatch.setattr(probes, "_copy", lambda *args: rate)
    monkeypatch.setattr(probes, "_gemm", lambda device, dtype, s: quiet)
    ceilings.probe_again(1 << 20, ("bf16",))
    assert ceilings.compute_rate("bf16")[0] == 4e12
    assert ceilings.first["gemm"]["int8"]["flops_per_s"] == 2e12, "nothing to do with bf16"


# ---- bytes -------------------------------------------------------------------------------


def test_the_peak_of_a_call_is_exact_and_repeats():
    def call():
        big = torch.zeros(1000, 1000)
        del big
        return torch.zeros(500, 1000)

    assert [memory.peak_bytes(call, weight_bytes=7) for _ in range(3)] == [4_000_007] * 3


def test_tied_weights_count_once():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64, bias=False)})
    model["b"] = torch.nn.Linear(64, 64, bias=False)
    assert memory.weight_bytes(model) == 2 * 64 * 64 * 4
    model["b"].weight = model["a"].weight
    assert memory.weight_bytes(model) == 64 * 64 * 4


# ---- tokens ------------------------------------------------------------------------------


def test_percentiles_need_their_samples():
    assert [tokens.samples_for(p) for p in (50, 90, 95, 99)] == [7, 44, 90, 459]
    latencies = [i / 1000 for i in range(1, 91)]
    assert tokens.percentile_ms(latencies, 95) == pytest.approx(86)
    assert tokens.percentile_ms(latencies[:89], 95) is None
    assert tokens.percentile_ms(latencies, 99) is None


def test_a_speculative_step_shares_its_time_among_its_tokens(monkeypatch):
    ticker = Ticker()
    monkeypatch.setattr(time, "perf_counter", ticker)
    clock = tokens.TokenClock()
    for seconds, emitted in ((0.5, 1), (0.4, 4), (0.1, 1), (0.1, 1)):
        ticker.work(seconds)
        clock(torch.zeros(2, emitted))
    assert clock.ttft_ms == pytest.approx(500)
    assert clock.inter_token_ms == pytest.approx([100] * 6)
    assert (clock.tokens, clock.tpot_ms) == (7, pytest.approx(100))


def test_latency_counts_from_the_scheduled_arrival():
    requests = [SimpleNamespace(arrival_s=i / 10, ids=torch.zeros(3)) for i in range(10)]
    responses = [
        SimpleNamespace(ids=torch.zeros(5), first_token_s=i / 10 + 0.2, done_s=i / 10 + 0.3)
        for i in range(10)
    ]
    figures = tokens.serving_figures(requests, responses, objective_s=0.25)
    assert figures["p50_ms"] == pytest.approx(300)
    assert figures["ttft_ms"] == pytest.approx(200)
    assert figures["tpot_ms"] == pytest.approx(100)
    assert figures["goodput_rps"] == 0
    assert figures["p95_ms"] is None
    assert figures["requests_per_s"] == pytest.approx(10 / 1.2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12).reshape(2, 6),
        lambda: {"ids": torch.arange(6.0).reshape(1, 6), "attention_mask": torch.ones(1, 6)},
        lambda: [SimpleNamespace(ids=torch.arange(5))] * 2,
    ],
    ids=["ids", "mapping", "requests"],
)
def test_an_input_changes_in_place_and_comes_back(make):
    value, old = make(), make()
    storages = [t.data_ptr() for t in tokens.contents(value)]
    restore = tokens.change_in_place(value)
    changed = tokens.contents(value)
    assert [t.data_ptr() for t in changed] == storages
    assert not any(map(torch.equal, changed, tokens.contents(old)))
    if isinstance(value, dict):
        assert value["attention_mask"].all()
    restore()
    assert all(map(torch.equal, tokens.contents(value), tokens.contents(old)))


# ---- the machine -------------------------------------------------------------------------


class FakeNvml:
    """The few calls of pynvml that are made, with an H100's answers."""

    class NVMLError(Exception):
        pass

    def __getattr__(self, name):
        answers = {
            "GetName": "NVIDIA H100", "GetMemoryInfo": SimpleNamespace(total=80 << 30),
            "GetCudaComputeCapability": (9, 0), "GetDriverVersion": b"570.1",
            "GetCudaDriverVersion": 12080, "GetClockInfo": 1980, "GetPowerUsage": 350_000,
            "GetTemperature": 60, "ThrottleReasons": 0x4, "EnergyConsumption": 5000,
        }  # fmt: skip
        for end, answer in answers.items():
            if name.endswith(end):
                return lambda *_: answer
        if name.startswith("NVML_"):
            return 0
        raise AttributeError(name)


def test_a_gpu_is_asked_without_a_cuda_context(monkeypatch):
    monkeypatch.setattr(machine, "nvml", FakeNvml)
    monkeypatch.setattr(machine, "gpu_handle", lambda: 1)
    assert machine.gpu_info() == {
        "name": "NVIDIA H100", "memory_bytes": 80 << 30, "compute_capability": "9.0",
        "driver": "570.1", "cuda": "12.8",
    }  # fmt: skip
    state = machine.conditions_now()
    assert (state["gpu_power_w"], state["throttle_reasons"]) == (350.0, ["power cap"])
    assert machine.energy_joules() == 5.0
    config = SimpleNamespace(study_device="cuda")
    assert machine.slug(config) == "nvidia-h100"
    assert not torch.cuda.is_initialized()


def test_a_cpu_has_a_name_for_paths():
    assert re.fullmatch("[a-z0-9-]+", machine.slug(SimpleNamespace(study_device="cpu")))


def test_a_busy_machine_is_told():
    assert machine.busy({"load_1m": 1e3})
    assert machine.busy({"load_1m": 0.0}) is None


def test_the_code_version_follows_the_code(tmp_path):
    for folder in ("impl", "kernels", "tests"):
        (tmp_path / folder).mkdir()
    versions = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "impl" / "x.py").write_text(text)
        versions.append(machine.code_version(tmp_path))
    assert len(set(versions)) == 2
    assert all(itertools.starmap(re.fullmatch, [("[0-9a-f]{12}", v) for v in versions]))


@pytest.mark.parametrize(
    ("device", "gpus", "workers"),
    [(None, 4, 4), ("cuda", 2, 2), ("cpu", 4, None), (None, 0, None)],
)
def test_automatic_workers_are_one_per_gpu(device, gpus, workers, monkeypatch):
    from types import SimpleNamespace

    from tests.plugins import devices

    monkeypatch.setattr(devices, "_gpu_count", lambda: gpus)
    config = SimpleNamespace(option=SimpleNamespace(device=device))
    assert devices.pytest_xdist_auto_num_workers(config) == workers
