"""A linear layer's bias and the activation behind it, in one pass over its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from impl.core import Engine, NotEngaged, technique
from impl.fidelity import same_tokens

from .norms import in_dtype
from .proofs import fewer_operators, operators_of, remember

OURS = "study::gelu_bias"


def form_of(activation: object) -> str | None:
    """ "none" or "tanh", as torch names the forms of GELU; None where it computes neither.

    Asked with numbers: libraries have a dozen names for the two, and others for other functions.
    """
    if not callable(activation) or "GELU" not in type(activation).__name__.upper():
        return None
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    with torch.no_grad():
        y = activation(x)
    for form in ("none", "tanh"):
        # the forms are 5e-4 apart
        if torch.allclose(y.double(), gelu(x, approximate=form), rtol=0, atol=1e-5):
            return form
    return None


class GemmBiasGelu(nn.Module):
    """gelu(x W^T + bias): the linear without its bias, then ``kernels.gelu_bias``; x (..., K)."""

    def __init__(self, linear: nn.Module, approximate: str):
        super().__init__()
        self.linear, bias = linear, linear.bias
        linear.bias = None
        self.register_buffer("bias", bias.detach())
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        from kernels.gelu_bias import gelu_bias

        y = self.linear(x)  # (..., N)
        return gelu_bias(y, in_dtype(self.bias, y), self.approximate)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """transformers' BERT-type intermediate layer: a linear with bias, and GELU."""
        linear, act = (getattr(module, n, None) for n in ("dense", "intermediate_act_fn"))
        return isinstance(getattr(linear, "bias", None), Tensor) and form_of(act) is not None


def _bias_copies(engine: Engine) -> int:
    """Times that a product's output is filled with its bias before it is computed."""
    model = getattr(engine.model, "eager", engine.model)
    ids = torch.full((1, 8), 5, device=engine.device)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode(), torch.profiler.profile(activities=cpu, acc_events=True) as trace:
        model(ids)
    return sum(e.name() == "aten::copy_" for e in trace.profiler.kineto_results.events())


def _bias_and_gelu_are_one_pass(engine: Engine, run) -> str:
    """The profiler sees a copy of the bias less per layer, the run ours in place of GELU."""
    layers = sum(isinstance(m, GemmBiasGelu) for m in engine.model.modules())
    if not layers:
        raise NotEngaged("no layer of the model has its bias and GELU in one operator")
    proof = fewer_operators(engine, "gemm_bias_act", {OURS: layers}, ("gelu",), saved=0)
    before, now = engine.stats["bias_copies"], _bias_copies(engine)
    if before - now < layers and engine.stats["bias_is_added"]:
        raise NotEngaged(f"the trace has {now} copies, {before} before, of {layers} layers")
    run()  # whatever is compiled is compiled now
    seen = operators_of(run)
    if not seen[OURS] or seen["gelu"]:
        raise NotEngaged(
            f"the canonical call dispatched {seen[OURS]} gelu_bias, {seen['gelu']} gelu"
        )
    return f"{proof}; {before - now} copies less in the profiler's trace"


@technique(phase="replace", needs={"gelu"}, requires={"kernels"}, fidelity=same_tokens,
           effect=_bias_and_gelu_are_one_pass)  # fmt: skip
def gemm_bias_act(engine: Engine) -> Engine:
    """gelu(x W^T + b): the bias joins the activation's pass over the product's output.

    On a CPU torch fills the output with the bias and lets the product add to it, then GELU reads
    and writes it: five passes over the output, here three; the operators are as many.  GPU
    libraries add a bias in the product, so nothing is saved there.  The GELU is the model's: by the
    erf (BERT) or in the tanh form (GPT-2).
    Helps where the output is larger than the caches: long batches.  Does not where the product
    takes the time, which is almost everywhere (`minilm`, one row: 0.99 of eager).
    Source: Hendrycks and Gimpel 2016 (GELU and its tanh form), https://arxiv.org/abs/1606.08415;
    Chetlur et al. 2014 (bias and activation behind a product), https://arxiv.org/abs/1410.0759
    """
    remember(engine, "gemm_bias_act")
    found = [n for n, m in engine.model.named_modules() if GemmBiasGelu.takes(m)]
    float_layers = [type(engine.model.get_submodule(n).dense) is nn.Linear for n in found]
    engine.stats["bias_is_added"] = all(float_layers) and engine.device.type == "cpu"
    engine.stats["bias_copies"] = _bias_copies(engine)
    for name in found:
        layer = engine.model.get_submodule(name)
        ours = GemmBiasGelu(layer.dense, form_of(layer.intermediate_act_fn))
        engine.model.set_submodule(name, ours)
    return engine
