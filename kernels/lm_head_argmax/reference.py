"""token = argmax over v of x . weight[v], and that logit."""

import torch


def lm_head_argmax(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., K), weight (V, K) -> top (...) fp32 (fp64 for fp64), token (...) int64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    top, token = (x.to(wide) @ weight.to(wide).T).max(-1)
    return top, token


def best_of_blocks(tops: torch.Tensor, tokens: torch.Tensor, top: torch.Tensor,
                   token: torch.Tensor) -> None:  # fmt: skip
    """Write the best of each column of tops (blocks, rows): the first token of equal ones."""
    best = tops.amax(0)  # NaN where there is one
    wins = (tops == best) | tops.isnan()
    top.copy_(best)
    token.copy_(torch.where(wins, tokens, torch.iinfo(torch.int32).max).amin(0))
