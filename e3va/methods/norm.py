"""Tuning of the norms alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from e3va.backbone import Backbone
from e3va.methods.registry import Method, register_method
from e3va.methods.tuned import TunedBackbone, network
from e3va.trunks.base import TrunkConfig


@register_method("norm")
@dataclass(frozen=True)
class Norm(Method):
    """Every LayerNorm is trained."""

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        backbone = TunedBackbone(trunk, dtype)
        norms = (m for m in network(backbone).modules() if isinstance(m, nn.LayerNorm))
        return backbone.train_only(p for norm in norms for p in norm.parameters())
