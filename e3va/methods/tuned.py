"""What the methods share that tune a trainable trunk in part: baselines, in plain PyTorch.

Some train weights that the network has, the others adapters beside frozen ones. An adapter sits
after a sub-layer of a block: from the sub-layer's output x and the residual stream y, both
[B, H, W, C], it makes what is added to y instead of x. At first that is x itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va.backbone import Backbone
from e3va.trunks import Trunk, family_of
from e3va.trunks.base import Epilogue, Linear, Outputs, TrunkConfig, layer_norm


class TunedBackbone(Backbone):
    """A trunk tuned by one of the published methods that E³VA is compared with.

    At initialisation its maps equal those of the frozen network. What is trained is in float32, and
    nothing else is, neither a norm of the trunk nor an output norm, unless the method says so.

    Args:
        config: architecture of the trunk.
        dtype: what its frozen weights are stored in.
    """

    def __init__(self, config: TrunkConfig, dtype: torch.dtype) -> None:
        super().__init__(family_of(config).trainable(config).to(dtype))
        self.requires_grad_(False)
        self.adapters = nn.ModuleList()

    def train_only(self, parameters: Iterable[nn.Parameter]) -> TunedBackbone:
        """Train ``parameters``, which the network has."""
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return self

    def with_adapters(self, *kinds: Callable[[int], nn.Module]) -> TunedBackbone:
        """Train adapters, made from C: of the sub-layers in turn, by stage."""
        config = self.trunk.config
        self.adapters = nn.ModuleList(
            nn.ModuleList(kinds[k % len(kinds)](dim) for k in range(adapters))
            for dim, adapters in zip(config.dims, config.num_taps, strict=True)
        )
        return self

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [B, 3, H, W], normalised, any H and W ≥ 1 → one map per stage."""
        outputs = Outputs([_epilogue(stage) for stage in self.adapters])
        self.trunk.drive(image, outputs)
        return self.normalised(outputs.maps, image)


def network(backbone: TunedBackbone) -> nn.Module:
    """The trunk and the output norms."""
    return nn.ModuleList((backbone.trunk, backbone.norms))


def last_block(trunk: Trunk) -> nn.Module:
    return trunk.blocks(len(trunk.config.dims) - 1)[-1]


def _epilogue(adapters: nn.Module) -> Epilogue | None:
    """The epilogue of one pass through a stage with these ``adapters``; None if it needs none."""
    if not isinstance(adapters, nn.ModuleList):
        return None
    remaining = iter(adapters)

    def complete(x: Tensor, y: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        y = y + next(remaining)(x, y)
        return y, y if norm is None else layer_norm(y, norm)

    return complete


class Bottleneck(nn.Module):
    """``x + W₂·dropout(GELU(W₁·x))``, Houlsby's adapter.

    Args:
        dim: C.
        hidden: width between the projections W₁ and W₂.
        linear: class of the projections.
    """

    def __init__(
        self, dim: int, hidden: int, linear: Callable[[int, int], nn.Module] = Linear
    ) -> None:
        super().__init__()
        self.down = linear(dim, hidden)
        self.dropout = nn.Dropout(0.1)
        self.up = zero(linear(hidden, dim))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.up(self.dropout(F.gelu(self.down(x))))


def zero(layer: nn.Module) -> nn.Module:
    """``layer``, of which nothing comes at first."""
    for name in ("weight", "bias"):
        nn.init.zeros_(layer.get_parameter(name))
    return layer
