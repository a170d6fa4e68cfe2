"""Constructed runs for the tests of `reports`: every number is made up by a formula.

Nothing here was measured, the machine is called so, and no file of it is kept.
"""

import copy
import json
import math
from pathlib import Path

from reports.__main__ import main as reports_main

STACK = "int8_weight_only+torch_compile"
CONSTRUCTED = "Constructed CPU (no machine)"
COST = {  # time relative to eager, peak memory relative to eager, added perplexity in percent
    "eager": (1.0, 1.0, 0.0),
    "lean_decoder": (0.62, 0.96, 0.0),
    "no_kv_cache": (3.1, 0.9, 0.0),
    "static_kv_cache": (0.9, 1.05, 0.0),
    "torch_compile": (0.55, 1.0, 0.0),
    "prompt_lookup": (0.7, 1.0, 0.0),
    "draft_model": (0.93, 1.1, 0.0),
    "int8_weight_only": (0.6, 0.42, 0.12),
    "int8_dynamic": (0.48, 0.45, 0.25),
    "autocast_bf16": (0.8, 1.2, 0.01),
    "bnb_nf4": (1.9, 0.35, 2.4),
    "peer_static_cache": (0.95, 1.1, 0.0),
    "continuous_batching": (0.4, 1.3, 0.0),
    "static_batching": (0.6, 1.2, 0.0),
}
ON_TRANSFORMERS = {"eager", "no_kv_cache", "bnb_nf4", "peer_static_cache"}
FAMILY = {
    "eager": "baseline", "lean_decoder": "baseline", "no_kv_cache": "baseline",
    "static_kv_cache": "kv_cache", "torch_compile": "compilation",
    "prompt_lookup": "speculative", "draft_model": "speculative",
    "int8_weight_only": "quantization", "int8_dynamic": "quantization",
    "autocast_bf16": "precision", "bnb_nf4": "quantization", "peer_static_cache": "kv_cache",
    "continuous_batching": "batching", "static_batching": "batching",
}  # fmt: skip
STACKS = (
    ("static_kv_cache", "torch_compile"),
    ("int8_weight_only", "torch_compile"),
    ("int8_weight_only", "torch_compile", "prompt_lookup"),
    ("int8_dynamic", "torch_compile"),
)
GiB = 2**30


