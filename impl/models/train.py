"""Make a shipped model again: `python -m impl.models.train NAME [--minutes M] [--resume]`.

NAME is lm_small, lm_draft, digits_resnet or tokenizer. Runs on CPU or GPU, writes a checkpoint
every two minutes to build/train/, goes on from it with --resume after a crash or Ctrl-C, and leaves
bf16 weights with recipe, data hash and measured figures in impl/models/weights/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from impl.core import StudyError, nearest
from impl.models import data
from impl.models.export import export
from impl.models.recipes import RECIPES, Recipe

STATE = Path("build/train")
SAVE_EVERY_S = 120
GOLDEN = (math.sqrt(5) - 1) / 2


def new_model(recipe: Recipe) -> nn.Module:
    """transformers' model of the recipe in fp32, its residual branches starting at zero."""
    import transformers

    architecture = getattr(transformers, recipe.architecture)
    torch.manual_seed(recipe.seed)
    model = architecture(architecture.config_class(**recipe.config))
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(weight)
    return model


@torch.no_grad()
def start_from_teacher(run: Run) -> None:
    """Start a student's embedding as the teacher's, projected on its principal directions."""
    from impl.models import load

    assert run.recipe.teacher is not None
    table = load(run.recipe.teacher, torch.float32)[1].get_input_embeddings().weight  # (V, C)
    width = run.recipe.config["hidden_size"]
    left, strength, _ = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    kept = left[:, :width] * strength[:width]
    for name, weight in run.masters.items():
        if name.endswith("embed_tokens.weight"):
            weight.copy_(kept * (table.std() / kept.std()))
    run.publish()


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Share of the peak rate at `progress` in [0, 1]: warm-up, constant, linear decay to zero."""
    return min(progress / recipe.warmup, 1.0, max(1 - progress, 0.0) / recipe.decay)


def sequence_length(progress: float, recipe: Recipe) -> int:
    end = 0.0
    for share, length in recipe.phases:
        end += share
        if progress < end:
            return length
    return recipe.phases[-1][1]


def text_batch(stream: Tensor, step: int, rows: int, length: int) -> Tensor:
    """Rows of the token stream for one step: (rows, length + 1), a function of the step alone.

    Starts follow the golden-ratio sequence, which covers the stream evenly however long the run.
    """
    index = torch.arange(step * rows + 1, (step + 1) * rows + 1, dtype=torch.float64)
    starts = ((index * GOLDEN) % 1.0 * (len(stream) - length - 1)).long()
    return stream[starts[:, None] + torch.arange(length + 1)]


def optimizers(weights: dict[str, Tensor], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for the rest (embeddings, norms, convolutions)."""
    matrices = [w for name, w in weights.items() if w.ndim == 2 and "layers." in name]
    chosen = {id(w) for w in matrices}
    others = [w for w in weights.values() if id(w) not in chosen]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(
            torch.optim.Muon(
                matrices,
                lr=recipe.matrix_lr,
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    made.append(
        torch.optim.AdamW(
            others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay * 0.1
        )
    )
    return made


class Run:
    """One training run: bf16 compute on fp32 master weights, resumable bit for bit by step.

    `loss_of(model, progress, step)` gives the loss of a step and depends on nothing else, so that a
    run that was interrupted and resumed ends in the same weights as one that was not. With
    `minutes` the schedule also moves with the time spent, and ends in time on a busy machine.
    """

    def __init__(self, name: str, recipe: Recipe, device: str = "cpu", folder: Path = STATE):
        self.name, self.recipe, self.device = name, recipe, device
        self.path = folder / f"{name}.pt"
        model = new_model(recipe).to(device)
        self.masters = {n: p.detach().clone() for n, p in model.named_parameters()}
        for weight in model.parameters():  # buffers (rotary frequencies) stay fp32
            weight.data = weight.data.to(getattr(torch, recipe.compute))
        self.model = model
        self.optimizers = optimizers(self.masters, recipe)
        self.rates = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.step, self.seconds, self.losses = 0, 0.0, []
        self.minutes: float | None = None
        self.stopped = False

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save(
            {
                "recipe": json.dumps(dataclasses.asdict(self.recipe), sort_keys=True),
                "masters": self.masters,
                "buffers": dict(self.model.named_buffers()),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
                "losses": self.losses,
            },
            part,
        )
        part.replace(self.path)

    def resume(self) -> None:
        """Go on from the checkpoint. Raises StudyError when there is none that can be read."""
        if not self.path.exists():
            raise StudyError(f"There is no checkpoint {self.path}: start without --resume.")
        try:
            state = torch.load(self.path, map_location=self.device)
        except Exception as error:
            raise StudyError(
                f"The checkpoint {self.path} cannot be read ({type(error).__name__}): delete it "
                "and start without --resume."
            ) from error
        shape = json.loads(state["recipe"])["config"]
        if shape != json.loads(json.dumps(self.recipe.config)):
            raise StudyError(
                f"The checkpoint {self.path} is of another model shape: start without --resume."
            )
        with torch.no_grad():
            for name, weight in self.masters.items():
                weight.copy_(state["masters"][name])
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state["buffers"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses = state["losses"]
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        for name, weight in self.model.named_parameters():
            weight.copy_(self.masters[name])

    def stop(self, *_: object) -> None:
        """End after the step under way; at once when asked again."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def progress(self) -> float:
        """Share of the run done: by steps, or by time where that is further."""
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(self.step / self.recipe.steps, by_time)

    def train(
        self,
        loss_of: Callable[[nn.Module, float, int], Tensor],
        minutes: float | None = None,
        until: int | None = None,
    ) -> None:
        """Run to the end of the schedule, or to step `until`."""
        self.minutes = minutes
        self.model.train()
        saved = time.monotonic()
        while (progress := self.progress()) < 1.0 and self.step != until and not self.stopped:
            begin = time.monotonic()
            loss = loss_of(self.model, progress, self.step)
            loss.backward()
            for name, weight in self.model.named_parameters():
                self.masters[name].grad = weight.grad.float()
            self.model.zero_grad()
            nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
            share = learning_rate(progress + 0.5 / self.recipe.steps, self.recipe)
            groups = [g for o in self.optimizers for g in o.param_groups]
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate * share
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # many small products: waiting for one another costs more
            for optimizer in self.optimizers:
                optimizer.step()
            torch.set_num_threads(threads)
            self.publish()
            self.step += 1
            self.seconds += time.monotonic() - begin
            self.losses.append(loss.item())
            if self.step % 10 == 0:
                recent = sum(self.losses[-10:]) / 10
                print(
                    f"{self.name} step {self.step} progress {progress:.3f} loss {recent:.4f} "
                    f"lr x{share:.2f} {self.seconds / 60:.1f} min",
                    flush=True,
                )
            if time.monotonic() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
        self.model.eval()


def language_loss(recipe: Recipe, device: str) -> Callable[[nn.Module, float, int], Tensor]:
    """Next-token cross-entropy in nats; from `teacher_from` on, against a teacher's distribution.

    Distillation: Hinton, Vinyals, Dean (2015), https://arxiv.org/abs/1503.02531.
    """
    stream = data.encode_documents(list(data.stdlib_text().train.modules.values()))
    teacher = None
    if recipe.teacher:
        from impl.models import load

        teacher = load(recipe.teacher, torch.bfloat16, device)[1]

    def loss_of_rows(model: nn.Module, rows: Tensor, soft: Tensor | None) -> Tensor:
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits  # (B, T, V)
        target = rows[:, 1:].flatten() if soft is None else soft
        return F.cross_entropy(logits.flatten(0, 1).float(), target)

    def soft_labels(rows: Tensor) -> Tensor:
        assert teacher is not None
        logits = teacher(input_ids=rows[:, :-1], use_cache=False).logits
        return logits.flatten(0, 1).float().softmax(-1)  # (B * T, V)

    if recipe.compiled:
        loss_of_rows = torch.compile(loss_of_rows, dynamic=False)
        soft_labels = torch.compile(soft_labels, dynamic=False)

    def loss_of(model: nn.Module, progress: float, step: int) -> Tensor:
        length = sequence_length(progress, recipe)
        rows = text_batch(stream, step, max(recipe.tokens_per_step // length, 1), length)
        rows = rows.to(device)
        soft = None
        if teacher is not None and progress >= recipe.teacher_from:
            with torch.no_grad():
                soft = soft_labels(rows)
        return loss_of_rows(model, rows, soft)

    return loss_of


def digits_loss(recipe: Recipe, device: str) -> Callable[[nn.Module, float, int], Tensor]:
    """Cross-entropy in nats on digits moved, turned and scaled a little at random."""
    images, labels, _, _ = data.digits()

    def loss_of(model: nn.Module, progress: float, step: int) -> Tensor:
        random = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        chosen = torch.randint(len(images), (recipe.tokens_per_step,), generator=random)
        turn, scale, right, down = (torch.rand(4, len(chosen), generator=random) - 0.5).unbind()
        turn, scale = turn * 0.4, 1 + scale * 0.3  # radians, ratio
        cos, sin = turn.cos() * scale, turn.sin() * scale
        rows = [torch.stack([cos, -sin, right * 0.3], 1), torch.stack([sin, cos, down * 0.3], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), [len(chosen), 1, 32, 32], align_corners=False)
        moved = F.grid_sample(
            images[chosen], grid, padding_mode="border", align_corners=False
        )  # (B, 1, 32, 32)
        target = labels[chosen].to(device)
        return F.cross_entropy(model(moved.to(device)).logits.float(), target, label_smoothing=0.05)

    return loss_of


def train_tokenizer(path: Path) -> None:
    """Byte-level BPE (Sennrich et al., 2016, https://arxiv.org/abs/1508.07909).

    A line break and the indentation after it are one piece, a dot or bracket joins the name after
    it, so that code takes about 3.6 bytes per token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    pieces = r"\s*\n[ ]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3840,
        special_tokens=[data.END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(data.stdlib_text().train.modules.values(), trainer)
    tok.save(str(path))


def train_model(name: str, options: argparse.Namespace) -> None:
    run = Run(name, RECIPES[name], options.device)
    if options.resume:
        run.resume()
    elif run.recipe.teacher:
        start_from_teacher(run)
    loss = digits_loss if name == "digits_resnet" else language_loss
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.stop)
    run.train(loss(run.recipe, options.device), options.minutes, options.until)
    run.save()
    if run.stopped:
        raise KeyboardInterrupt
    figures = export(run, Path(options.out))
    print(f"wrote {name} to {options.out}: {json.dumps(figures)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m impl.models.train", description=__doc__)
    parser.add_argument("name", help="tokenizer, " + ", ".join(RECIPES))
    parser.add_argument("--minutes", type=float, help="end the schedule after this time")
    parser.add_argument("--until", type=int, help="stop at this step and write what there is")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=str(data.WEIGHTS), help="folder for the weights")
    options = parser.parse_args(arguments)
    try:
        if options.name == "tokenizer":
            train_tokenizer(Path(options.out) / "tokenizer.json")
        elif options.name in RECIPES:
            train_model(options.name, options)
        else:
            raise nearest("model", options.name, ["tokenizer", *RECIPES])
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: go on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
