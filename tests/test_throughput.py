"""How much gets done when many ask?"""

import pytest

from impl.models.requests import trace_hash
from tests import workloads
from tests.plugins.tokens import serving_figures

OBJECTIVE_S = 1.0  # a request is good when its answer is complete within this


def serve_of(engine):
    """A whole trace: responses, one per request."""
    return engine.serve


@pytest.mark.kinds("decoder")
@pytest.mark.moves("scheduler")
def test_serving(study, bench):
    """One seeded open-loop trace, replayed whole: requests/s, latency percentiles, goodput."""
    trace = workloads.trace_of(study.cell, study.spec, study.size)
    new_tokens = sum(r.max_new_tokens for r in trace)
    sides, last = study.sides(serve_of), []
    serve = sides["variant"]

    def variant(requests):
        last[:] = [serve(requests)]
        return last[0]

    bench(
        sides={**sides, "variant": variant},
        table=study.table(serve_of),
        inputs=[trace] * workloads.NUM_INPUTS,
        agree=study.agree_responses,
        tokens_per_call=new_tokens,
        requests_per_call=len(trace),
        context={
            "prompt_tokens": sum(len(r.ids) for r in trace) // len(trace),
            "new_tokens": new_tokens // len(trace),
        },
        extra=lambda: study.counters() | serving_figures(trace, last[0], OBJECTIVE_S),
        **study.facts(f"serving {len(trace)} requests, trace {trace_hash(trace)[:8]}"),
    )