def record(techniques, model="lm_small", precision="fp32", batch=1, workload="generate", **info):
    """One pytest-benchmark entry with every key of the schema; `info` overrides extra_info."""
    time, memory, loss = 1.0, 1.0, 0.0
    if not ON_TRANSFORMERS & set(techniques) and "lean_decoder" not in techniques:
        time, memory = COST["lean_decoder"][:2]
    for name in techniques:
        time, memory, loss = (time * COST[name][0], memory * COST[name][1], loss + COST[name][2])
    time *= 1.08 ** max(0, len(techniques) - 1)
    unit = {"lm_small": 0.8, "minilm": 0.004, "digits_resnet": 0.0015}[model] * math.sqrt(batch)
    unit *= 0.7 if precision == "bf16" else 1.0
    seconds = time * unit
    lm, size = (
        model == "lm_small",
        {"lm_small": 43.6e6, "minilm": 90e6, "digits_resnet": 3e6}[model],
    )
    size *= 0.5 if precision == "bf16" else 1.0
    speculative = {"prompt_lookup", "draft_model"} & set(techniques)
    serving = workload == "serve"
    lean = not ON_TRANSFORMERS & set(techniques)
    without = "eager" if techniques == ("lean_decoder",) or not lean else "lean_decoder"
    speedup = 1 / time if techniques != ("eager",) else 1.002
    values = {
        "cell": {
            "techniques": list(techniques),
            "families": sorted({FAMILY[name] for name in techniques}),
            "model": model, "precision": precision, "batch": batch, "device": "cpu",
            "workload": workload,
        },
        "timing": "wall",
        "baseline": "eager",
        "speedup": speedup, "speedup_low": speedup * 0.985, "speedup_high": speedup * 1.012,
        "without": {"name": without, "speedup": speedup * 0.62, "low": speedup * 0.61,
                    "high": speedup * 0.63} if techniques != ("eager",) else None,
        "peer": {"name": "peer_static_cache", "speedup": 0.95 / time, "low": 0.94 / time,
                 "high": 0.96 / time} if techniques == ("static_kv_cache", "torch_compile")
        else None,
        "predicted_speedup": None,
        "pairs": 24,
        "verdict": "same" if 0.98 < speedup < 1.02 else "faster" if speedup > 1 else "slower",
        "stop": "precise",
        "first_call_s": 21.0 if "torch_compile" in techniques else seconds * 1.4,
        "load_s": 0.3,
        "context": {"prompt_tokens": 64, "new_tokens": 128} if lm else None,
        "tokens_per_s": 128 * batch / seconds if lm else None,
        "requests_per_s": 44 / (seconds * 9) if serving else None,
        "goodput_rps": 40 / (seconds * 9) if serving else None,
        "accept_rate": 0.71 if speculative else None,
        "mean_accepted": 2.4 if speculative else None,
        "hit_rate": None, "false_hit_rate": None, "energy_j": None,
        "ttft_ms": seconds * 90 if lm else None,
        "tpot_ms": seconds * 7 if lm else None,
        "p50_ms": seconds * 1100 if serving else None,
        "p95_ms": None,
        "p99_ms": seconds * 1900 if serving and batch == 8 else None,
        "bytes_moved": size * 128 if lm else size,
        "flops": 2 * size / 4 * (128 if lm else 60) * batch / time / 30,
        "limit_ms": seconds * 1e3 * min(0.9, 0.12 / time),
        "limit_fraction": min(0.9, 0.12 / time),
        "bound": "memory" if batch == 1 else "compute",
        "weight_bytes": int(size * memory),
        "kv_bytes": 9_437_184 * batch if lm else None,
        "peak_bytes": int(size * memory * 1.3 + 2e7 * batch),
        "mfu": 0.04, "mbu": min(0.9, 0.12 / time),
        "quality": [
            {"metric": "perplexity" if lm else "accuracy", "value": 12.4 * (1 + loss / 100)
             if lm else 0.981 - loss / 1000, "baseline": 12.4 if lm else 0.981,
             "delta": 12.4 * loss / 100 if lm else -loss / 1000, "stderr": 0.004,
             "budget": 12.4 * 0.03 if lm else -0.01, "data": "sha256:constructed"}
        ],
        "effect": f"constructed: {' and '.join(techniques)} on",
    }  # fmt: skip
    if techniques == ("eager",):
        values["trace"] = trace(seconds)
    values.update(info)
    data = [seconds * (1 + 0.01 * ((7 * i) % 5 - 2)) for i in range(24)]
    name = f"test_{workload}[{'+'.join(techniques)}-{model}-{precision}-batch{batch}]"
    stats = {
        "min": min(data), "max": max(data), "mean": sum(data) / 24, "stddev": seconds * 0.014,
        "rounds": 24, "median": seconds, "iqr": seconds * 0.02, "q1": seconds * 0.99,
        "q3": seconds * 1.01, "iqr_outliers": 0, "stddev_outliers": 9, "outliers": "9;0",
        "ld15iqr": min(data), "hd15iqr": max(data), "ops": 1 / seconds, "total": sum(data),
        "data": data, "iterations": 1,
    }  # fmt: skip
    return {
        "group": workload, "name": name, "fullname": f"tests/test_latency.py::{name}",
        "params": None, "param": None, "extra_info": values, "stats": stats,
        "options": {"disable_gc": False, "timer": "clock", "min_rounds": 5, "max_time": 1.0,
                    "min_time": 5e-06, "precision": None, "confidence": None, "warmup": False},
    }  # fmt: skip


