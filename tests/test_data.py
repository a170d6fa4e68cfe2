"""The study's own data and weights: what is held out stays out, and recorded figures are true."""

from __future__ import annotations

import itertools
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from impl.core import StudyError
from impl.models import data, export, figures, load, train
from impl.models.recipes import RECIPES, Recipe

MAX_WEIGHTS = 40e6  # bytes of all shipped weights
MAX_FILE = 15e6
RELATIVE = 0.005  # of a figure measured again: another CPU sums in another order
TINY = Recipe(
    architecture="LlamaForCausalLM",
    config=RECIPES["lm_draft"].config
    | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16},
    steps=12,
    tokens_per_step=64,
    phases=((0.5, 16), (0.5, 32)),
    compiled=False,
)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library: every held-out module, and a training module."""
    for name in (*data.HELD_OUT, "train.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# source of {name}\n")
    return tmp_path


# ------------------------------------------------------------------------------------------ splits


def test_no_text_is_in_both_splits():
    train_split, held_out = data.stdlib_text()
    assert set(held_out.modules) == set(data.HELD_OUT)
    assert not set(train_split.modules) & set(held_out.modules)
    assert not set(train_split.modules.values()) & set(held_out.modules.values())
    assert 0.02 < held_out.num_bytes / train_split.num_bytes < 0.08


def test_a_copy_of_a_held_out_module_is_not_trained_on(library: Path):
    (library / "backport.py").write_bytes((library / "csv.py").read_bytes())
    assert set(data.stdlib_text(library).train.modules) == {"train.py"}


def test_tests_installed_packages_and_other_encodings_are_left_out(library: Path):
    for name in ("test/a.py", "site-packages/b.py", "x/__pycache__/c.py", "x/tests/d.py"):
        (library / name).parent.mkdir(parents=True)
        (library / name).write_text(f"# {name}\n")
    (library / "latin1.py").write_bytes("# café\n".encode("latin-1"))
    assert set(data.stdlib_text(library).train.modules) == {"train.py"}


def test_the_hash_follows_every_byte_and_name(library: Path, tmp_path_factory):
    before = data.stdlib_text(library)
    data.stdlib_text.cache_clear()
    assert data.stdlib_text(library).sha256 == before.sha256
    (library / "train.py").write_text("# source of train.py!\n")
    data.stdlib_text.cache_clear()
    changed = data.stdlib_text(library)
    assert changed.train.sha256 != before.train.sha256
    assert changed.held_out.sha256 == before.held_out.sha256
    assert changed.sha256 != before.sha256
    (library / "train.py").rename(library / "other.py")
    data.stdlib_text.cache_clear()
    assert data.stdlib_text(library).train.sha256 != changed.train.sha256


def test_a_library_without_a_held_out_module_is_refused(library: Path):
    (library / "csv.py").unlink()
    with pytest.raises(StudyError, match=r"has no source for csv\.py.*--text"):
        data.stdlib_text(library)


def test_topics_are_texts_by_name():
    topics = data.topics()
    assert len(topics) > 50
    assert list(topics) == sorted(topics)
    assert "lambda" in topics["lambda"].lower()


# --------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("name", data.HELD_OUT)
def test_tokenizer_gives_back_every_held_out_module(name: str):
    text = data.stdlib_text().held_out.modules[name]
    tok = data.tokenizer()
    assert tok.decode(tok.encode(text).ids) == text


@pytest.mark.parametrize("text", ["\t\r\n \x00 é 漢字 🙂 \u2028", "", "x" * 300, " " * 99])
def test_tokenizer_gives_back_any_text(text: str):
    tok = data.tokenizer()
    assert tok.decode(tok.encode(text).ids) == text


def test_tokenizer_fits_the_models():
    assert data.tokenizer().get_vocab_size() == RECIPES["lm_small"].config["vocab_size"] == 3840
    assert data.tokenizer().token_to_id(data.END_OF_TEXT) == 0
    assert data.stdlib_text().held_out.num_bytes / len(data.held_out_ids()) > 3.3


# ------------------------------------------------------------------------------ held-out samples


def test_prompts_are_held_out_and_fixed():
    prompts = data.prompts(length=64)
    assert prompts.shape == (32, 64)
    assert torch.equal(prompts, data.prompts(32, 256)[:, :64])
    assert torch.equal(prompts[:5], data.prompts(5, 64))
    stream = data.held_out_ids().unfold(0, 64, 1)
    rows = prompts.unique(dim=0)
    assert len(rows) == 32
    assert all((stream == row).all(1).any() for row in rows)


def test_no_prompt_stands_in_the_training_text():
    text = "\0".join(data.stdlib_text().train.modules.values())
    tok = data.tokenizer()
    copied = [t for t in tok.decode_batch(data.prompts(length=128).tolist()) if t in text]
    assert not copied


def test_a_sample_of_held_out_text_covers_all_of_it():
    stream = data.held_out_ids()
    sample = data.held_out_ids(8 * data.WINDOW)
    assert len(sample) == 8 * data.WINDOW
    assert torch.equal(sample[: data.WINDOW], stream[: data.WINDOW])
    assert torch.equal(sample[-data.WINDOW :], stream[-data.WINDOW :])


@pytest.mark.parametrize(("n", "length"), [(33, 8), (1, 4096), (0, 8), (1, 0)])
def test_more_prompts_than_there_are_is_an_error(n: int, length: int):
    with pytest.raises(StudyError, match="there are 1 to 32 prompts of 1 to 2048 tokens"):
        data.prompts(n, length)


def test_more_held_out_text_than_there_is_is_an_error():
    with pytest.raises(StudyError, match="there are 1 to"):
        data.held_out_ids(10**9)


def test_repeated_ngrams_counts_what_stood_before():
    assert data.repeated_ngrams(torch.arange(20)) == 0
    assert data.repeated_ngrams(torch.zeros(2, 20)) == 12 / 13  # 13 equal 8-grams a row
    twice = torch.cat([torch.arange(10), torch.arange(10)])
    assert data.repeated_ngrams(twice) == 3 / 13


def test_completion_task_asks_for_attribute_names():
    task = data.completion_task()
    tok = data.tokenizer()
    names = [tok.decode(ids[mask].tolist()) for ids, mask in zip(*task, strict=True)]
    assert all(name.startswith(".") and name[1:].isidentifier() for name in names)
    assert len(set(names)) > 100


def test_completion_needs_every_token_of_the_name():
    task = data.completion_task(32)
    right = F.one_hot(task.ids.roll(-1, 1), 3840).float()  # (N, T, V): predicts the next token
    assert task.accuracy(right) == 1
    right[:10, -2] = F.one_hot(torch.tensor(1), 3840).float()  # a wrong last token
    assert task.accuracy(right) == 1 - 10 / 32


def test_digits_are_split_once():
    images, labels, test_images, test_labels = data.digits()
    assert images.shape == (1347, 1, 32, 32)
    assert test_images.shape == (450, 1, 32, 32)
    assert labels.bincount().min() > 100
    assert test_labels.bincount().min() > 30
    seen = {bytes(image.numpy().tobytes()) for image in images}
    assert not any(bytes(image.numpy().tobytes()) in seen for image in test_images)


# ------------------------------------------------------------------------------------- user's text


def test_a_text_file_is_read_without_its_byte_order_mark(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("\ufeffdéjà vu".encode())
    assert data.load_text(tmp_path / "a.txt") == "déjà vu"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no text file"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"caf\xe9", r"not UTF-8 \(byte 3\)"),
    ],
)
def test_a_bad_text_file_is_named_with_the_remedy(tmp_path: Path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StudyError, match=message):
        data.load_text(path)
    with pytest.raises(StudyError, match="is a folder"):
        data.load_text(tmp_path)


# ---------------------------------------------------------------------------------------- training


def tiny_run(folder: Path) -> train.Run:
    return train.Run("tiny", TINY, folder=folder)


def tiny_loss(model, progress: float, step: int):
    length = train.sequence_length(progress, TINY)
    rows = train.text_batch(torch.arange(1000) ** 2 % 64, step, 64 // length, length)
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def test_training_resumes_bit_for_bit(tmp_path: Path):
    straight = tiny_run(tmp_path / "a")
    straight.train(tiny_loss)
    assert straight.losses[-1] < straight.losses[0]

    first = tiny_run(tmp_path / "b")
    first.train(tiny_loss, until=5)
    first.save()
    second = tiny_run(tmp_path / "b")
    second.resume()
    second.train(tiny_loss)
    assert second.step == straight.step == TINY.steps
    assert second.losses == straight.losses
    for name, weight in straight.masters.items():
        assert torch.equal(weight, second.masters[name]), name


def test_a_resumed_run_differs_from_a_new_one(tmp_path: Path):
    first = tiny_run(tmp_path)
    first.train(tiny_loss, until=5)
    fresh = tiny_run(tmp_path)
    assert any(not torch.equal(w, fresh.masters[n]) for n, w in first.masters.items())


def test_an_interrupted_run_stops_between_steps(tmp_path: Path):
    run = tiny_run(tmp_path)

    def interrupted(model, progress, step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return tiny_loss(model, progress, step)

    before = signal.signal(signal.SIGINT, run.stop)
    try:
        run.train(interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (run.step, len(run.losses)) == (4, 4)
    with pytest.raises(KeyboardInterrupt):  # asked twice
        run.stop()


def test_resuming_from_nothing_or_from_rubbish_is_an_error(tmp_path: Path):
    run = tiny_run(tmp_path)
    with pytest.raises(StudyError, match="no checkpoint"):
        run.resume()
    run.path.write_bytes(b"cut short")
    with pytest.raises(StudyError, match="cannot be read"):
        run.resume()
    tiny_run(tmp_path).save()
    other = train.Run("tiny", RECIPES["digits_resnet"], folder=tmp_path)
    with pytest.raises(StudyError, match="another model shape"):
        other.resume()


def test_an_unknown_model_names_the_nearest(capsys):
    assert train.main(["lm_smal"]) == 2
    assert "did you mean 'lm_small'" in capsys.readouterr().err


def test_learning_rate_rises_stays_and_falls_to_zero():
    rates = [train.learning_rate(i / 100, TINY) for i in range(101)]
    assert rates[0] == rates[100] == 0
    assert max(rates) == rates[30] == 1
    assert all(b < a for a, b in itertools.pairwise(rates[60:]))


def test_batches_cover_the_text_evenly():
    starts = torch.cat([train.text_batch(torch.arange(1000), i, 4, 8)[:, 0] for i in range(250)])
    assert starts.min() < 10
    assert starts.max() > 980
    assert torch.histc(starts.float(), 10, 0, 991).std() < 2


def test_large_weights_are_written_in_shards():
    tensors = {name: torch.zeros(100, dtype=torch.bfloat16) for name in "abcde"}
    groups = export.shards(tensors, limit=500)
    assert [list(g) for g in groups] == [["a", "b"], ["c", "d"], ["e"]]


# --------------------------------------------------------------------------------- shipped weights


def recorded(name: str) -> dict:
    """The record beside the weights; skips where the figures are of other text or not there."""
    path = data.WEIGHTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"the weights of {name} are not shipped yet")
    record = json.loads(path.read_text())
    held_out = data.stdlib_text().held_out.sha256
    if record["data"].get("held_out_sha256", held_out) != held_out:
        pytest.skip(
            f"{name}'s figures are of the standard library of Python "
            f"{record['trained']['python']}; this one has other held-out modules"
        )
    return record


def test_shipped_weights_are_small_and_in_bf16():
    from safetensors.torch import load_file

    files = [f for f in data.WEIGHTS.iterdir() if f.suffix == ".safetensors"]
    assert sum(f.stat().st_size for f in files) <= MAX_WEIGHTS
    for file in files:
        assert file.stat().st_size <= MAX_FILE, file
        kinds = {t.dtype for n, t in load_file(file).items() if "running" not in n}
        assert kinds <= {torch.bfloat16, torch.int64}, file


@pytest.mark.parametrize("name", ["lm_small", "lm_draft"])
def test_recorded_language_figures_are_measured_again(name: str):
    record = recorded(name)
    told = record["figures"]
    _, model = load(name, torch.float32)
    nats = figures.nats_per_token(model, data.held_out_ids(figures.SAMPLE))
    assert nats == pytest.approx(told["sample_nats_per_token"], rel=RELATIVE)
    bits = figures.bits_per_byte(math.log(told["held_out_perplexity"]))
    assert bits == pytest.approx(told["held_out_bits_per_byte"], rel=1e-6)
    assert sum(p.numel() for p in model.parameters()) == record["trained"]["parameters"]
    assert figures.flops_per_token(record["config"]) == told["flops_per_token"]


def test_lm_small_beats_a_compressor_with_the_same_knowledge():
    told = recorded("lm_small")["figures"]
    assert told["held_out_bits_per_byte"] < told["primed_xz_bits_per_byte"]


def test_lm_draft_agrees_with_lm_small_at_a_tenth_of_its_cost():
    told = recorded("lm_draft")["figures"]
    _, draft = load("lm_draft", torch.float32)
    _, target = load("lm_small", torch.float32)
    share = figures.agreement(draft, target, figures.SAMPLE)
    assert share == pytest.approx(told["sample_agreement"], abs=20 / figures.SAMPLE)  # ties
    assert told["agreement_with_lm_small"] >= 0.6
    for context in (0, 512, 2048):
        cost = [figures.flops_per_token(m.config.to_dict(), context) for m in (draft, target)]
        assert cost[0] <= 0.1 * cost[1]


def test_digits_resnet_is_as_accurate_as_recorded():
    told = recorded("digits_resnet")["figures"]
    _, model = load("digits_resnet", torch.float32)
    share, error = figures.accuracy(model)
    assert share == pytest.approx(told["accuracy"], abs=1.5 / 450)  # one image may flip
    assert error == pytest.approx(told["accuracy_standard_error"], rel=0.2)
    assert told["accuracy"] >= 0.97
