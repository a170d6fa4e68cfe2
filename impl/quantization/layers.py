"""Linear, embedding and convolution over int8 weights: (N, ...) int8 and one scale per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .numerics import int8_matmul, product_by_digits, quantize_per_channel, quantize_per_token

MANY_TOKENS = 64  # from here on arithmetic decides, and widening the weights costs little
FEW_TOKENS = 4  # up to here reading the weights takes longer than the arithmetic
PACK_MULTIPLE = 64  # torch._weight_int8pack_mm reads past the end of rows of other lengths


class Int8Weight(nn.Module):
    """What all of them hold: ``weight`` int8 (N, ...), ``scale`` (N,), ``bias`` (N,) or None."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_float(cls, module: nn.Module, packed: tuple[Tensor, Tensor] | None = None):
        """The int8 module of a float one; ``packed`` (weight, scale) when already known."""
        weight, scale = packed or quantize_per_channel(module.weight)
        return cls(weight, scale, getattr(module, "bias", None))

    def plus_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)} int8, scale {self.scale.dtype}"


class Int8Embedding(Int8Weight):
    """Rows of an int8 table, scaled: ids (...) int64 -> (..., C)."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].to(self.scale.dtype) * self.scale[ids].unsqueeze(-1)


class Int8Linear(Int8Weight):
    """x (..., K) -> (x @ weight.T) * scale + bias (..., N), the arithmetic in the dtype of x."""

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        weight, scale = self.weight, self.scale
        rows = x.reshape(-1, x.shape[-1])  # (M, K)
        tokens, compiling = len(rows), torch.compiler.is_compiling()
        packable = rows.shape[1] % PACK_MULTIPLE == 0
        if x.is_cpu and compiling and tokens == 1:
            # inductor makes one loop of it: int8 is read, widened in registers and summed
            y = (rows.unsqueeze(1) * weight.to(x.dtype)).sum(-1) * scale
        elif x.is_cpu and compiling and tokens <= MANY_TOKENS:
            y = (product_by_digits(rows, weight) * scale).to(x.dtype)
        elif x.is_cpu and x.dtype == torch.bfloat16 and tokens <= FEW_TOKENS and packable:
            y = torch._weight_int8pack_mm(rows, weight, scale)
        else:
            y = F.linear(rows, weight.to(x.dtype)) * scale
        y = y.view(*x.shape[:-1], -1)
        return self.plus_bias(y)


class Int8DynamicLinear(Int8Linear):
    """x (..., K) -> int8(x) @ weight.T * scale_x * scale + bias: int8 arithmetic, int32 sums."""

    def forward(self, x: Tensor) -> Tensor:
        q, scale_x = quantize_per_token(x)
        sums = int8_matmul(q.reshape(-1, q.shape[-1]), self.weight)  # (M, N) int32
        y = sums.view(*x.shape[:-1], -1) * scale_x * self.scale.float()
        return self.plus_bias(y.to(x.dtype))


class Int8Conv2d(Int8Weight):
    """conv(x, weight) * scale + bias: weights int8, arithmetic in the dtype of x (B, C, H, W)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def from_float(cls, module: nn.Conv2d, packed: tuple[Tensor, Tensor] | None = None):
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
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class Int8DynamicConv2d(Int8Conv2d):
    """Convolution as one int8 matrix product over windows (im2col), a scale per image.

    The windows are copied as int8 with channels last, so a copy moves runs of C bytes.
    Source: Chellapilla et al. 2006, https://inria.hal.science/inria-00112631
    """

    @classmethod
    def from_float(cls, module: nn.Conv2d, packed: tuple[Tensor, Tensor] | None = None):
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
        y = sums.view(B, height, width, -1) * scale_x * self.scale.float()
        return self.plus_bias(y.to(x.dtype)).permute(0, 3, 1, 2)  # (B, N, H', W')
