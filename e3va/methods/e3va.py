"""The gradient highway beside a frozen trunk (arXiv 2306.09729), ours and as published."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from e3va.backbone import Backbone
from e3va.config import HighwayConfig
from e3va.highway import Highway, HighwayPass
from e3va.methods.registry import Method, register_method
from e3va.trunks import Trunk, family_of
from e3va.trunks.base import Frozen, TrunkConfig

HIGHWAYS = ("e3va", "e3va_paper")
"""The methods that have a highway."""


class E3VABackbone(Backbone):
    """A frozen trunk with a gradient highway beside it (arXiv 2306.09729).

    At initialisation its maps equal those of the frozen network. Only the highway and the output
    norms are trained.

    Args:
        trunk: the frozen trunk.
        config: form and shape of the highway.

    Raises:
        TypeError: the trunk is not frozen.
    """

    def __init__(self, trunk: Trunk, config: HighwayConfig | None = None) -> None:
        super().__init__(trunk)
        if not isinstance(trunk, Frozen):
            raise TypeError(f"trunk must be a frozen one, got {type(trunk).__name__}")
        self.norms.requires_grad_(True)
        self.highway = Highway(trunk.config, config)
        self.method = E3VA(**dataclasses.asdict(self.highway.config))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [B, 3, H, W], normalised, any H and W ≥ 1 → one map per stage."""
        along = HighwayPass(self.highway, self.norms)
        self.trunk.drive(image, along)
        return self.features(along.maps, image)


@register_method("e3va_paper")
@dataclass(frozen=True)
class E3VAPaper(Method):
    """The highway in its published form; see :class:`~e3va.config.HighwayConfig`.

    Attributes:
        branches, kernel_dim, hidden_ratio, storage: as there.
    """

    branches: int = HighwayConfig.branches
    kernel_dim: int = HighwayConfig.kernel_dim
    hidden_ratio: float = HighwayConfig.hidden_ratio
    storage: str = HighwayConfig.storage

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        config = HighwayConfig(**dataclasses.asdict(self)).published()
        return E3VABackbone(family_of(trunk).frozen(trunk, dtype), config)


@register_method("e3va")
@dataclass(frozen=True)
class E3VA(HighwayConfig, Method):
    """The highway in any form, by default the best; its options are those of
    :class:`~e3va.config.HighwayConfig`."""

    free = frozenset({"storage"})

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        config = HighwayConfig(**dataclasses.asdict(self))
        return E3VABackbone(family_of(trunk).frozen(trunk, dtype), config)