def trace(seconds):
    def row(name, calls, share):
        return {"name": name, "calls": calls, "self_ms": seconds * 1e3 * share, "share": share}

    return {
        "path": "traces/constructed.json.gz", "calls": 2,
        "top_ops": [row("aten::mm", 812, 0.44), row("aten::scaled_dot_product_attention", 96, 0.2),
                    row("aten::cat", 192, 0.11), row("aten::mul", 1300, 0.06)],
        "layers": [{**row("LlamaMLP", 6, 0.5), "top_op": "aten::mm"},
                   {**row("LlamaAttention", 6, 0.38), "top_op": None}],
        "syncs": [], "idle_share": None,
    }  # fmt: skip


def constructed_run(**machine):
    """A whole run: three models, stacks, serving, speculation, cells not run."""
    benchmarks = []
    singles = [name for name in COST if "batching" not in name]
    for precision in ("fp32", "bf16"):
        for name in singles:
            benchmarks.append(record((name,), precision=precision))
        for stack in STACKS:
            benchmarks.append(record(stack, precision=precision))
    for name in ("eager", "static_batching", "continuous_batching"):
        benchmarks.append(record((name,), batch=8, workload="serve"))
    for model, workload in (("minilm", "embed"), ("digits_resnet", "classify")):
        for name in ("eager", "torch_compile", "int8_dynamic", "int8_weight_only"):
            benchmarks.append(record((name,), model=model, batch=8, workload=workload))
    lost = {"techniques": ["fp8_dynamic"], "families": ["quantization"], "model": "lm_small",
            "precision": "bf16", "batch": 1, "device": "cpu", "workload": "generate"}  # fmt: skip
    not_run = [
        {"fullname": f"tests/test_latency.py::test_generate[{name}-lm_small-bf16-batch{batch}]",
         "cell": {**lost, "techniques": [name], "batch": batch}, "reason": reason}
        for name, reason in (
            ("fp8_dynamic", "fp8_dynamic needs sm89 for fp8; this machine has no GPU"),
            ("int4_weight_only_g32", "the share of 3.1 s cannot hold six pairs of about 9.0 s"))
        for batch in (1, 8)
    ]  # fmt: skip
    return {
        "machine_info": {
            "processor": "", "machine": "x86_64", "python_version": "3.11.0", "system": "Linux",
            "cpu": {"arch": "X86_64", "count": 2, "brand_raw": CONSTRUCTED, "isa": ["avx2"]},
            "torch": "2.13.0", "transformers": "5.23.0", "threads": 2, **machine,
        },
        "commit_info": {"id": "0" * 40, "time": None, "dirty": False, "project": "study",
                        "branch": "main"},
        "benchmarks": benchmarks,
        "datetime": "2000-01-01T00:00:00+00:00",
        "version": "5.3.1",
        "not_run": not_run,
        "ceilings": {"first": probes(), "last": probes(0.99), "drift": 0.01},
        "aa": {"trials": 40, "misses": 1, "noise_floor": 0.012},
        "conditions": {"threads": 2, "seed": 0, "precision": 0.03, "budget_s": 600.0,
                       "before": state(0.4), "after": state(1.9),
                       "marks": ["constructed: the machine was said to be busy"]},
    }  # fmt: skip


def probes(scale=1.0):
    def moved(bytes_per_s, size):
        return {"bytes_per_s": bytes_per_s * scale, "working_set_bytes": size, "spread": 0.02,
                "path": "constructed"}  # fmt: skip

    return {
        "device": "cpu", "threads": 2, "last_level_cache_bytes": 2**25,
        "read": [moved(177e9, 2**24), moved(44e9, 2**29)],
        "copy": moved(45e9, 2**29),
        "gemm": {dtype: {"flops_per_s": flops * scale, "spread": 0.01, "path": "constructed"}
                 for dtype, flops in (("fp32", 460e9), ("bf16", 900e9))},
        "seconds": 3.0,
    }  # fmt: skip


def state(load):
    empty = dict.fromkeys(("cpu_mhz", "gpu_sm_mhz", "gpu_memory_mhz", "gpu_power_w",
                           "gpu_temperature_c", "throttle_reasons"))  # fmt: skip
    return {**empty, "load_1m": load, "memory_available_bytes": 8 * GiB}


