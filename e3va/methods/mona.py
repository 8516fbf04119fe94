"""Mona (arXiv 2408.08345)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va.backbone import Backbone
from e3va.config import check_positive_int
from e3va.methods.registry import Method, register_method
from e3va.methods.tuned import TunedBackbone, zero
from e3va.trunks.base import Linear, TrunkConfig, layer_norm


@register_method("mona")
@dataclass(frozen=True)
class Mona(Method):
    """A bottleneck with depth-wise convolutions after each sub-layer.

    Attributes:
        hidden: its width (default 64).
    """

    hidden: int = 64

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        check_positive_int("hidden", self.hidden)
        return TunedBackbone(trunk, dtype).with_adapters(lambda dim: MonaAdapter(dim, self.hidden))


class MonaAdapter(nn.Module):
    """A bottleneck with depth-wise convolutions, from the stream after the residual add, y + x."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = _ScaledNorm(dim)
        self.down = Linear(dim, hidden)
        self.convs = nn.ModuleList(_DepthWise(hidden, kernel_size) for kernel_size in (3, 5, 7))
        self.mix = Linear(hidden, hidden)  # the 1×1 convolution
        self.up = zero(Linear(hidden, dim))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        t = self.down(self.norm(y + x))
        image = t.permute(0, 3, 1, 2)
        filtered = torch.stack([conv(image) for conv in self.convs]).mean(0)
        t = t + filtered.permute(0, 2, 3, 1)
        t = t + self.mix(t)
        return x + self.up(F.gelu(t))


class _ScaledNorm(nn.LayerNorm):
    """``LN(x)·γ + x·γₓ``. One module, so that optimizers see its scales as a norm's."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.gamma = nn.Parameter(torch.ones(dim))
        self.gamma_x = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self) * self.gamma.to(x) + x * self.gamma_x.to(x)


class _DepthWise(nn.Conv2d):
    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return self._conv_forward(x, self.weight.to(x), self.bias.to(x))
