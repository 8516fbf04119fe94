"""Traces a training step of a detector of torchvision on shapes alone, for ``e3va plan``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from e3va.budget.sample import INSTANCES, sample_circles, sample_image
from e3va.budget.tracer import Tracer
from e3va.data.coco import Target
from e3va.methods import HIGHWAYS, METHODS
from e3va.ops.storage import DEFAULT_STORAGE
from e3va.optim import has_adamw8bit
from e3va.torchvision.config import TrainConfig, set_fields
from e3va.torchvision.model import DETECTORS
from e3va.torchvision.run import build_model
from e3va.torchvision.train import batch_loss, build_optimizer, take_step

CLASSES = 80
"""Of objects, where nobody says: COCO's."""


class Setup:
    """A training, built without weights; see :class:`e3va.budget.Setup`.

    Args:
        config: the settings, with those of the model.
        classes: number of classes, without the background.
        instances: of each image.
    """

    batch: int | None = None  # all images of a step are computed at once

    def __init__(
        self, config: TrainConfig, classes: int = CLASSES, instances: int = INSTANCES
    ) -> None:
        assert config.model is not None
        self._config, self._model = config, config.model
        self._classes, self._instances = classes, instances
        self._tracer: Tracer | None = None
        self.method = config.model.method

    def training_size(self) -> tuple[int, int]:
        """Height and width of the largest image that is trained on."""
        shorter = max(self._model.min_size)
        return shorter, max(shorter, self._model.max_size)

    def changed(self, method: str) -> Setup:
        stored = {"trunk_dtype": "float32"} if METHODS[method].trains_trunk else {}
        return self._with({"method": method, **stored})

    def savings(self) -> Iterator[tuple[str, Setup]]:
        model = self._model
        frozen = not METHODS[self.method].trains_trunk
        storage = model.options.get("storage", DEFAULT_STORAGE)
        changes: dict[str, str] = {}
        if not self._config.amp:
            changes["amp"] = "bfloat16"
        if frozen and model.trunk_dtype == "float32" and not model.trunk_precision:
            changes["trunk_dtype"] = "bfloat16"
        if self.method in HIGHWAYS and storage != DEFAULT_STORAGE:
            changes["options.storage"] = DEFAULT_STORAGE
        if self._config.optimizer == "adamw" and has_adamw8bit():
            changes["optimizer"] = "adamw8bit"
        if self.method not in ("e3va", "frozen"):
            changes["method"] = "e3va"
        for name, value in changes.items():
            yield f"{name} {value}", self._with({name: value})
        if len(changes) > 1:
            yield "all of these", self._with(changes)

    def fewer(self, images: int, most: int) -> tuple[str, int]:
        return f"batch_size {most}", most

    def split(self, images: int, size: tuple[int, int]) -> dict[str, int]:
        config = self._config
        self._tracer = tracer = self._tracer or Tracer(
            partial(build_model, self._model, self._classes + 1, pretrained=False),
            partial(build_optimizer, config),
        )
        transform: Any = tracer.model.transform
        transform.min_size, transform.max_size = (min(size),), max(size)
        batch = [sample(self._model.detector, *size, self._instances, self._classes)] * images
        return tracer.split(partial(step, tracer, batch, config))

    def _with(self, changes: dict[str, str]) -> Setup:
        words = [word for pair in changes.items() for word in pair]
        return Setup(set_fields(self._config, words), self._classes, self._instances)


def step(tracer: Tracer, batch: list[tuple[Tensor, Target]], config: TrainConfig) -> None:
    """A whole step, as training takes it."""
    images, targets = zip(*batch, strict=True)
    loss = batch_loss(tracer.model, list(images), list(targets), config.amp_dtype)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    take_step(loss, tracer.optimizer, scaler, config.clip_norm)


def sample(
    detector: str, height: int, width: int, instances: int, classes: int
) -> tuple[Tensor, Target]:
    """An image of noise with discs of different sizes, as the data give it to ``detector``."""
    image = sample_image(height, width).float().div_(255)
    circles = torch.tensor(sample_circles(height, width, instances)).reshape(-1, 3)
    x, y, radius = circles.unbind(1)
    target = {
        "boxes": torch.stack([x - radius, y - radius, x + radius, y + radius], dim=1),
        "labels": 1 + torch.arange(instances) % classes,
    }
    if DETECTORS[detector].masks:
        across = (torch.arange(width) - x[:, None]).square()
        down = (torch.arange(height) - y[:, None]).square()
        inside = down[:, :, None] + across[:, None, :] <= radius[:, None, None].square()
        target["masks"] = inside.to(torch.uint8)
    return image, target