def save(path: Path, run: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, allow_nan=False), encoding="utf-8")
    return path


def changed(run: dict, stack: str, **info) -> dict:
    """A copy in which the cells of `stack` have other numbers; callables get the old value."""
    run = copy.deepcopy(run)
    for benchmark in run["benchmarks"]:
        extra = benchmark["extra_info"]
        if "+".join(extra["cell"]["techniques"]) == stack:
            for key, value in info.items():
                extra[key] = value(extra[key]) if callable(value) else value
    return run


def slowed(run: dict, stack: str, factor: float) -> dict:
    """A copy in which `stack` takes `factor` times as long against the same baseline."""
    run = changed(run, stack, **dict.fromkeys(("speedup", "speedup_low", "speedup_high"),
                                              lambda old: old / factor))  # fmt: skip
    for benchmark in run["benchmarks"]:
        if "+".join(benchmark["extra_info"]["cell"]["techniques"]) == stack:
            stats = benchmark["stats"]
            stats["data"] = [s * factor for s in stats["data"]]
            for key in ("min", "max", "mean", "median", "q1", "q3", "total"):
                stats[key] *= factor
    return run


def kernel_record(op, impl, shape, precision="fp32", bound="memory", intensity=0.5, **info):
    """A kernel cell: 44 GB/s where memory bounds it, twice as fast as eager."""
    values = {
        "cell": {"techniques": [f"{op}_{impl}"], "families": [], "model": "kernel",
                 "precision": precision, "batch": int(shape.split("x")[0]), "device": "cpu",
                 "workload": f"{op} {shape}"},
        "baseline": "torch_eager",
        "bytes_moved": 2**28, "flops": 2**28 * intensity,
        "without": {"name": "torch_compile", "speedup": 1.25, "low": 1.2, "high": 1.3},
        "peer": {"name": "library", "speedup": 1.5, "low": 1.4, "high": 1.6},
        "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1, "verdict": "faster",
        "limit_fraction": 0.9, "limit_ms": 5.5, "bound": bound, "mbu": 0.9, "mfu": None,
        "quality": [], "context": None, "tokens_per_s": None, "ttft_ms": None, "tpot_ms": None,
        "kv_bytes": None, "weight_bytes": None, "peak_bytes": 0,
        "effect": "C function constructed",
    }  # fmt: skip
    benchmark = record(("lean_decoder",), **{**values, **info})
    seconds = 2**28 / 44e9
    scale = seconds / benchmark["stats"]["median"]
    for key in ("min", "max", "mean", "median", "iqr", "q1", "q3"):
        benchmark["stats"][key] *= scale
    name = f"test_speed[{op}_{impl}-kernel-{precision}-{shape}]"
    return {**benchmark, "name": name, "fullname": f"tests/test_kernels.py::{name}"}


def kernel_run():
    """A run of kernels alone: two operations, two implementations, two precisions."""
    benchmarks = [
        kernel_record("rms_norm", impl, "8192x4096", precision)
        for impl in ("cpu", "triton")
        for precision in ("fp32", "bf16")
    ]
    benchmarks.append(kernel_record("int8_linear", "cpu", "8x4096x4096", bound="compute",
                                    intensity=30.0, peer=None))  # fmt: skip
    return {**constructed_run(), "benchmarks": benchmarks}


def record_of(run, stack, **where):
    """The record of a stack; ``where`` narrows its cell."""
    found = [r for r in run.records if r.cell.stack == stack]
    return next(r for r in found if all(getattr(r.cell, k) == v for k, v in where.items()))


def three(constructed, run_of, factors=(1.0, 1.02, 1.01), stack=STACK):
    """Three processes' runs, one stack slower by these factors."""
    return [
        run_of({**slowed(constructed, stack, f), "datetime": f"2000-01-0{i}T00:00:00"})
        for i, f in enumerate(factors, 1)
    ]


def main(words) -> int:
    """``python -m reports WORDS``: its exit status."""
    return reports_main([str(word) for word in words])
