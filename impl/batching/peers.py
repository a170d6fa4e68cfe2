"""transformers' own batching: padded ``generate``, and its continuous batching manager."""

from __future__ import annotations

import copy
import math

import torch

from impl.baseline import hf_generate
from impl.core import Engine, NotEngaged, Request, Response, technique
from impl.fidelity import same_tokens
from impl.machine import finish

from .proofs import crowd
from .replay import Arrivals, Clock, slots_for

PAGE = 256  # tokens in a block of the manager's cache (its default in 5.17 and in 5.23)
PACKED_TOKENS = 2048  # prompt and new tokens in one forward of the manager, at most


def _fewer_forwards_than_tokens(engine: Engine, run) -> str:
    """One by one takes a forward per token; whoever takes fewer serves several at once."""
    kind, forwards, requests = type(engine.model), 0, crowd(engine)

    def see(module, _):
        nonlocal forwards
        forwards += type(module) is kind

    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        engine.serve(requests)
    finally:
        hook.remove()
    tokens = sum(r.max_new_tokens for r in requests)
    if not forwards or forwards >= tokens:
        raise NotEngaged(f"{forwards} forwards for {tokens} new tokens: one request at a time")
    run()
    return f"{forwards} forwards for {tokens} new tokens of {len(requests)} requests"


def _set_up(engine: Engine) -> int:
    """Mark the engine as transformers' own; the positions its model has."""
    engine.stats["host"] = "transformers"
    engine.generate = hf_generate(engine.model)
    return getattr(engine.model.config, "max_position_embeddings", None) or math.inf


@technique(phase="schedule", host="transformers", needs={"generate"}, min_batch=2,
           replaces=("host", "scheduler"), fidelity=same_tokens,
           effect=_fewer_forwards_than_tokens)  # fmt: skip
def peer_padded_generate(engine: Engine) -> Engine:
    """Static batches through transformers' ``generate``, padded on the left: what most users do.

    A full batch of those that have arrived runs to its longest answer; each keeps its own length.
    Source: https://huggingface.co/docs/transformers/llm_tutorial (padding side)
    """
    limit = _set_up(engine)

    def serve(requests: list[Request]) -> list[Response]:
        if not requests:
            return []
        slots_for(requests, limit)  # refuses what the model cannot hold
        clock, answers = Clock(), {}
        arrivals, device = Arrivals(requests, clock), engine.device
        while arrivals:
            arrivals.wait(engine.batch)
            batch = arrivals.take(engine.batch)
            longest = max(len(r.ids) for r in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            real = torch.zeros_like(ids)
            for row, r in enumerate(batch):
                ids[row, longest - len(r.ids) :], real[row, longest - len(r.ids) :] = r.ids, 1
            first: list[float] = []

            def mark(_, first=first):
                finish(device)
                first.append(clock.now())

            out = hf_generate(engine.model)(
                ids.to(device), max(r.max_new_tokens for r in batch),
                on_token=mark, real=real.to(device))  # fmt: skip
            done, out = clock.now(), out.cpu()
            for r, row in zip(batch, out, strict=True):
                text = torch.cat((r.ids.cpu(), row[longest : longest + r.max_new_tokens]))
                answers[r.id] = Response(r.id, text.to(r.ids.device), first[0], done)
        return [answers[r.id] for r in requests]

    engine.serve = serve
    return engine


@technique(phase="schedule", host="transformers", needs={"generate", "lean"}, min_batch=2,
           replaces=("host", "scheduler"), fidelity=same_tokens,
           effect=_fewer_forwards_than_tokens)  # fmt: skip
def peer_generate_batch(engine: Engine) -> Engine:
    """transformers' continuous batching (``generate_batch``), fed at the times of arrival.

    Its manager packs prompts and new tokens of up to ``engine.batch`` requests into one row over
    a paged cache, in a thread of its own.  It is started by the first replay and kept; on a CPU
    the size of the cache must be given, because it is derived from GPU memory otherwise.
    Source: https://huggingface.co/docs/transformers/continuous_batching
    """
    limit = _set_up(engine)
    # the manager may switch the attention of the model it is given: a second one, same weights
    memo = {id(t): t for t in (*engine.model.parameters(), *engine.model.buffers())}
    model = copy.deepcopy(engine.model, memo)
    managers: dict[int, object] = {}  # blocks of the cache -> the manager that runs
    engine.undo.callback(lambda: [_stop(m) for m in managers.values()])

    def serve(requests: list[Request]) -> list[Response]:
        if not requests:
            return []
        blocks = engine.batch * math.ceil(slots_for(requests, limit) / PAGE)
        if blocks not in managers:
            managers[blocks] = _start(model, engine.batch, blocks)
        manager, clock, answers = managers[blocks], Clock(), {}
        by_id = {str(r.id): r for r in requests}
        arrivals = Arrivals(requests, clock)
        began = clock.start
        while len(answers) < len(requests):
            for r in arrivals.take(len(requests)):
                manager.add_request(
                    r.ids.tolist(), request_id=str(r.id), max_new_tokens=r.max_new_tokens,
                    record_timestamps=True, eos_token_id=-1)  # fmt: skip
            left = arrivals.coming[-1].arrival_s - clock.now() if arrivals else 0.05
            result = manager.get_result(timeout=max(left, 1e-4))
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended with an error")
                continue
            if result.error:
                raise RuntimeError(f"request {result.request_id}: {result.error}")
            if result.is_finished():
                r = by_id[result.request_id]
                text = torch.cat((r.ids.cpu(), torch.tensor(result.generated_tokens)))
                times = [t - began for t in result.timestamps]
                answers[r.id] = Response(r.id, text.to(r.ids.device), times[0], clock.now())
        return [answers[r.id] for r in requests]

    engine.serve = serve
    return engine


def _start(model, batch: int, blocks: int):
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with torch.inference_mode(False):
        manager = model.init_continuous_batching(
            generation_config=greedy,
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=blocks, max_batch_tokens=PACKED_TOKENS, max_requests_per_batch=batch,
                allow_block_sharing=False),
        )  # fmt: skip
        manager.start()
    return manager


def _stop(manager) -> None:
    if manager.is_running():
        manager.stop(block=True)
