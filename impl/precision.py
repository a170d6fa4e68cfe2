"""Which numbers are computed in which format, beside the precision axis itself.

The axis (fp32, bf16, fp16) casts a whole model.  The techniques here mix formats inside one, or
change how fp32 is multiplied.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from .core import Engine, NotEngaged, technique
from .fidelity import budget, close, same_tokens

MULTIPLE = 64  # elements: 128 bytes of bf16, a cache line of the GPU and whole tiles of its units
MATRIX_OPS = re.compile(
    r"(ba)?(add)?b?mm|(mkldnn_)?_?linear(_pointwise)?|(mkldnn_)?_?conv\w*|_?scaled_dot_product\w*"
)

# What rounding to 8 bits of mantissa may cost a trained model (measured: a tenth of it or less).
ROUNDED_TO_BF16 = budget("perplexity", 0.01, kl=0.005, accuracy=0.01, cosine=0.01)


class MatrixDtypes(TorchDispatchMode):
    """Counts matrix products, convolutions and attentions run under it, by dtype of input."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if MATRIX_OPS.fullmatch(func.__name__.split(".")[0]):
            tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > 1]
            self.seen[tensors[0].dtype] += 1
        return func(*args, **(kwargs or {}))


def _matrix_dtypes(run) -> Counter[torch.dtype]:
    with MatrixDtypes() as mode:
        run()
    return mode.seen


def _weight_dtypes(model: nn.Module) -> Counter[torch.dtype]:
    """Bytes of parameters by dtype."""
    held: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        held[parameter.dtype] += parameter.nbytes
    return held


# ---- autocast ----------------------------------------------------------------------------


def _products_in_bf16_of_fp32_weights(engine: Engine, run) -> str:
    products, weights = _matrix_dtypes(run), _weight_dtypes(engine.model)
    if not products[torch.bfloat16] or products[torch.float32]:
        raise NotEngaged(
            f"{products[torch.bfloat16]} matrix products ran in bf16, "
            f"{products[torch.float32]} in fp32"
        )
    if not weights[torch.float32]:
        raise NotEngaged(f"weights are held in {list(weights)}, not in fp32")
    return (
        f"all {products[torch.bfloat16]} matrix products in bf16, "
        f"{weights[torch.float32] / 1e6:.1f} MB of weights held in fp32"
    )


@technique(phase="replace", precisions=("fp32",), fidelity=ROUNDED_TO_BF16,
           effect=_products_in_bf16_of_fp32_weights)  # fmt: skip
def autocast_bf16(engine: Engine) -> Engine:
    """y = bf16(x) @ bf16(W): fp32 weights, matrix products in bf16, sums and norms in fp32.

    Helps compute-bound work (prefill, large batches, convolutions) without touching the
    checkpoint.  Does not help decoding: every call reads the fp32 weights and writes a bf16 copy
    of them first, so it moves more bytes than plain fp32.
    Source: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740; https://docs.pytorch.org/docs/stable/amp.html
    """
    forward, device_type = engine.model.forward, engine.device.type

    @functools.wraps(forward)
    def under_autocast(*args, **kwargs):
        with torch.autocast(device_type, torch.bfloat16):
            return forward(*args, **kwargs)

    engine.model.forward = under_autocast
    return engine


# ---- mixed precision ---------------------------------------------------------------------

HEADS = ("lm_head", "classifier")


