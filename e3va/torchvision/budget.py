"""Traces a training step of a detector of torchvision on shapes alone, for ``e3va plan``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from e3va.budget.report import savings_by
from e3va.budget.sample import INSTANCES, sample_circles, sample_image
from e3va.budget.tracer import Tracer
from e3va.data.coco import CocoInstances, Target
from e3va.data.geometry import padded, resized
from e3va.methods import HIGHWAYS, METHODS
from e3va.ops.storage import DEFAULT_STORAGE
from e3va.optim import has_adamw8bit
from e3va.torchvision.config import TrainConfig, set_fields
from e3va.torchvision.model import DETECTORS
from e3va.torchvision.run import build_model
from e3va.torchvision.step import batch_loss, build_optimizer, clipped_step

CLASSES = 80
"""Of objects, where nobody says: COCO's."""

Size = tuple[int, int]


class Setup:
    """A training, built without weights; see :class:`e3va.budget.Setup`.

    Args:
        config: the settings, with those of the model.
        classes: number of classes, without the background.
        instances: of each image.
        pixels: of an image, and of its masks, before the detector resizes them: the device has them
            as they are (default: as many as they are resized to).

    Raises:
        ValueError: ``config`` does not tell what the model is built from.
    """

    batch: int | None = None  # all images of a step are computed at once

    def __init__(
        self,
        config: TrainConfig,
        classes: int = CLASSES,
        instances: int = INSTANCES,
        pixels: int | None = None,
    ) -> None:
        if config.model is None:
            raise ValueError("the config does not tell what the model was built from")
        self._config, self._model = config, config.model
        self._classes, self._instances, self._pixels = classes, instances, pixels
        self._tracer: Tracer | None = None
        self.method = config.model.method
        self.images = config.batch_size

    @classmethod
    def of_data(cls, config: TrainConfig, data: CocoInstances) -> tuple[Setup, int, Size]:
        """That of a training on ``data``, and the images and the size of its largest step."""
        assert config.model is not None
        sides = max(config.model.min_size), config.model.max_size
        largest, fullest = data.largest(*sides)
        together = range(len(data)) if config.batch_size > 1 else [largest]
        sizes = [data.shape(index)[:2] for index in together]
        size = padded(resized(size, *sides) for size in sizes)
        pixels = max(height * width for height, width in sizes)
        own = cls(config, len(data.classes), max(1, data.shape(fullest)[2]), pixels)
        return own, config.batch_size, size

    def training_size(self) -> Size:
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
            changes["trunk_dtype"] = self._config.amp or "bfloat16"
        if self.method in HIGHWAYS and storage != DEFAULT_STORAGE:
            changes["options.storage"] = DEFAULT_STORAGE
        if self._config.optimizer == "adamw" and has_adamw8bit():
            changes["optimizer"] = "adamw8bit"
        if self.method not in ("e3va", "frozen"):
            changes["method"] = "e3va"
        return savings_by(changes, self._with)

    def fewer(self, images: int, most: int) -> tuple[str, int]:
        return f"batch_size {most}", most

    def build(self) -> Tracer:
        """The model and its optimizer, on shapes alone; always the same.

        Raises:
            ImportError, TypeError, ValueError: a setting does not fit.
        """
        self._tracer = self._tracer or Tracer(
            partial(build_model, self._model, self._classes + 1, pretrained=False),
            partial(build_optimizer, self._config),
        )
        return self._tracer

    def split(self, images: int, size: Size) -> dict[str, int]:
        config, tracer = self._config, self.build()
        transform: Any = tracer.model.transform
        transform.min_size, transform.max_size = (min(size),), max(size)
        scale = math.sqrt((self._pixels or size[0] * size[1]) / (size[0] * size[1]))
        given = round(scale * size[0]), round(scale * size[1])
        batch = [sample(self._model.detector, *given, self._instances, self._classes)] * images
        return tracer.split(partial(step, tracer.model, tracer.optimizer, batch, config))

    def _with(self, changes: Mapping[str, str]) -> Setup:
        words = [word for pair in changes.items() for word in pair]
        config = set_fields(self._config, words)
        return Setup(config, self._classes, self._instances, self._pixels)


def step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: list[tuple[Tensor, Target]],
    config: TrainConfig,
) -> None:
    """A whole step, as training takes it, with the batch as it comes to the device."""
    images = [image.clone() for image, _ in batch]
    targets = [{name: value.clone() for name, value in target.items()} for _, target in batch]
    loss = batch_loss(model, images, targets, config.amp_dtype)
    clipped_step(loss, optimizer, torch.amp.GradScaler("cpu", enabled=False), config.clip_norm)


def sample(
    detector: str, height: int, width: int, instances: int, classes: int
) -> tuple[Tensor, Target]:
    """An image of noise with squares of different sizes, as the data give it to ``detector``."""
    image = sample_image(height, width).float().div_(255)
    circles = torch.tensor(sample_circles(height, width, instances)).reshape(-1, 3)
    x, y, radius = circles.unbind(1)
    target = {
        "boxes": torch.stack([x - radius, y - radius, x + radius, y + radius], dim=1),
        "labels": 1 + torch.arange(instances) % classes,
    }
    if DETECTORS[detector].masks:
        masks = target["masks"] = torch.zeros(instances, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(
            masks, target["boxes"].round().int().tolist(), strict=True
        ):
            mask[y1:y2, x1:x2] = 1
    return image, target
