"""Text and images that every Python installation carries, split once and for all.

Text: the standard library's own source and the pydoc topics, found through `sysconfig`, so that the
repository ships none of it. Held-out modules are a fixed list; all else is for training. Images:
scikit-learn's digits. Nothing here reads the network.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from impl.core import StudyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WEIGHTS = Path(__file__).parent / "weights"
WINDOW = 512  # tokens of one contiguous stretch of held-out text
NUM_PROMPTS = 32
MAX_PROMPT = 2048
END_OF_TEXT = "<|endoftext|>"

# Present in every Python from 3.11 to 3.14, under the same path, also where a distribution splits
# the library into packages. Parsers, containers, network, maths, files, text.
HELD_OUT = (
    "calendar.py",
    "configparser.py",
    "csv.py",
    "fractions.py",
    "graphlib.py",
    "gzip.py",
    "heapq.py",
    "json/decoder.py",
    "json/encoder.py",
    "plistlib.py",
    "queue.py",
    "shlex.py",
    "smtplib.py",
    "socketserver.py",
    "statistics.py",
    "tempfile.py",
    "textwrap.py",
    "tracemalloc.py",
)
# Tests, installed packages, generated tables of code points, and files that differ per machine.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-", "pydoc_data/topics", "lib-")
TOPIC_PREFIX = "pydoc topic/"


@dataclass(frozen=True)
class Split:
    """Texts by name, in sorted order. `sha256` covers names and bytes."""

    modules: dict[str, str]

    @functools.cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name, text in self.modules.items():
            raw = text.encode()
            digest.update(f"{name}\0{len(raw)}\0".encode() + raw)
        return digest.hexdigest()

    @functools.cached_property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.modules.values())


class Splits(NamedTuple):
    train: Split
    held_out: Split

    @property
    def sha256(self) -> str:
        """One hash of both splits: figures with different hashes are not comparable."""
        return hashlib.sha256((self.train.sha256 + self.held_out.sha256).encode()).hexdigest()


def topics() -> dict[str, str]:
    """The help texts of `pydoc`, name -> text: about 80 short manual pages."""
    from pydoc_data.topics import topics as texts

    return {name: texts[name] for name in sorted(texts)}


@functools.cache
def stdlib_text(root: Path | None = None) -> Splits:
    """Source of the standard library, split by `HELD_OUT`, with the pydoc topics in `train`.

    A file equal byte for byte to a held-out one, or to an earlier training file, is dropped. Files
    that are not UTF-8 are dropped. Raises StudyError where a held-out module is not installed.
    """
    found = root is None
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    texts: dict[str, str] = {}
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        folders = set(name.split("/")[:-1])
        if folders & SKIPPED_FOLDERS or name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            texts[name] = path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue
    missing = [name for name in HELD_OUT if name not in texts]
    if missing:
        raise StudyError(
            f"The Python standard library at {root} has no source for {', '.join(missing)}: "
            "install the full library of this Python, or pass a text of your own with --text FILE."
        )
    held_out = {name: texts.pop(name) for name in HELD_OUT}
    seen = set(held_out.values())
    train: dict[str, str] = {}
    documents = list(texts.items())
    if found:
        documents += [(TOPIC_PREFIX + name, text) for name, text in topics().items()]
    for name, text in documents:
        if text.strip() and text not in seen:
            seen.add(text)
            train[name] = text
    return Splits(Split(train), Split(held_out))


def load_text(path: str | Path) -> str:
    """A user's own text file. Raises StudyError when it is missing, empty, or not UTF-8."""
    path = Path(path)
    if path.is_dir():
        raise StudyError(f"{path} is a folder: name one UTF-8 text file.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise StudyError(f"There is no text file {path}: check the path.") from None
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): name another file.") from None
    except UnicodeDecodeError as error:
        raise StudyError(
            f"{path} is not UTF-8 (byte {error.start}): convert it, for example with "
            "iconv -t utf-8."
        ) from None
    if not text.strip():
        raise StudyError(f"{path} is empty: name a file with text in it.")
    return text


@functools.cache
def tokenizer() -> Tokenizer:
    """The shipped byte-level BPE of 3840 tokens, trained on the training split."""
    from tokenizers import Tokenizer

    path = WEIGHTS / "tokenizer.json"
    if not path.exists():
        raise StudyError(f"{path} is missing: make it with python -m impl.models.train tokenizer.")
    return Tokenizer.from_file(str(path))


def encode_documents(documents: list[str]) -> Tensor:
    """Token ids of the documents, each one begun by the end-of-text token: (N,) int64."""
    tok = tokenizer()
    end: Any = tok.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tok.encode_batch(documents, add_special_tokens=False):
        ids.append(end)
        ids += encoding.ids
    return torch.tensor(ids)


@functools.cache
def _held_out_stream() -> Tensor:
    return encode_documents(list(stdlib_text().held_out.modules.values()))