def islands(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that stay in fp32, by name: every norm, and the linear that makes the logits."""
    found = {}
    for name, module in model.named_modules():
        is_norm = (
            "Norm" in type(module).__name__ and next(module.parameters(False), None) is not None
        )
        is_head = isinstance(module, nn.Linear) and any(h in name.split(".") for h in HEADS)
        if is_norm or is_head:
            found[name] = module
    return found


def _islands_in_fp32(engine: Engine, run) -> str:
    """The islands see and hold fp32, the products elsewhere are of the cell's precision."""
    known, entered, hooks = islands(engine.model), set(), []

    def enter(name, args):
        if args[0].dtype == torch.float32:
            entered.add(name)

    for name, module in known.items():

        def see(_, args, name=name):
            enter(name, args)

        hooks.append(module.register_forward_pre_hook(see))
    try:
        products = _matrix_dtypes(run)
    finally:
        for hook in hooks:
            hook.remove()
    held = _weight_dtypes(engine.model)
    if missing := sorted(set(known) - entered):
        raise NotEngaged(
            f"{len(missing)} of {len(known)} islands ran in low precision: {missing[0]}"
        )
    if not products[engine.dtype] or not held[engine.dtype]:
        raise NotEngaged(f"no matrix product or no weight is of {engine.dtype}")
    return (
        f"{len(known)} islands in fp32 ({held[torch.float32] / 1e3:.0f} kB), "
        f"{products[engine.dtype]} of {sum(products.values())} matrix products in {engine.dtype}"
    )


@technique(phase="replace", precisions=("bf16", "fp16"), replaces=("norms", "head"),
           fidelity=ROUNDED_TO_BF16,
           effect=_islands_in_fp32)  # fmt: skip
def mixed_precision(engine: Engine) -> Engine:
    """Weights and products in bf16 or fp16, with islands of fp32: norms, and the logits.

    A norm sums squares and a softmax over the vocabulary compares nearby numbers: both lose most
    by 8 bits of mantissa.  The islands hold fp32 weights, take fp32 and (norms) give back the low
    precision; the softmax inside fused attention accumulates in fp32 by itself.  Helps the quality
    of decoders and of nets with batch norm.  Does not help encoders: torch's layer norm sums in
    fp32 and rounds once anyway.  Costs the casts around each island, and a second copy of a tied
    embedding.
    Source: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740
    """
    for name, module in islands(engine.model).items():
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None and tensor.dtype == engine.dtype:
                    wide = tensor.detach().float()  # a new tensor: the embedding stays as it is
                    kind[key] = nn.Parameter(wide, False) if kind is module._parameters else wide
        module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
        if not any(head in name.split(".") for head in HEADS):
            module.register_forward_hook(lambda _, args, out: out.to(engine.dtype))
    return engine


# ---- tf32 --------------------------------------------------------------------------------


def _rounds_like_tf32(engine: Engine, run) -> str:
    """Relative error of a linear's output: 2^-24 roundings give 1e-6, 2^-11 ones (tf32) 3e-4."""
    errors: list[float] = []
    linear = next(m for m in engine.model.modules() if isinstance(m, nn.Linear))

    def see(module, args, out):
        if not errors:
            bias = None if module.bias is None else module.bias.double()
            exact = F.linear(args[0].double(), module.weight.double(), bias)
            errors.append(((out - exact).norm() / exact.norm()).item())

    hook = linear.register_forward_hook(see)
    try:
        run()
    finally:
        hook.remove()
    if not errors or errors[0] < 2**-16:
        raise NotEngaged(f"a linear's relative error is {errors}: its products are fp32's")
    return f"relative error of a linear {errors[0]:.1e}: products of 10-bit mantissas"


@technique(phase="replace", requires={"cuda"}, precisions=("fp32",), needs={"linear"},
           fidelity=close(45.0), effect=_rounds_like_tf32)  # fmt: skip
def tf32(engine: Engine) -> Engine:
    """fp32 matrix products with inputs rounded to 10 bits of mantissa, on tensor cores.

    On for the duration of each forward only, since the setting is global.  Helps compute-bound
    fp32 work (up to 8 times the rate of fp32 units).  Does not help decoding, where the weights
    are still read in fp32.  Convolutions: cuDNN uses tf32 by default.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    forward = engine.model.forward

    @functools.wraps(forward)
    def in_tf32(*args, **kwargs):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return forward(*args, **kwargs)
        finally:
            torch.set_float32_matmul_precision(before)

    engine.model.forward = in_tf32
    return engine


# ---- aligned shapes ----------------------------------------------------------------------


class AlignedLinear(nn.Module):
    """A linear whose inputs and outputs are padded with zeros to multiples of ``MULTIPLE``.

    x (..., in) -> (..., out): the added inputs are zero and the added outputs are cut off.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.more_in = -linear.in_features % MULTIPLE
        more_out = -linear.out_features % MULTIPLE
        weight = F.pad(linear.weight.detach(), (0, self.more_in, 0, more_out))
        self.weight = nn.Parameter(weight, requires_grad=False)  # (out + more, in + more)
        bias = None if linear.bias is None else F.pad(linear.bias.detach(), (0, more_out))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.more_in:
            x = F.pad(x, (0, self.more_in))
        return F.linear(x, self.weight, self.bias)[..., : self.out_features]


def unaligned_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that a dimension of is no multiple of ``MULTIPLE``, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
    }


def _every_dimension_is_a_multiple(engine: Engine, run) -> str:
    padded = {n: m for n, m in engine.model.named_modules() if isinstance(m, AlignedLinear)}
    used: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, name=n: used.add(name)) for n, m in padded.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if left := unaligned_linears(engine.model):
        raise NotEngaged(f"{len(left)} linears are unaligned: {next(iter(left))}")
    wrong = [n for n, m in padded.items() if any(size % MULTIPLE for size in m.weight.shape)]
    if not used or wrong:
        raise NotEngaged(f"{len(used)} padded linears ran, {len(wrong)} are not aligned")
    name, module = next(iter(padded.items()))
    shape = f"{module.out_features} x {module.in_features}"
    return f"{len(used)} padded linears ran; {name} {shape} is {list(module.weight.shape)}"


@technique(phase="replace", needs={"unaligned"}, replaces=("qkv", "mlp", "head"),
           fidelity=same_tokens,
           effect=_every_dimension_is_a_multiple)  # fmt: skip
def aligned_shapes(engine: Engine) -> Engine:
    """[x 0] @ [W 0; 0 0]^T = [y 0]: linears padded with zeros to multiples of 64, outputs cut.

    Helps GPUs, whose matrix units load 16 bytes at a time and work in tiles: cuBLAS falls back to
    slower kernels for odd sizes (a vocabulary of 50257).  Does not help CPUs, nor layers that are
    aligned already; a classifier of 10 classes computes 64.  A tied embedding gets a second copy.
    Source: https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication
    """
    for name, linear in unaligned_linears(engine.model).items():
        engine.model.set_submodule(name, AlignedLinear(linear))
    return engine
