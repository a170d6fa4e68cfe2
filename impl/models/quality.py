"""What a technique costs in quality, measured against a reference on held-out data.

Decoders     perplexity, KL (nats per token), top-1 agreement, completion of held-out names
Classifiers  accuracy on the held-out digits, or on the user's images; agreement without any
Encoders     cosine to the reference's embeddings, retrieval of a pydoc topic by its title

Each is a paired difference, so its standard error is that of the difference, not of the metric.
All forwards of a metric have one shape, so that a compiled model compiles once for them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from impl.core import Engine, StudyError

from . import data, inputs
from .images import labelled_images

CONTEXT = 256  # tokens of one row of held-out text; two rows make a forward
ROWS = 2
COMPLETION_CONTEXT, COMPLETION_ROWS = 128, 4  # half the tokens before a name: half the time
P_THRESHOLD = 1e-4  # same_distribution: a correct sampler fails one test in ten thousand

# profile -> tokens of text, completions, images, topics; None: all there are
SIZES: dict[str, tuple[int | None, int, int | None, int | None]] = {
    "smoke": (1024, 8, 128, 16),
    "core": (2048, 32, None, 40),
    "headline": (16384, 64, None, None),
    "full": (None, 256, None, None),
}
KEEP_BYTES = 512 << 20  # reference outputs up to this many bytes are kept for the next cell

_kept: WeakKeyDictionary = WeakKeyDictionary()  # the reference's model -> {data: outputs}


def quality_of(engine: Engine, reference: Engine, profile: str = "core") -> list[dict[str, Any]]:
    """Metrics of ``engine`` against ``reference``: dicts of metric, value, baseline, delta
    (value - baseline), stderr (of the delta), budget (None; the caller knows it), data (hash).

    profile  how much data: a key of ``SIZES``
    Random weights have no quality: an empty list.  Raises ``StudyError`` for an unknown profile.
    """
    if profile not in SIZES:
        raise StudyError(f"unknown profile {profile!r}; known: {', '.join(SIZES)}")
    if engine.spec.random_weights:
        return []
    measure = {"decoder": _decoder, "classifier": _classifier, "encoder": _encoder}
    with torch.inference_mode():
        return measure[engine.spec.kind](engine, reference, SIZES[profile])


def digest(*tensors: Tensor) -> str:
    """Hash of the data measured on; figures with different hashes are not compared."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return "sha256:" + found.hexdigest()[:16]


def _metric(name: str, value: float, baseline: float, stderr: float, source: str) -> dict:
    numbers = {"value": value, "baseline": baseline, "delta": value - baseline, "stderr": stderr}
    finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    return {"metric": name, **finite, "budget": None, "data": source}


def stderr_of_mean(samples: Tensor) -> float:
    """Standard error of the mean of independent samples (n,)."""
    n = samples.numel()
    return samples.double().std().item() / math.sqrt(n) if n > 1 else math.inf


