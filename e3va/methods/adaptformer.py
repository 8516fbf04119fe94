"""AdaptFormer (arXiv 2205.13535)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va.backbone import Backbone
from e3va.config import check_positive_int
from e3va.methods.registry import Method, register_method
from e3va.methods.tuned import Bottleneck, TunedBackbone
from e3va.trunks.base import TrunkConfig


@register_method("adaptformer")
@dataclass(frozen=True)
class AdaptFormer(Method):
    """A bottleneck parallel to each MLP.

    Attributes:
        hidden: its width (default 64).
        scale: of what it adds (default 0.1).
    """

    hidden: int = 64
    scale: float = 0.1

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        check_positive_int("hidden", self.hidden)
        return TunedBackbone(trunk, dtype).with_adapters(
            lambda dim: Skip(), lambda dim: ParallelBottleneck(dim, self.hidden, self.scale)
        )


class ParallelBottleneck(Bottleneck):
    """From the residual stream before the MLP's norm: ``x + scale·W₂·dropout(ReLU(W₁·y))``."""

    def __init__(self, dim: int, hidden: int, scale: float) -> None:
        super().__init__(dim, hidden)
        self.scale = scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.scale * self.up(self.dropout(F.relu(self.down(y))))


class Skip(nn.Module):
    """Stands where a sub-layer has no adapter."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x
