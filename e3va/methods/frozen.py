"""Linear probing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3va.backbone import Backbone
from e3va.methods.registry import Method, register_method
from e3va.trunks import family_of
from e3va.trunks.base import TrunkConfig


@register_method("frozen")
@dataclass(frozen=True)
class Frozen(Method):
    """Nothing of the backbone is trained, the detector over it alone."""

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        return Backbone(family_of(trunk).frozen(trunk, dtype))
