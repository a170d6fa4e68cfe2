"""How long does one answer take?"""

import functools

import pytest
import torch

from impl.models import inputs
from impl.models.data import repeated_ngrams
from tests import workloads
from tests.plugins.trace import pipeline_breakdown


def forward_of(engine):
    """One forward: logits, or what an encoder returns."""
    return engine.forward


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
            "repeated_8grams": repeated_ngrams(study.answer),
            **study.counters(),
        }

    bench(
        sides=study.sides(call),
        table=study.table(call),
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
        sides=study.sides(forward_of),
        table=study.table(forward_of),
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
        sides=study.sides(forward_of),
        table=study.table(forward_of),
        inputs=inputs,
        agree=study.agree_logits,
        requests_per_call=study.cell.batch,
        **vars(work),
        **study.facts("forward"),
    )


@pytest.mark.kinds("decoder")
@pytest.mark.moves("text")
@pytest.mark.sparse
def test_text_to_text(study, bench):
    """Text in, text out: what share tokenizing, moving, computing and writing text take."""
    if study.spec.random_weights:
        pytest.skip("random weights write no text")
    n, tokenizer = study.size.new_tokens, inputs.text_tokenizer(study.spec)

    def stages(engine):
        return {
            "tokenize": lambda box: torch.tensor([tokenizer.encode(box[0])]),
            "transfer": lambda ids: ids.to(engine.device),
            "execute": lambda ids: engine.generate(ids, n).cpu(),
            "decode text": lambda ids: tokenizer.decode(ids[0].tolist()),
        }

    def pipeline(engine):
        return lambda box: functools.reduce(lambda x, stage: stage(x), stages(engine).values(), box)

    def agree(text, box):
        ids = torch.tensor([tokenizer.encode(box[0])])
        answer = torch.tensor([tokenizer.encode(text)])
        if answer.shape[1] == ids.shape[1] + n:  # text that tokenizes back to what was emitted
            study.agree(answer.to(study.device), ids.to(study.device))
        assert text == pipeline(study.baseline)(box), "the text differs from the baseline's"

    def swap(box):
        before = list(box)
        box[:] = texts[-1]
        return lambda: box.__setitem__(slice(None), before)

    texts = [[tokenizer.decode(ids[0].tolist())] for ids in study.inputs()]
    bench(
        sides=study.sides(pipeline),
        table=study.table(pipeline),
        inputs=texts,
        agree=agree,
        change=swap,
        context={"prompt_tokens": study.size.prompt_tokens, "new_tokens": n},
        extra=lambda: {"pipeline": pipeline_breakdown(stages(study.engine), texts[0])},
        **study.facts(f"text to text, {n} new tokens"),
    )
