"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3va.backbone import Backbone
from e3va.methods.registry import Method, register_method
from e3va.trunks import family_of
from e3va.trunks.base import TrunkConfig


@register_method("full")
@dataclass(frozen=True)
class Full(Method):
    """Everything is trained.

    Attributes:
        drop_path: stochastic depth rate of the last block, growing linearly from 0 (default 0).
    """

    drop_path: float = 0.0

    trains_trunk = True
    free = frozenset({"drop_path"})

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        return Backbone(family_of(trunk).trainable(trunk, self.drop_path))