def kept_outputs(reference: Engine, key: str, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """``make()``, or what it gave for this reference before (as long as the model lives)."""
    known = _kept.setdefault(reference.model, {})
    if key not in known:
        outputs = make()
        if sum(t.nbytes for t in outputs) > KEEP_BYTES:
            return outputs
        known[key] = outputs
    return known[key]


# ---- decoders ----------------------------------------------------------------------------


def _text(engine: Engine, tokens: int | None) -> Tensor:
    """Rows of text (n, CONTEXT) int64, an even number of them; longer text is cut."""
    spec = engine.spec
    if spec.source == "checkpoint":
        ids = inputs.text_ids(spec)[:tokens]
    else:
        ids = data.held_out_ids(tokens) % spec.config["vocab_size"]
    rows = len(ids) // (ROWS * CONTEXT) * ROWS
    if not rows:
        raise StudyError(
            f"{len(ids)} tokens of text are too few to measure quality on; give a --text FILE of "
            f"{ROWS * CONTEXT} tokens or more"
        )
    return ids[: rows * CONTEXT].view(rows, CONTEXT)


def _logits(engine: Engine, ids: Tensor) -> list[Tensor]:
    """Logits (ROWS, CONTEXT, V) of every forward over ids (n, CONTEXT)."""
    return [engine.forward(rows.to(engine.device)) for rows in ids.split(ROWS)]


def _decoder(engine: Engine, reference: Engine, size) -> list[dict]:
    ids = _text(engine, size[0])
    source = digest(ids)
    theirs = kept_outputs(reference, source, lambda: _logits(reference, ids))
    losses, base_losses, divergence, same = [], [], [], []
    for rows, expected in zip(ids.split(ROWS), theirs, strict=True):
        following = rows[:, 1:].to(engine.device)  # (ROWS, CONTEXT - 1)
        ours = F.log_softmax(engine.forward(rows.to(engine.device))[:, :-1].float(), -1)
        base = F.log_softmax(expected[:, :-1].float(), -1)
        losses.append(-ours.gather(-1, following[..., None]).flatten())
        base_losses.append(-base.gather(-1, following[..., None]).flatten())
        divergence.append(F.kl_div(ours, base, reduction="none", log_target=True).sum(-1).flatten())
        same.append((ours.argmax(-1) == base.argmax(-1)).flatten())
    loss, base_loss = torch.cat(losses).double(), torch.cat(base_losses).double()
    value, baseline = loss.mean().exp().item(), base_loss.mean().exp().item()
    kl, agreement = torch.cat(divergence).double(), torch.cat(same).double()
    found = [
        # d exp(m) = exp(m) dm: the error of the mean difference in nats, in units of perplexity
        _metric("perplexity", value, baseline, baseline * stderr_of_mean(loss - base_loss), source),
        _metric("kl", kl.mean().item(), 0.0, stderr_of_mean(kl), source),
        _metric("top1_agreement", agreement.mean().item(), 1.0, stderr_of_mean(agreement), source),
    ]
    if "completion" in engine.spec.metrics:
        found.append(_completion(engine, reference, size[1]))
    return found


def _completion(engine: Engine, reference: Engine, count: int) -> dict:
    task = data.completion_task(count, COMPLETION_CONTEXT)
    source = digest(task.ids, task.answer)

    def right(run: Engine) -> Tensor:
        rows = []
        parts = (rows.split(COMPLETION_ROWS) for rows in (task.ids, task.answer))
        for ids, answer in zip(*parts, strict=True):
            guess = run.forward(ids.to(run.device))[:, :-1].argmax(-1).cpu()
            rows.append(((guess == ids[:, 1:]) | ~answer[:, 1:]).all(-1))
        return torch.cat(rows).double()

    ours = right(engine)
    (theirs,) = kept_outputs(reference, source, lambda: [right(reference)])
    return _metric("completion", ours.mean().item(), theirs.mean().item(),
                   stderr_of_mean(ours - theirs), source)  # fmt: skip


# ---- classifiers and encoders --------------------------------------------------------------


def _batches(engine: Engine, count: int) -> int:
    """The number of items to take: whole batches of the engine's size, one at least."""
    if count < engine.batch:
        raise StudyError(f"{count} items are fewer than a batch of {engine.batch}")
    return count // engine.batch * engine.batch


def _classifier(engine: Engine, reference: Engine, size) -> list[dict]:
    labels = None
    if engine.spec.name == "digits_resnet":
        digits = data.digits()
        images, labels = digits.test_images[: size[2]], digits.test_labels[: size[2]]
    elif engine.spec.data:
        images, labels = labelled_images(engine.spec)
    else:
        images = inputs.images(engine.spec, 4 * engine.batch, 0)
    count = _batches(engine, len(images))
    images, labels = images[:count], None if labels is None else labels[:count]
    source = digest(images)

    def classes(run: Engine) -> Tensor:
        parts = images.to(run.device, run.dtype).split(engine.batch)
        return torch.cat([run.forward(part).argmax(-1) for part in parts]).cpu()

    ours = classes(engine)
    (theirs,) = kept_outputs(reference, source, lambda: [classes(reference)])
    if labels is None:
        same = (ours == theirs).double()
        return [_metric("top1_agreement", same.mean().item(), 1.0, stderr_of_mean(same), source)]
    right, base = (ours == labels).double(), (theirs == labels).double()
    return [_metric("accuracy", right.mean().item(), base.mean().item(),
                    stderr_of_mean(right - base), source)]  # fmt: skip


def _encoder(engine: Engine, reference: Engine, size) -> list[dict]:
    topics = list(data.topics().items())[: size[3]]
    texts = [title for title, _ in topics] + [body for _, body in topics]
    texts += texts[: -len(texts) % engine.batch]  # fill the last batch
    made = inputs.encode(engine.spec, texts)
    made = {k: made[k] for k in ("input_ids", "attention_mask")}
    source = digest(*made.values())

    def embeddings(run: Engine) -> Tensor:
        parts = []
        for start in range(0, len(texts), engine.batch):
            rows = {k: v[start : start + engine.batch].to(run.device) for k, v in made.items()}
            parts.append(run.forward(rows))
        return F.normalize(torch.cat(parts)[: 2 * len(topics)].double().cpu(), dim=-1)

    def found(embedded: Tensor) -> Tensor:  # is a title nearest to its own text?
        titles, bodies = embedded.chunk(2)  # each (n, C)
        return ((titles @ bodies.T).argmax(-1) == torch.arange(len(topics))).double()

    ours = embeddings(engine)
    (theirs,) = kept_outputs(reference, source, lambda: [embeddings(reference)])
    cosine = (ours * theirs).sum(-1)
    metrics = [_metric("cosine", cosine.mean().item(), 1.0, stderr_of_mean(cosine), source)]
    if "retrieval" in engine.spec.metrics:
        hit, base = found(ours), found(theirs)
        metrics.append(_metric("retrieval", hit.mean().item(), base.mean().item(),
                               stderr_of_mean(hit - base), source))  # fmt: skip
    return metrics


# ---- checks of what was emitted --------------------------------------------------------------


def tokens_agree(reference_logits: Tensor, tokens: Tensor, prompt_len: int,
                 margin: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(violations, near ties), each (B, new) bool: is every new token the reference's choice?

    reference_logits  (B, T, V) of ONE forward of the reference over ``tokens`` (B, T): position t
                      judges token t + 1, so each is judged given what was really emitted before it
    margin            a token whose logit is at most this far below the largest is a near tie,
                      further below (or not a number) a violation
    """
    if not 0 < prompt_len <= tokens.shape[1] or reference_logits.shape[:2] != tokens.shape:
        raise StudyError(
            f"logits {tuple(reference_logits.shape)} do not judge tokens {tuple(tokens.shape)} "
            f"after a prompt of {prompt_len}; run the reference over prompt and answer"
        )
    logits = reference_logits[:, prompt_len - 1 : -1].float()  # (B, new, V)
    emitted = tokens[:, prompt_len:, None].to(logits.device)  # (B, new, 1)
    gap = (logits.amax(-1) - logits.gather(-1, emitted)[..., 0]).nan_to_num(torch.inf)
    violations = gap > margin
    return violations, (gap > 0) & ~violations


def same_distribution(draws: Tensor, probs: Tensor) -> float:
    """p-value of Pearson's chi-square test that draws (N,) int64 follow probs (V,).

    Tokens expected five times or more have a bin of their own, the others share one (joined to
    the rarest bin when it is expected less than five times).  A correct sampler gives less than
    ``P_THRESHOLD`` once in ten thousand tests.  A draw of a token of probability 0 gives 0.
    Source: Pearson 1900, https://doi.org/10.1080/14786440009463897
    """
    from scipy.stats import chisquare

    draws, probs = draws.flatten().cpu(), probs.double().cpu()
    seen = torch.bincount(draws, minlength=len(probs)).double()
    if (seen[probs == 0] > 0).any():
        return 0.0
    expected = probs / probs.sum() * len(draws)
    order = expected.argsort(descending=True)
    own = order[expected[order] >= 5]
    rest = order[len(own) :]
    bins = [[e, s] for e, s in zip(expected[own].tolist(), seen[own].tolist(), strict=True)]
    bins.append([expected[rest].sum().item(), seen[rest].sum().item()])
    if bins[-1][0] < 5 and len(bins) > 1:
        few = bins.pop()
        bins[-1] = [a + b for a, b in zip(bins[-1], few, strict=True)]
    if len(bins) < 2:
        raise StudyError(f"{len(draws)} draws fill no two bins of five; draw more")
    want, got = zip(*bins, strict=True)
    return float(chisquare(got, want, sum_check=False).pvalue)
