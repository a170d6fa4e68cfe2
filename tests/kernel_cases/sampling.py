"""Drawing a token from logits."""

import torch

from tests.kernel_cases import Case, Rival, Speed, bad, random, seeded

# rows, tokens: odd, one token, one row, no row, several chunks
ROWS = [(5, 123), (4, 1), (1, 384), (0, 7), (2, 20000)]
TEMPERATURE, TOP_P = 0.8, 0.9
ROUNDING = 2.0**-18  # of the whole mass: 64 roundings of fp32, what sums of a vocabulary gather


def _sampling(shape, dtype):
    logits = 3 * random(*shape, dtype=dtype)
    return [logits, torch.rand(shape[:-1], generator=seeded(shape)), TEMPERATURE, TOP_P]


def distance(token, weight, order, size, uniform) -> float:
    """How far, in mass, ``uniform`` lies from the token's share of a nucleus of ``size`` tokens."""
    kept = torch.zeros_like(weight)
    kept[order[:size]] = weight[order[:size]]
    if not 0 <= token < len(weight) or kept[token] == 0:
        return float("inf")
    end, goal = kept[: token + 1].sum().item(), uniform * kept.sum().item()
    return max(end - kept[token].item() - goal, goal - end, 0.0)


def judge(got, args) -> float:
    """Rounding may move ``top_p`` and the sums: the token is one of a nucleus so reached, or not.

    A token is right where the nucleus of ``top_p`` +- ROUNDING holds it and the uniform falls into
    its share of that nucleus, within 4 ROUNDING: two for its ends, two for the whole.
    """
    logits, uniform, temperature, top_p = args
    assert got.shape == uniform.shape
    assert got.dtype == torch.int64
    worst = 0.0
    for x, token, u in zip(logits.double(), got.tolist(), uniform.tolist(), strict=True):
        if x.isnan().any() or not x.max().isfinite() or u != u:
            worst = max(worst, 0.0 if token == -1 else float("inf"))
            continue
        p = 0.0 if temperature == 0 else top_p
        weight = torch.softmax((x - x.max()) / (temperature or 1.0), -1)
        order = x.sort(descending=True, stable=True).indices
        reached = weight[order].cumsum(0)
        fewest, most = (int((reached < p + d).sum()) + 1 for d in (-ROUNDING, ROUNDING))
        sizes = {fewest, max(fewest, most - 1), most} if p < 1 else {len(x)}
        worst = max(worst, min(distance(token, weight, order, n, u) for n in sizes) / 4 / ROUNDING)
    return worst


CASES = [
    Case("top_p_sampling", _sampling, ROWS, large=(3, 50000), row_numbers=(1,), judge=judge,
         shim_shapes=((1, 64), (2, 301)))
]  # fmt: skip


def _sorted(logits, uniform, temperature, top_p):
    """As one writes it in torch; it draws its own random numbers."""
    probs = torch.softmax(logits.float() / temperature, -1)
    most, order = probs.sort(-1, descending=True)
    kept = torch.where(most.cumsum(-1) - most < top_p, most, 0.0)
    return order.gather(-1, torch.multinomial(kept, 1))[:, 0]


def _warped(logits, uniform, temperature, top_p):
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    scores = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
    return torch.multinomial(torch.softmax(scores.float(), -1), 1)[:, 0]


SPEEDS = [
    # the vocabularies of Llama 3 and Llama 2, decoding one to 64 sequences
    Speed("top_p_sampling", _sampling, ((1, 128256), (8, 128256), (64, 128256), (1, 32000)), core=2,
          eager=Rival(_sorted), peers={"transformers_warpers": Rival(_warped)}),
]  # fmt: skip


def _with(**changes):
    good = {"logits": random(2, 5), "uniform": torch.rand(2), "temperature": 1.0, "top_p": 0.9}
    return lambda: tuple((good | changes).values())


BAD = [
    bad("top_p_sampling", name, sentence, args)
    for name, sentence, args in (
        ("dtype", "not torch.float64", _with(logits=random(2, 5).double())),
        ("empty", r"at least one token, not \(2, 0\)", _with(logits=random(2, 0))),
        ("uniform", r"float32 uniform of shape \(2,\), a number of \[0, 1\) a row, not "
         r"torch.float32 \(3,\)", _with(uniform=torch.rand(3))),
        ("strides", r"last dimension of stride 1, not 2; call .contiguous\(\)",
         _with(logits=random(2, 10)[:, ::2])),
        ("negative", r"finite temperature of 0 \(greedy\) or more, not -1.0",
         _with(temperature=-1.0)),
        ("infinite", "finite temperature of 0 .* not inf", _with(temperature=float("inf"))),
        ("nan", "finite temperature of 0 .* not nan", _with(temperature=float("nan"))),
        ("percent", r"needs a top_p of \[0, 1\], not 90.0; 1 keeps every token", _with(top_p=90)),
        ("top_p", r"needs a top_p of \[0, 1\], not nan", _with(top_p=float("nan"))),
    )
]  # fmt: skip
