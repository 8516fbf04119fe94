"""LoRand (arXiv 2303.00050, CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e3va.backbone import Backbone
from e3va.config import check_positive_int
from e3va.methods.registry import Method, register_method
from e3va.methods.tuned import Bottleneck, TunedBackbone
from e3va.trunks.base import TrunkConfig


@register_method("lorand")
@dataclass(frozen=True)
class LoRand(Method):
    """Houlsby's adapter with hidden width C/2 and projections of low rank.

    Attributes:
        branches: low-rank branches summed in each projection (default 2).
        kernel_dim: side of each branch's inner kernel (default 8).
    """

    branches: int = 2
    kernel_dim: int = 8

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        check_positive_int("branches", self.branches)
        check_positive_int("kernel_dim", self.kernel_dim)

        def low_rank(dim: int, out: int) -> LowRank:
            return LowRank(dim, out, self.branches, self.kernel_dim)

        return TunedBackbone(trunk, dtype).with_adapters(
            lambda dim: Bottleneck(dim, dim // 2, low_rank)
        )


class LowRank(nn.Module):
    """``x·Σᵢ Aᵢ·gᵢ·Bᵢ + bias``: [..., C] → [..., m].

    Parameters (d kernel_dim): reduce, the Aᵢ side by side [C, branches·d]; kernel, the gᵢ
    [branches, d, d]; weight, the Bᵢ below each other [branches·d, m]; bias [m].
    """

    def __init__(self, dim: int, out: int, branches: int, kernel_dim: int) -> None:
        super().__init__()
        rank = branches * kernel_dim
        self.reduce = nn.Parameter(torch.randn(dim, rank) * dim**-0.5)
        self.kernel = nn.Parameter(torch.eye(kernel_dim).repeat(branches, 1, 1))
        self.weight = nn.Parameter(torch.randn(rank, out) * rank**-0.5)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(0, self.kernel.shape[:2])
        weight = (self.kernel @ weight).flatten(0, 1)
        return x @ self.reduce.to(x) @ weight.to(x) + self.bias.to(x)
