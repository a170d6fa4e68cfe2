"""How fast is a whole decode step beyond the caches?  A cell per kind of weights.

Layers of the size of Llama-3.2-1B's, as many as weigh a quarter of a gigabyte; one token at batch
1 after a short context, so that a step is one read of the weights.  In its rounds stand the same
decoder in torch eager (the baseline), compiled (``without``) and llama.cpp (the peer), which gets
the same weights in its own format, where it is installed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from impl.fidelity import ROUNDING_DB, sqnr_db
from impl.models.decoder import DecoderConfig, LeanDecoder
from impl.models.kv_cache import KVCache
from kernels.decode_step import DecodeStep
from kernels.op import unavailable
from tests import kernel_speed, llama_peer, matrix
from tests.kernel_speed import MODEL, Disagrees

OP = "decode_step"
# kind of weights -> (precision of the model, layers): 230 to 280 MB of weights each
KINDS = {"fp32": ("fp32", 1), "int8": ("fp32", 4), "int4": ("fp32", 7),
         "int8_dynamic": ("fp32", 4), "bf16": ("bf16", 2)}  # fmt: skip
CONTEXT = 64  # tokens that stand before
INPUTS = 4
# an activation on the edge between two int8 values may fall either way: 1/127 of one input
DYNAMIC_DB = 34.0
PEER_DB = 30.0  # llama.cpp rounds activations to int8 where the weights are narrow
ROPE_BASE = 1e4
LAYER: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 8192, "num_heads": 32,
    "num_kv_heads": 8, "head_dim": 64, "max_positions": 1024, "norm_eps": 1e-5,
}  # fmt: skip


@dataclass(frozen=True)
class StepCell:
    """A decode step over one kind of weights; it stands among the cells of ``kernel_speed``."""

    weights: str
    op: str = OP
    impl: str = "cpu"
    batch: int = 1

    @property
    def precision(self) -> str:
        return KINDS[self.weights][0]

    @property
    def layers(self) -> int:
        return KINDS[self.weights][1]

    @property
    def technique(self) -> str:
        return f"{self.op}_{self.impl}"

    @property
    def workload(self) -> str:
        return f"{self.op} {self.weights} weights, {self.layers} layers of {LAYER['hidden_size']}"

    @property
    def id(self) -> str:
        size = f"{self.weights}_{self.layers}x{LAYER['hidden_size']}"
        return f"{self.technique}-{MODEL}-{self.precision}-batch{self.batch}-{size}"

    def mark(self) -> pytest.MarkDecorator:
        """The coordinates of its record."""
        return pytest.mark.cell(techniques=self.technique, model=MODEL, precision=self.precision,
                                batch=self.batch, workload=self.workload)  # fmt: skip

    def missing(self, device: str) -> str | None:
        """What this machine lacks to run the cell, as a sentence, or None."""
        return unavailable(self.impl, device.split(":")[0])

    def measure(self, bench: Callable[..., Any], device: str) -> None:
        """Check the cell, then time it."""
        with torch.inference_mode(), kernel_speed.kept_memory():
            _measure(self, bench, device)


def cells(selection: matrix.Selection) -> dict[str, StepCell]:
    """Id -> cell of a profile: ``smoke`` the first kind of weights of each precision."""
    if selection.models or selection.techniques:
        return {}
    precisions = selection.precisions or selection.size.precisions
    found = [StepCell(kind) for kind, (precision, _) in KINDS.items() if precision in precisions]
    if selection.profile == "smoke":
        found = list({c.precision: c for c in reversed(found)}.values())
    return {c.id: c for c in found if not selection.batches or c.batch in selection.batches}


# ---- the model ---------------------------------------------------------------------------


def decoder(cell: StepCell, **sizes) -> LeanDecoder:
    """Random weights of the cell's kind; layers are copies of one, each in memory of its own."""
    shape = LAYER | sizes
    exponents = torch.arange(0, shape["head_dim"], 2) / shape["head_dim"]
    config = DecoderConfig(**shape, num_layers=1,
                           rope_frequencies=tuple((ROPE_BASE**-exponents).tolist()))  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(0)
        model = LeanDecoder(config).eval().requires_grad_(False)
        _quantize(model, cell.weights)
        layers = [copy.deepcopy(model.layers[0]) for _ in range(cell.layers)]
    for i, layer in enumerate(layers):
        layer.attention.layer = i
    model.layers = nn.ModuleList(layers)
    model.config = dataclasses.replace(config, num_layers=cell.layers)
    return model


