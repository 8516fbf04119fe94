"""Several detectors, each with a highway and heads of its own, over one frozen trunk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from e3va.highway import HighwayPass
from e3va.methods import E3VABackbone
from e3va.trunks.base import Epilogue, Transition
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
    along = _Convoy([HighwayPass(backbone.highway, backbone.norms) for backbone in backbones])
    backbones[0].trunk.drive(image, along)
    return [
        backbone.features(one.maps, image)
        for backbone, one in zip(backbones, along.passes, strict=True)
    ]


class _Convoy:
    """Several highways along one trunk, one of which completes the sub-layers."""

    def __init__(self, passes: list[HighwayPass]) -> None:
        self.passes = passes

    def epilogue(self, stage: int) -> Epilogue:
        rides = [one.epilogue(stage) for one in self.passes]
        # One that taps norms makes the norm after the last sub-layer, too.
        first, *others = sorted(rides, key=lambda ride: ride.tap != "norm")

        def complete(x: Tensor, y: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
            y, z = first(x, y, norm)
            for ride in others:
                ride.follow(x, z)
            return y, z

        return complete

    def arrive(
        self, stage: int, y_in: Tensor, y_out: Tensor, transition: Transition | None
    ) -> None:
        for one in self.passes:
            one.arrive(stage, y_in, y_out, transition)


def _backbone(model: nn.Module) -> E3VABackbone:
    found = [module for module in model.modules() if isinstance(module, E3VABackbone)]
    if len(found) != 1:
        raise ValueError(
            f"a {type(model).__name__} with one E3VABackbone is needed, this one has {len(found)}"
        )
    return found[0]
