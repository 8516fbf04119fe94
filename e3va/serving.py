"""Several detectors, each with a highway and heads of its own, over one frozen trunk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from e3va import ops
from e3va.backbone import E3VABackbone
from e3va.highway import StageRide
from e3va.ops.reference import pool_2x2
from e3va.weights import trunk_hash


class SharedTrunk:
    """While it is entered, detectors that are given the same images share the trunk's forward.

        with SharedTrunk([cells, tissue]):
            found = [model(inputs) for model in (cells, tissue)]

    The detectors stay as they are, of whichever framework, and predict what they predict alone.
    From then on they also hold one trunk instead of one each. For inference: no gradient is kept.

    Args:
        models: the detectors, an :class:`~e3va.E3VABackbone` somewhere in each.

    Raises:
        ValueError: there is no model, or one twice; one has no such backbone or several; or their
            trunks have other weights or are stored in other dtypes.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._backbones = [_backbone(model) for model in models]
        if not models or len(set(map(id, self._backbones))) < len(models):
            raise ValueError(f"one or more models are needed, each once, got {len(models)}")
        first, *others = self._backbones
        for backbone in others:
            ours, theirs = (b.trunk.state_dict() for b in (first, backbone))
            if trunk_hash(backbone.trunk) != trunk_hash(first.trunk) or any(
                value.dtype != theirs[name].dtype for name, value in ours.items()
            ):
                raise ValueError("the models' trunks differ: in their weights or their dtype")
            backbone.trunk = first.trunk
        self._image: Tensor | None = None
        self._form: tuple[Any, ...] = ()
        self._maps: list[dict[str, Tensor]] = []

    def __enter__(self) -> Self:
        for i, backbone in enumerate(self._backbones):
            backbone.forward = partial(self._forward, i)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for backbone in self._backbones:
            del backbone.forward
        self._image, self._maps = None, []

    def _forward(self, i: int, image: Tensor) -> dict[str, Tensor]:
        seen, autocast = self._image, None
        if torch.is_autocast_enabled(image.device.type):
            autocast = torch.get_autocast_dtype(image.device.type)
        form = image.shape, image.dtype, image.device, autocast
        if seen is None or form != self._form or not torch.equal(seen, image):
            self._maps = shared_forward(self._backbones, image)
            # A copy: the caller may fill the same tensor with the next image.
            self._image, self._form = image.clone(), form
        return self._maps[i]


@torch.no_grad()
def shared_forward(backbones: Sequence[E3VABackbone], image: Tensor) -> list[dict[str, Tensor]]:
    """The maps of several backbones over the trunk of the first, which runs once.

    Args:
        backbones: their trunks have the same weights.
        image: [B, 3, H, W], normalised.

    Returns:
        For each what it would return by itself, up to rounding.
    """
    trunk = backbones[0].trunk
    maps: list[list[Tensor]] = [[] for _ in backbones]
    x = image.to(trunk.compute_dtype())
    with torch.autocast(image.device.type, enabled=False):
        y = trunk.embed(x)
        h = [y] * len(backbones)
        carries: list[Tensor | None] = [None] * len(backbones)
        for s in range(trunk.config.num_stages):
            stages: list[Any] = [backbone.highway.stages[s] for backbone in backbones]
            rides = [stage.ride() for stage in stages]
            # One that taps norms makes the norm after the last sub-layer, too.
            first, *others = sorted(rides, key=lambda ride: ride.tap != "norm")

            def complete(
                x: Tensor,
                y: Tensor,
                norm: nn.LayerNorm | None,
                first: StageRide = first,
                others: list[StageRide] = others,
            ) -> tuple[Tensor, Tensor]:
                y, z = first(x, y, norm)
                for ride in others:
                    ride.follow(x, z)
                return y, z

            y_in, y = y, trunk.stage(s, y, complete)
            merging = trunk.merging(s)
            for i, (backbone, ride) in enumerate(zip(backbones, rides, strict=True)):
                norm: Any = backbone.norms[s]
                arrived, carry = ride.arrive(h[i], y_in, y, carries[i])
                if merging and carry is not None:
                    carries[i] = pool_2x2(carry)
                p, h[i] = ops.stage_exit(
                    arrived, norm.weight, norm.bias, norm.eps, *(merging or ())
                )
                maps[i].append(p)
            if merging:
                y = trunk.merge(s, y)
    return [b._features(own, image) for b, own in zip(backbones, maps, strict=True)]


def _backbone(model: nn.Module) -> E3VABackbone:
    found = [module for module in model.modules() if isinstance(module, E3VABackbone)]
    if len(found) != 1:
        raise ValueError(
            f"a {type(model).__name__} with one E3VABackbone is needed, this one has {len(found)}"
        )
    return found[0]
