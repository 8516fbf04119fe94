"""BitFit (arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3va.backbone import Backbone
from e3va.methods.registry import Method, register_method
from e3va.methods.tuned import TunedBackbone, network
from e3va.trunks.base import TrunkConfig


@register_method("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """Every bias is trained, those of relative positions too."""

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        backbone = TunedBackbone(trunk, dtype)
        parameters = network(backbone).named_parameters()
        return backbone.train_only(p for name, p in parameters if "bias" in name.rpartition(".")[2])
