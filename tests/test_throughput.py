"""How much gets done when many ask?"""

import pytest

from impl.models.requests import trace_hash
from tests import workloads


@pytest.mark.kinds("decoder")
@pytest.mark.moves("scheduler")
def test_serving(study, bench):
    """One seeded open-loop trace, replayed whole: requests/s, latency percentiles, goodput."""
    if not study.is_served:
        pytest.skip("the baseline of serving is measured beside each scheduler")
    trace = workloads.trace_of(study.cell, study.spec, study.size)
    new_tokens = sum(r.max_new_tokens for r in trace)
    bench(
        sides=study.sides(lambda engine: engine.serve),
        inputs=[trace] * workloads.NUM_INPUTS,
        agree=study.agree_responses,
        tokens=new_tokens,
        requests=len(trace),
        latencies=lambda responses: study.latencies(trace, responses),
        context={
            "prompt_tokens": sum(len(r.ids) for r in trace) // len(trace),
            "new_tokens": new_tokens // len(trace),
        },
        measured=study.counters,
        **study.facts(f"serving {len(trace)} requests, trace {trace_hash(trace)[:8]}"),
    )
