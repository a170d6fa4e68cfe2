"""The study's measuring plugins, and cells small enough to be measured in a second."""

import json
import os
from pathlib import Path

import pytest
import torch

pytest_plugins = [
    "tests.plugins.machine",
    "tests.plugins.trace",
    "tests.plugins.bench",
    "tests.plugins.summary",
]
torch.set_num_threads(1)

if not os.environ.get("INNER_PROBE"):  # two seconds per run, for tests that are not about them
    from tests.plugins import ceilings

    RATE = {"bytes_per_s": 1e14, "spread": 0.0, "path": "made up", "working_set_bytes": 1 << 20}
    ceilings.probe = lambda *_: {
        "device": "cpu", "threads": 1, "last_level_cache_bytes": 1 << 20, "read": [RATE],
        "copy": RATE, "seconds": 0.0,
        "gemm": {"fp32": {"flops_per_s": 1e15, "spread": 0.0, "path": "made up"}},
    }  # fmt: skip

INPUTS = [torch.randn(96, 96, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def product(x):
    return x @ x


def twice(x):
    return x @ x + 0 * (x @ x)


def agree(output, x):
    torch.testing.assert_close(output, x @ x)


@pytest.fixture
def measure(bench, request):
    """``bench`` with the facts of a tiny cell; leaves its samples in samples.jsonl."""

    def run(variant, baseline=twice, inputs=INPUTS, agree=agree, **facts):
        name = request.node.name.removeprefix("test_")
        cell = {
            "techniques": ["eager" if variant is baseline else name],
            "families": ["fusion"],
            "model": "tiny",
            "precision": "fp32",
            "batch": 1,
            "device": "cpu",
            "workload": "product",
        }
        record = bench(
            {"variant": variant, "baseline": baseline, **facts.pop("sides", {})},
            inputs,
            agree,
            cell,
            names={"baseline": "eager", "without": "plain", "peer": "other"},
            **facts,
        )
        with Path("samples.jsonl").open("a") as file:
            file.write(json.dumps([request.node.nodeid, record.seconds.get("variant")]) + "\n")
        return record

    run.product, run.twice, run.inputs, run.agree = product, twice, INPUTS, agree
    return run