def _quantize(model: LeanDecoder, kind: str) -> None:
    from impl.quantization import int4, int8, layers

    if kind == "bf16":
        model.to(torch.bfloat16)
    if kind == "int4":
        int4.quantize_linears(model, 32)
    if kind.startswith("int8"):
        linear = layers.Int8DynamicLinear if kind == "int8_dynamic" else layers.Int8Linear
        int8.quantize_modules(model, linear, layers.Int8Conv2d)


def forwards(model: LeanDecoder, cache: KVCache) -> Iterator[tuple[str, Callable]]:
    """(side, ``call(ids) -> logits``) of the decoder's own operators."""
    positions = torch.tensor([[CONTEXT]])
    yield "baseline", lambda ids: model(ids, CONTEXT, cache)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    yield "without", lambda ids: compiled(ids, positions, cache)


@contextlib.contextmanager
def llama_cpp(model: LeanDecoder, prompt: torch.Tensor) -> Iterator[Callable]:
    """``call(ids) -> logits`` of llama.cpp on the same weights, after the same prompt."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        llama_peer.write(model, path, ROPE_BASE)
        peer = llama_peer.Llama(path, 4 * CONTEXT, torch.get_num_threads())
    peer.logits(prompt[0].tolist(), 0)
    try:
        yield lambda ids: peer.logits([ids.item()], CONTEXT)
    finally:
        peer.close()


def near(cell: StepCell, got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raises unless logits agree as well as rounding in the cell's precision allows."""
    floor = DYNAMIC_DB if cell.weights == "int8_dynamic" else ROUNDING_DB[cell.precision]
    found = sqnr_db(wanted, got)
    assert found >= floor, f"{cell.id}: {found:.1f} dB from the decoder, not {floor:g}"


def change(ids: torch.Tensor) -> Callable[[], object]:
    """Another token in place; returns what undoes it."""
    before = ids.clone()
    ids.copy_((before + 1) % LAYER["vocab_size"])
    return lambda: ids.copy_(before)


def _measure(cell: StepCell, bench: Callable[..., Any], device: str) -> None:
    model = decoder(cell)
    step, cache = DecodeStep(model), KVCache(model.config, 1, CONTEXT + 1,
                                             model.norm.weight.dtype)  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, LAYER["vocab_size"], (1, CONTEXT), generator=draw)
    tokens = torch.randint(0, LAYER["vocab_size"], (INPUTS, 1, 1), generator=draw)
    model(prompt, 0, cache)
    sides = {"variant": lambda ids: step(ids, CONTEXT, cache)} | dict(forwards(model, cache))
    names = {"baseline": "torch_eager", "without": "torch_compile"}
    for name in names:
        near(cell, sides[name](tokens[0]), sides["variant"](tokens[0]))
    moved, weights = step.bytes_moved(CONTEXT + 1), step.bytes_moved(0)
    about = {"techniques": [cell.technique], "families": [], "model": MODEL, "batch": cell.batch,
             "precision": cell.precision, "device": device, "workload": cell.workload}  # fmt: skip
    with contextlib.ExitStack() as stack:
        if reason := llama_peer.lacks():
            told = [f"no llama.cpp here: {reason}"]
        else:
            sides["peer"] = stack.enter_context(llama_cpp(model, prompt))
            found = sqnr_db(sides["variant"](tokens[0]), sides["peer"](tokens[0]))
            if found < PEER_DB:
                raise Disagrees(f"llama_cpp is {found:.1f} dB from the step; it has other weights")
            names["peer"], told = "llama_cpp", [f"llama_cpp within {found:.0f} dB"]
        bench(
            sides=sides,
            inputs=list(tokens),
            agree=lambda output, ids: near(cell, output, sides["baseline"](ids)),
            cell=about,
            names=names,
            effect=lambda: kernel_speed.proof(cell, lambda: sides["variant"](tokens[0]), told),
            bytes_moved=moved,
            flops=step.flops(CONTEXT + 1),
            compute_dtype="int8" if cell.weights == "int8_dynamic" else None,
            working_set=moved,
            weight_bytes=weights,
            kv_bytes=cache.nbytes,
            change=change,
        )
