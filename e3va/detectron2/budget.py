"""Traces a training step of a Detectron2 config on shapes alone, for ``e3va plan``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from e3va.budget.report import savings_by
from e3va.budget.sample import INSTANCES, sample_circles, sample_image
from e3va.budget.tracer import Tracer
from e3va.data.geometry import padded, resized
from e3va.detectron2.config import dtype_of
from e3va.detectron2.solver import build_optimizer, steps_early
from e3va.methods import HIGHWAYS, METHODS
from e3va.optim import has_adamw8bit, take_step

Record = tuple[int | None, int | None, int]
"""Height, width and number of instances of an image of the data; None: not known."""


class Setup:
    """A config, built without weights; see :class:`e3va.budget.Setup`.

    Args:
        cfg: the config. instances: of each image.
    """

    def __init__(self, cfg: CfgNode, instances: int = INSTANCES) -> None:
        self._cfg = cfg.clone()
        self._cfg.defrost()
        self._cfg.MODEL.DEVICE = "cpu"
        self._cfg.MODEL.WEIGHTS = self._cfg.MODEL.TRUNK.WEIGHTS = ""
        self._cfg.MODEL.TRUNK.COMPILE = False
        self._instances = instances
        self._tracer: Tracer | None = None
        self.method = cfg.MODEL.TUNING.METHOD
        self.images = 1
        self.batch = cfg.SOLVER.IMS_PER_BATCH

    def training_size(self) -> tuple[int, int]:
        """Height and width of the largest image that is trained on.

        Raises:
            ValueError: images stay as they are.
        """
        given, crop = self._cfg.INPUT, self._cfg.INPUT.CROP
        if crop.ENABLED and crop.TYPE == "absolute" and not crop.RESIZE:
            height, width = crop.SIZE
            return int(height), int(width)
        shorter = max(given.MIN_SIZE_TRAIN)
        if shorter == 0:
            raise ValueError("INPUT.MIN_SIZE_TRAIN is 0, images stay as they are: give --size")
        return shorter, max(shorter, given.MAX_SIZE_TRAIN)

    def changed(self, method: str) -> Setup:
        return self._with({"MODEL.TUNING.METHOD": method})

    def savings(self) -> Iterator[tuple[str, Setup]]:
        cfg = self._cfg
        frozen = not METHODS[self.method].trains_trunk
        changes: dict[str, Any] = {}
        if not cfg.SOLVER.AMP.ENABLED:
            changes["SOLVER.AMP.ENABLED"] = True
        if frozen and cfg.MODEL.TRUNK.DTYPE == "float32" and not cfg.MODEL.TRUNK.PRECISION:
            changes["MODEL.TRUNK.DTYPE"] = "bfloat16"
        if self.method in HIGHWAYS and cfg.MODEL.HIGHWAY.STORAGE != "int4":
            changes["MODEL.HIGHWAY.STORAGE"] = "int4"
        if cfg.SOLVER.OPTIMIZER == "ADAMW" and has_adamw8bit():
            changes["SOLVER.OPTIMIZER"] = "ADAMW8BIT"
        if self.method not in ("e3va", "frozen"):
            changes["MODEL.TUNING.METHOD"] = "e3va"
        return savings_by(changes, self._with)

    def fewer(self, images: int, most: int) -> tuple[str, int]:
        parts = next(n for n in range(2, images + 1) if -(-images // n) <= most)
        return f"in {parts} parts (SOLVER.ACCUMULATE)", -(-images // parts)

    def build(self) -> Tracer:
        """The model and its optimizer, on shapes alone; always the same.

        Raises:
            ImportError, KeyError, TypeError, ValueError: a setting does not fit.
        """
        cfg = self._cfg
        self._tracer = self._tracer or Tracer(
            partial(build_model, cfg), partial(build_optimizer, cfg)
        )
        return self._tracer

    def split(self, images: int, size: tuple[int, int]) -> dict[str, int]:
        cfg, tracer = self._cfg, self.build()
        batch = sample_batch(cfg, *size, self._instances) * images
        run = partial(loss, tracer.model, batch, cfg)
        step = partial(take_step, run, tracer.optimizer, steps_early(cfg))
        return tracer.split(step, part=images < self.batch)

    def _with(self, changes: Mapping[str, Any]) -> Setup:
        cfg = self._cfg.clone()
        cfg.merge_from_list([word for pair in changes.items() for word in pair])
        return Setup(cfg, self._instances)


def largest(cfg: CfgNode, records: Iterable[Record]) -> tuple[tuple[int, int], int]:
    """Height and width that a batch of ``records`` may be padded to, and the most instances of an
    image."""
    records = list(records)
    instances = max((number for _, _, number in records), default=INSTANCES)
    sizes = [(height, width) for height, width, _ in records if height and width]
    crop = cfg.INPUT.CROP
    cropped = crop.ENABLED and crop.TYPE == "absolute" and not crop.RESIZE
    if cropped or len(sizes) < len(records):
        return Setup(cfg).training_size(), instances
    shorter, longer = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    if shorter:  # else images stay as they are
        sizes = [resized(size, shorter, longer) for size in sizes]
    return padded(sizes, cfg.DATALOADER.ASPECT_RATIO_GROUPING), max(1, instances)


def loss(model: nn.Module, batch: list[dict[str, Any]], cfg: CfgNode) -> Tensor:
    """The loss of a step, in the precision that is configured."""
    device, amp = next(model.parameters()).device.type, cfg.SOLVER.AMP
    dtype = dtype_of("SOLVER.AMP.DTYPE", amp.DTYPE, ("bfloat16", "float16"))
    with EventStorage(), torch.autocast(device, dtype, enabled=amp.ENABLED):
        return sum(model(batch).values())


def sample_batch(
    cfg: CfgNode, height: int, width: int, instances: int = INSTANCES
) -> list[dict[str, Any]]:
    """One image of noise with regular 16-gons of different sizes, seeded, as the mapper of ``cfg``
    would give it; of semantic segmentation, with a map of one class."""
    image = sample_image(height, width)
    sample: dict[str, Any] = {"image": image, "height": height, "width": width}
    if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        return [{**sample, "sem_seg": torch.zeros(height, width, dtype=torch.int64)}]
    polygons, boxes = [], []
    angles = [2 * math.pi * k / 16 for k in range(16)]
    for x, y, radius in sample_circles(height, width, instances):
        points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
        polygons.append([[value for point in points for value in point]])
        boxes.append([x - radius, y - radius, x + radius, y + radius])
    retinanet = cfg.MODEL.META_ARCHITECTURE in ("LeanRetinaNet", "RetinaNet")
    classes = cfg.MODEL.RETINANET.NUM_CLASSES if retinanet else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    target = Instances((height, width))
    target.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    target.gt_classes = torch.arange(instances) % classes
    if cfg.MODEL.MASK_ON:
        masks = PolygonMasks(polygons)
        if cfg.INPUT.MASK_FORMAT == "bitmask":
            masks = BitMasks.from_polygon_masks(masks, height, width)
        target.gt_masks = masks
    return [{**sample, "instances": target}]
