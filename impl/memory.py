"""What the host and the memory do around the arithmetic."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .baseline import hf_generate, serve_one_by_one
from .core import GREEDY, Engine, NotEngaged, Sampling, technique
from .fidelity import same_tokens

# Operations whose result the host must see before it can go on: .item(), bool(), sizes from data.
READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")


class HostSyncs(TorchDispatchMode):
    """Counts the moments at which the host waits for the device, by operation.

    ``.item()``, ``.tolist()`` and ``bool()`` of a tensor, results whose size depends on data, and
    copies to the host.  On a CPU the copies are none and ``.tolist()`` is not seen.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in READS or (name in ("_to_copy", "copy_") and _to_host(name, args, out)):
            self.found.append(name)
        return out


def _to_host(name: str, args, out) -> bool:
    source = args[1] if name == "copy_" else args[0]
    return source.device.type != "cpu" and out.device.type == "cpu"


def host_syncs(run) -> list[str]:
    """The operations of ``run()`` that made the host wait, in order."""
    with HostSyncs() as mode:
        run()
    return mode.found


def _no_sync_while_generating(engine: Engine, run) -> str:
    """Transformers' own loop on the same model is the control: it must be seen to synchronize."""
    ids, n = torch.full((1, 8), 5, device=engine.device), 4
    theirs = host_syncs(lambda: hf_generate(engine.model)(ids, n))
    ours = host_syncs(lambda: engine.generate(ids, n))
    if ours or len(theirs) < n:
        raise NotEngaged(
            f"{len(ours)} host synchronizations in {n} tokens {sorted(set(ours))}; transformers' "
            f"own loop shows {len(theirs)}"
        )
    run()
    return f"no host synchronization in {n} tokens; transformers' own loop has {len(theirs)}"


@technique(phase="decode", host="transformers", needs={"generate"}, replaces=("host", "decode"),
           fidelity=same_tokens, effect=_no_sync_while_generating)  # fmt: skip
def host_sync_free(engine: Engine) -> Engine:
    """The host never reads a token: it launches every step and the ids come back once, at the end.

    transformers' model and cache under a loop of ours.  Its own loop asks after every token
    whether all rows have ended, which makes the host wait for the device; then the device waits
    for the host to launch the next step.  Helps on a GPU when launching a step takes the host as
    long as running it.  On a CPU nothing runs ahead and reading a number is free: what is gained
    there is the Python of the loop (logits processors, stopping criteria).  Gives up stopping at
    an end token, or checks it late.
    Source: https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html#avoid-unnecessary-cpu-gpu-synchronization
    """
    engine.stats["host"] = "transformers"
    engine.generate = lambda ids, n, sampling=GREEDY, on_token=None: generate_on_device(
        engine.model, ids, n, sampling, on_token
    )
    engine.serve = serve_one_by_one(engine)
    return engine


@torch.inference_mode()
def generate_on_device(model, ids: torch.Tensor, max_new_tokens: int,
                       sampling: Sampling = GREEDY, on_token=None) -> torch.Tensor:  # fmt: skip
    """ids (B, T) -> (B, T + max_new_tokens) by transformers' ``model`` and its dynamic cache."""
    from transformers import DynamicCache

    from .models.generation import next_tokens, uniforms

    B, T = ids.shape
    out = ids.new_empty(B, T + max_new_tokens)
    out[:, :T] = ids
    cache = DynamicCache(config=model.config)
    u = None
    if sampling.temperature:
        u = uniforms(sampling, range(B), max_new_tokens, ids.device)
    token = ids
    for i in range(max_new_tokens):
        step = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = step.logits[:, -1:]  # (B, 1, V)
        token = next_tokens(logits, sampling, None if u is None else u[:, i : i + 1])  # (B, 1)
        out[:, T + i : T + i + 1] = token
        if on_token is not None:
            on_token(token)
    return out
