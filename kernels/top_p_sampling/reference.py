"""A token drawn from the nucleus of softmax(logits / temperature) by a given uniform."""

import torch


def top_p_sampling(logits: torch.Tensor, uniform: torch.Tensor, temperature: float,
                   top_p: float) -> torch.Tensor:  # fmt: skip
    """logits (..., V), uniform (...) -> token (...) int64; sorts, in fp32 (fp64 for fp64)."""
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    highest = x.amax(-1, keepdim=True)
    weight, kept = nucleus(x, highest, temperature, top_p)
    running = torch.where(kept, weight, 0.0).cumsum(-1)
    passed = running > uniform.to(x.dtype)[..., None] * running[..., -1:]
    # where rounding lets none pass: the last token that added something
    last = (running < running[..., -1:]).sum(-1)
    token = torch.where(passed.any(-1), passed.int().argmax(-1), last)
    drawable = highest.isfinite()[..., 0] & ~uniform.isnan()
    return torch.where(drawable, token, -1)


def nucleus(x: torch.Tensor, highest: torch.Tensor, temperature: float,
            top_p: float) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(weights exp((x - highest) / temperature), which are in the nucleus), both (..., V)."""
    if temperature == 0:
        temperature, top_p = 1.0, 0.0
    difference = torch.where(x == highest, 0.0, (x - highest) / temperature)
    weight = difference.exp()
    if top_p >= 1:
        return weight, torch.ones_like(weight, dtype=torch.bool)
    order = x.sort(dim=-1, descending=True, stable=True).indices  # of equals the first stays first
    running = weight.gather(-1, order).cumsum(-1)
    before = running.roll(1, -1)
    before[..., 0] = -1.0  # the most probable token is always in
    kept = before < top_p * running[..., -1:]
    return weight, torch.zeros_like(kept).scatter(-1, order, kept)
