"""How long does one answer take?"""

import pytest

from tests import workloads


@pytest.mark.kinds("decoder")
@pytest.mark.moves("model", "decode", "cache")
def test_generation(study, bench):
    """Whole generations of a fixed length, prompt included: TTFT, time per token, tokens/s."""
    size, cell = study.size, study.cell
    n = size.new_tokens

    def call(engine):
        return lambda ids: engine.generate(ids, n)

    def measured():
        passes = study.engine.stats.get("mean_accepted")
        work = workloads.generation_work(
            study.engine, cell, size, None if not passes else (n - 1) / passes
        )
        return {
            "bytes_moved": work.bytes_moved,
            "flops": work.flops,
            **study.counters(),
        }

    bench(
        sides=study.sides(call),
        inputs=study.inputs(),
        agree=study.agree,
        tokens_per_call=n * cell.batch,
        stream=lambda ids, on_token: study.engine.generate(ids, n, on_token=on_token),
        context={"prompt_tokens": size.prompt_tokens, "new_tokens": n},
        extra=measured,
        **study.facts(f"generation of {n} tokens after {size.prompt_tokens}"),
    )


@pytest.mark.kinds("decoder")
@pytest.mark.moves("model")
@pytest.mark.sparse
def test_prefill(study, bench):
    """One forward over the prompt: the time to the first token, compute-bound."""
    size, cell = study.size, study.cell
    work = workloads.prefill_work(study.engine, cell, size)
    bench(
        sides=study.sides(lambda engine: engine.forward),
        inputs=study.inputs(),
        agree=study.agree_logits,
        tokens_per_call=None,
        context={"prompt_tokens": size.prompt_tokens, "new_tokens": 0},
        **vars(work),
        **study.facts(f"prefill of {size.prompt_tokens} tokens"),
    )


@pytest.mark.kinds("encoder", "classifier")
@pytest.mark.moves("model")
def test_forward(study, bench):
    """One batch through an encoder or a classifier."""
    inputs = study.inputs()
    flops = workloads.counted_flops(study.baseline, inputs[0])
    work = workloads.forward_work(study.engine, flops)
    bench(
        sides=study.sides(lambda engine: engine.forward),
        inputs=inputs,
        agree=study.agree_logits,
        requests_per_call=study.cell.batch,
        **vars(work),
        **study.facts("forward"),
    )
