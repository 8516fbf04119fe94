"""Tuning of the last block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3va.backbone import Backbone
from e3va.methods.registry import Method, register_method
from e3va.methods.tuned import TunedBackbone, last_block
from e3va.trunks.base import TrunkConfig


@register_method("partial1")
@dataclass(frozen=True)
class Partial1(Method):
    """The trunk's last block is trained."""

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        backbone = TunedBackbone(trunk, dtype)
        return backbone.train_only(last_block(backbone.trunk).parameters())
