"""Linear, embedding and convolution over int8 weights: (N, ...) int8 and one scale per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .numerics import int8_matmul, product_by_digits, quantize_per_channel, quantize_per_token

MANY_TOKENS = 64  # from here on arithmetic decides, and widening the weights costs little
FEW_TOKENS = 4  # up to here reading the weights takes longer than the arithmetic
FUSED_TOKENS = 8  # up to here a compiled step is as fast with products that it fuses or chooses
Float = nn.Linear | nn.Embedding | nn.Conv2d  # what is quantized
PACK_MULTIPLE = 64  # torch._weight_int8pack_mm reads past the end of rows of other lengths


class Int8Weight(nn.Module):
    """What all of them hold: ``weight`` int8 (N, ...), ``scale`` and ``bias`` (or None) (N,) fp32.

    Results have the dtype of what comes in.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    @classmethod
    def from_float(cls, module: Float, packed: tuple[Tensor, Tensor] | None = None):
        """The int8 module of a float one; ``packed`` (weight, scale) when already known."""
        weight, scale = packed or quantize_per_channel(module.weight, torch.float32)
        return cls(weight, scale, getattr(module, "bias", None))

    def plus_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)} int8, scale {self.scale.dtype}"


class Int8Embedding(Int8Weight):
    """Rows of an int8 table, scaled: ids (...) int64 -> (..., C), in the float table's dtype."""

    dtype: torch.dtype

    @classmethod
    def from_float(cls, module: Float, packed: tuple[Tensor, Tensor] | None = None):
        table = super().from_float(module, packed)
        table.dtype = module.weight.dtype
        return table

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight[ids] * self.scale[ids].unsqueeze(-1)).to(self.dtype)


def has_kernel(operation: str, x: Tensor) -> bool:
    """Whether ``kernels.<operation>`` can be compiled for x here; else torch does its work."""
    from kernels.op import OPS

    return x.dtype != torch.float64 and OPS[operation].fastest(x.device.type) != "reference"


class Int8Linear(Int8Weight):
    """x (..., K) -> (x @ weight.T) * scale + bias (..., N), the arithmetic in the dtype of x."""

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """By our kernel, but where torch's operators were measured to be faster.

        All linear layers of `lm_small` and of `minilm`, Zen 4, 2 threads, interleaved: the kernel
        is 2.1 to 6.3 and 1.3 to 12 times ``by_torch`` in fp32 from 1 row to 128 (1.1 and 1.2 with
        512), in bf16 1.0 to 2.3 times from 8 rows to 64, but 0.8 to 0.96 up to 4 rows and 0.7 to
        1.0 from 128 on.  Compiled whole, `lm_small` generates at 0.7 of the speed with it where
        steps have one row (products are fused then) and at 1.02 where they have 8; `minilm`'s
        forward of a batch of one sentence in fp32 at 1.6 or more.  Without AVX-512 torch has no
        fast bf16: the kernel is 1.9 times `_weight_int8pack_mm` at 1 row, 7 times torch's bf16
        linear at 64 (Zen 3, AVX2, 4096 x 4096; more rows were not measured).
        """
        from kernels.int8_linear import int8_linear

        if self.torch_is_faster(x) or not has_kernel("int8_linear", x):
            return self.by_torch(x)
        return int8_linear(x.contiguous(), self.weight, self.scale, self.bias)

    @staticmethod
    def torch_is_faster(x: Tensor) -> bool:
        """Whether ``by_torch`` was faster for x: see ``forward``."""
        tokens, inputs = x.numel() // max(1, x.shape[-1]), x.shape[-1]
        if not x.is_cpu:  # nothing was measured there
            return False
        narrow = x.dtype != torch.float32
        if torch.compiler.is_compiling():
            return narrow or tokens <= FUSED_TOKENS
        from kernels import build

        if not build.current_isa().startswith("avx512"):  # torch's bf16 is emulated there
            return False
        few = tokens <= FEW_TOKENS and inputs % PACK_MULTIPLE == 0
        return narrow and (few or tokens > MANY_TOKENS)

    def by_torch(self, x: Tensor) -> Tensor:
        """The same by torch's operators: where there is no compiler, and where they are faster."""
        weight, scale = self.weight, self.scale
        rows = x.reshape(-1, x.shape[-1])  # (M, K)
        tokens, compiling = len(rows), torch.compiler.is_compiling()
        packable = rows.shape[1] % PACK_MULTIPLE == 0
        if x.is_cpu and compiling and tokens == 1:
            # inductor makes one loop of it: int8 is read, widened in registers and summed
            y = (rows.unsqueeze(1) * weight.to(x.dtype)).sum(-1) * scale
        elif x.is_cpu and compiling and tokens <= MANY_TOKENS:
            y = product_by_digits(rows, weight) * scale
        elif x.is_cpu and x.dtype == torch.bfloat16 and tokens <= FEW_TOKENS and packable:
            y = torch._weight_int8pack_mm(rows, weight, scale.to(x.dtype))
        else:
            y = F.linear(rows, weight.to(x.dtype)) * scale
        return self.plus_bias(y).to(x.dtype).view(*x.shape[:-1], -1)


