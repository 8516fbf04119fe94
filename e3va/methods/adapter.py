"""Houlsby's adapters (arXiv 1902.00751)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3va.backbone import Backbone
from e3va.config import check_positive_int
from e3va.methods.registry import Method, register_method
from e3va.methods.tuned import Bottleneck, TunedBackbone
from e3va.trunks.base import TrunkConfig


@register_method("adapter")
@dataclass(frozen=True)
class Adapter(Method):
    """A bottleneck after each sub-layer.

    Attributes:
        hidden: its width (default 64).
    """

    hidden: int = 64

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        check_positive_int("hidden", self.hidden)
        return TunedBackbone(trunk, dtype).with_adapters(lambda dim: Bottleneck(dim, self.hidden))