def held_out_ids(n_tokens: int | None = None) -> Tensor:
    """Held-out text as token ids: (n_tokens,) int64; all of it when `n_tokens` is None.

    Contiguous stretches of up to `WINDOW` tokens spaced evenly over all held-out modules, so that a
    small sample is a fair one. Raises StudyError when there is less text than asked for.
    """
    stream = _held_out_stream()
    if n_tokens is None:
        return stream.clone()
    if not 0 < n_tokens <= len(stream):
        raise StudyError(f"{n_tokens} held-out tokens asked for: there are 1 to {len(stream)}.")
    windows = -(-n_tokens // WINDOW)
    size = min(WINDOW, n_tokens)
    last = len(stream) - size
    starts = [i * last // max(windows - 1, 1) for i in range(windows)]
    return torch.cat([stream[start : start + size] for start in starts])[:n_tokens]


def prompts(n: int = NUM_PROMPTS, length: int = 128) -> Tensor:
    """The first `n` of 32 fixed held-out prompts: (n, length) int64.

    A longer prompt begins with the shorter one; each starts at the beginning of a line.
    """
    if not 1 <= n <= NUM_PROMPTS or not 1 <= length <= MAX_PROMPT:
        raise StudyError(
            f"{n} prompts of {length} tokens asked for: there are 1 to {NUM_PROMPTS} prompts of 1 "
            f"to {MAX_PROMPT} tokens."
        )
    stream = _held_out_stream()
    tok = tokenizer()
    spacing = (len(stream) - MAX_PROMPT - WINDOW) // (NUM_PROMPTS - 1)
    rows = []
    for i in range(n):
        start = i * spacing
        while "\n" not in tok.decode([int(stream[start])]):
            start += 1
        rows.append(stream[start + 1 : start + 1 + length])
    return torch.stack(rows)


def repeated_ngrams(ids: Tensor, n: int = 8) -> float:
    """Share of the n-grams of each row that stood in that row before, averaged over all n-grams.

    ids (B, T) or (T,). Text that repeats itself flatters prompt lookup and any cache of n-grams.
    """
    repeated = total = 0
    for row in torch.atleast_2d(ids).tolist():
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0


class Completion(NamedTuple):
    """Rows of held-out code that end in an attribute access.

    ids (N, T) int64; answer (N, T) bool marks the tokens of `.name`, the last ones of each row.
    """

    ids: Tensor
    answer: Tensor

    def accuracy(self, logits: Tensor) -> float:
        """Share of rows whose `.name` greedy decoding would write in full. logits (N, T, V)."""
        right = logits[:, :-1].argmax(-1) == self.ids[:, 1:]  # (N, T - 1)
        return (right | ~self.answer[:, 1:]).all(-1).double().mean().item()


@functools.cache
def completion_task(n: int = 256, length: int = 192) -> Completion:
    """`n` attribute accesses spread evenly over the held-out modules, each after its own context.

    The context ends before the dot: greedy decoding must write the dot and the whole name.
    """
    tok = tokenizer()
    rows = []
    for text in stdlib_text().held_out.modules.values():
        lines = text.splitlines(keepends=True)
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        code = list(tokenize.generate_tokens(iter([*lines, ""]).__next__))
        accesses = {
            (starts[dot.start[0] - 1] + dot.start[1], starts[name.end[0] - 1] + name.end[1])
            for dot, name in itertools.pairwise(code)
            if dot.string == "." and name.type == tokenize.NAME and len(name.string) >= 3
        }
        encoding = tok.encode(text, add_special_tokens=False)
        first_at = {begin: i for i, (begin, _) in enumerate(encoding.offsets)}
        last_at = {end: i for i, (_, end) in enumerate(encoding.offsets)}
        for begin, end in sorted(accesses):
            first, last = first_at.get(begin), last_at.get(end)
            if first is not None and last is not None and last + 1 >= length:
                rows.append((encoding.ids[last + 1 - length : last + 1], last + 1 - first))
    if len(rows) < n:
        raise StudyError(f"The held-out modules hold {len(rows)} completions, fewer than {n}.")
    chosen = [rows[i * len(rows) // n] for i in range(n)]
    answer = torch.zeros(n, length, dtype=torch.bool)
    for row, (_, size) in enumerate(chosen):
        answer[row, -size:] = True
    return Completion(torch.tensor([ids for ids, _ in chosen]), answer)


class Digits(NamedTuple):
    """Images (N, 1, 32, 32) float32 with mean near 0, labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@functools.cache
def digits() -> Digits:
    """scikit-learn's 1797 handwritten digits, 8x8 enlarged to 32x32; every fourth one held out."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear")  # (N, 1, 32, 32)
    images = (images - 0.3) / 0.37
    labels = torch.tensor(source.target, dtype=torch.int64)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[::4]] = True
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])