class Int8DynamicLinear(Int8Linear):
    """x (..., K) -> int8(x) @ weight.T * scale_x * scale + bias: int8 arithmetic, int32 sums."""

    def forward(self, x: Tensor) -> Tensor:
        """By our kernel where nothing is compiled around it: then quantizing is fused instead.

        Measured as for ``Int8Linear``: 1.2 to 2.6 times ``by_torch`` up to 64 rows, 0.9 to 1.0
        with 128, 1.2 to 1.4 with 512.  Compiled with the kernel, `lm_small` generated in steps of
        8 rows at 0.91 of the speed without, and `minilm` ran at 0.63.
        """
        from kernels.w8a8_linear import w8a8_linear

        fused = x.is_cpu and torch.compiler.is_compiling()
        if fused or not has_kernel("w8a8_linear", x):
            return self.by_torch(x)
        return w8a8_linear(x.contiguous(), self.weight, self.scale, self.bias)

    def by_torch(self, x: Tensor) -> Tensor:
        """The same by torch's operators, where there is no compiler."""
        q, scale_x = quantize_per_token(x)
        sums = int8_matmul(q.reshape(-1, q.shape[-1]), self.weight)  # (M, N) int32
        y = sums.view(*x.shape[:-1], -1) * scale_x * self.scale
        return self.plus_bias(y).to(x.dtype)


class Int8Conv2d(Int8Weight):
    """conv(x, weight) * scale + bias: weights int8, arithmetic in the dtype of x (B, C, H, W)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def from_float(cls, module: Float, packed: tuple[Tensor, Tensor] | None = None):
        conv = super().from_float(module, packed)
        conv.stride, conv.padding = module.stride, module.padding
        conv.dilation = module.dilation
        return conv

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether the convolution is one of these: no groups, zeros around, no dilation."""
        return (
            isinstance(module, nn.Conv2d)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and module.dilation == (1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight.to(x.dtype), None, self.stride, self.padding)
        y = y * self.scale.view(-1, 1, 1)
        return (y if self.bias is None else y + self.bias.view(-1, 1, 1)).to(x.dtype)


class Int8DynamicConv2d(Int8Conv2d):
    """Convolution as one int8 matrix product over windows (im2col), a scale per image.

    The windows are copied as int8 with channels last, so a copy moves runs of C bytes.
    Source: Chellapilla et al. 2006, https://inria.hal.science/inria-00112631
    """

    @classmethod
    def from_float(cls, module: Float, packed: tuple[Tensor, Tensor] | None = None):
        conv = super().from_float(module, packed)
        conv.kernel = tuple(conv.weight.shape[2:])
        # (N, C, h, w) -> (N, h w C), the order of a window with channels last
        conv.weight = conv.weight.permute(0, 2, 3, 1).flatten(1).contiguous()
        return conv

    def forward(self, x: Tensor) -> Tensor:
        (h, w), (down, right) = self.kernel, self.padding
        q, scale_x = quantize_per_token(x, (1, 2, 3))  # one scale per image (B, 1, 1, 1)
        q = F.pad(q.permute(0, 2, 3, 1), (0, 0, right, right, down, down))  # (B, H, W, C)
        windows = q.unfold(1, h, self.stride[0]).unfold(2, w, self.stride[1])
        windows = windows.permute(0, 1, 2, 4, 5, 3)  # (B, H', W', h, w, C)
        B, height, width = windows.shape[:3]
        sums = int8_matmul(windows.reshape(B * height * width, -1), self.weight)
        y = sums.view(B, height, width, -1) * scale_x * self.scale
        return self.plus_bias(y).to(x.dtype).permute(0, 3, 1, 2)  # (B, N, H', W')
