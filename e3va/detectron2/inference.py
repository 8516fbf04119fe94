"""Predictions on pictures, on windows and at several sizes, and models as one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import DatasetMapperTTA, build_model
from detectron2.modeling.postprocessing import sem_seg_postprocess
from fvcore.transforms.transform import HFlipTransform
from torch import Tensor, nn

from e3va.checkpoint import check_target, write_state
from e3va.detectron2.average import WeightAverage
from e3va.detectron2.checkpoint import CompleteCheckpointer
from e3va.runs.folder import Found


def load_model(cfg: CfgNode) -> nn.Module:
    """The model of a config with the weights of MODEL.WEIGHTS, ready to predict: the averaged ones
    where SOLVER.EMA has averaged them.

    Raises:
        ValueError: MODEL.WEIGHTS is empty, or of another model.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS is empty: name the trained model's file")
    model = build_model(cfg).eval()
    rest = CompleteCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    if cfg.SOLVER.EMA.DECAY and "ema" in rest:  # what was evaluated
        average = WeightAverage(model, cfg.SOLVER.EMA.DECAY)
        average.load_state_dict(rest["ema"])
        average.apply()
    return model


def predictor(cfg: CfgNode) -> Callable[[np.ndarray], Found]:
    """What finds things on an image [H, W, 3], uint8, RGB, as evaluation does.

    Raises:
        ValueError: MODEL.WEIGHTS is empty, or of another model.
    """
    model = semantic_inference(cfg, load_model(cfg))
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)

    @torch.no_grad()
    def find(pixels: np.ndarray) -> Found:
        height, width = pixels.shape[:2]
        shown = pixels[..., ::-1] if cfg.INPUT.FORMAT == "BGR" else pixels
        resized = resize.get_transform(shown).apply_image(shown)
        image = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        (found,) = model([{"image": image, "height": height, "width": width}])
        if "sem_seg" in found:
            return Found(labels=found["sem_seg"].argmax(0).to("cpu", torch.uint8).numpy())
        return Found(
            [
                {"label": r["category_id"], **_without_ids(r)}
                for r in instances_to_coco_json(found["instances"].to("cpu"), 0)
            ]
        )

    return find


def export(cfg: CfgNode, target: Path) -> None:
    """Write the whole model, trunk included, as one file that needs no other weights: load it as
    MODEL.WEIGHTS, with MODEL.TRUNK.WEIGHTS empty.

    Args:
        cfg: the config, MODEL.WEIGHTS the trained model's file.
        target: a ``.safetensors`` or ``.pth`` file; replaced as a whole or not at all.

    Raises:
        ValueError: another suffix, or MODEL.WEIGHTS is empty.
    """
    check_target(target)
    write_state(load_model(cfg).state_dict(), target)


class SemanticInference(nn.Module):
    """A ``SemanticSegmentor`` tested on overlapping windows, at several sizes and mirrored.

    Args:
        model: the segmentor.
        window: side of a window in pixels of the resized image; 0: the whole image at once.
        stride: between windows; 0: two thirds of ``window``.
        augment: makes resized and mirrored copies of an input, whose probabilities are averaged.

    Raises:
        ValueError: ``stride`` exceeds ``window``, so that pixels would be left out.
    """

    def __init__(
        self,
        model: nn.Module,
        window: int = 0,
        stride: int = 0,
        augment: DatasetMapperTTA | None = None,
    ) -> None:
        super().__init__()
        if min(window, stride) < 0 or stride > window:
            raise ValueError(
                "TEST.SLIDE needs 0 <= STRIDE <= WINDOW, or pixels are left out: "
                f"got STRIDE {stride} and WINDOW {window}"
            )
        self.model = model
        self._window = window
        self._stride = stride or max(1, window * 2 // 3)
        self._augment = augment
        self.train(model.training)

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """As the segmentor's, with probabilities for logits."""
        return [{"sem_seg": self._average(sample)} for sample in batched_inputs]

    def _average(self, sample: dict[str, Any]) -> Tensor:
        copies = self._augment(sample) if self._augment else [sample]
        total: Any = 0
        for augmented in copies:
            transforms = getattr(augmented.pop("transforms", None), "transforms", ())
            scores = self._logits(augmented).softmax(0)
            if any(isinstance(transform, HFlipTransform) for transform in transforms):
                scores = scores.flip(-1)
            total = total + scores
        return total / len(copies)

    def _logits(self, sample: dict[str, Any]) -> Tensor:
        """[classes, height, width] of the output."""
        image, window = sample["image"], self._window
        height, width = image.shape[-2:]
        if not window or max(height, width) <= window:
            return self.model([sample])[0]["sem_seg"]
        total: Any = 0
        count = image.new_zeros(height, width, dtype=torch.float32)
        for y in _starts(height, window, self._stride):
            for x in _starts(width, window, self._stride):
                rows, columns = slice(y, y + window), slice(x, x + window)
                logits = self.model([{"image": image[:, rows, columns]}])[0]["sem_seg"]
                if isinstance(total, int):
                    total = logits.new_zeros(len(logits), height, width)
                total[:, rows, columns] += logits
                count[rows, columns] += 1
        total /= count.to(total.device)
        size = sample.get("height", height), sample.get("width", width)
        return sem_seg_postprocess(total, (height, width), *size)


def semantic_inference(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """``model`` as ``cfg`` wants it tested: itself, but for segmentors with TEST.SLIDE or
    TEST.AUG."""
    slide = cfg.TEST.SLIDE
    if cfg.MODEL.META_ARCHITECTURE != "SemanticSegmentor":
        return model
    if not (slide.WINDOW or slide.STRIDE or cfg.TEST.AUG.ENABLED):
        return model
    augment = DatasetMapperTTA(cfg) if cfg.TEST.AUG.ENABLED else None
    return SemanticInference(model, slide.WINDOW, slide.STRIDE, augment)


def class_names(cfg: CfgNode) -> list[str]:
    """Names of the classes; nameless ones are called by their numbers."""
    if not cfg.DATASETS.CLASSES:
        for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
            if name in MetadataCatalog:
                metadata = MetadataCatalog.get(name)
                return list(metadata.get("thing_classes") or metadata.get("stuff_classes"))
    heads = (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET, cfg.MODEL.SEM_SEG_HEAD)
    numbers = [str(i) for i in range(max(head.NUM_CLASSES for head in heads))]
    return list(cfg.DATASETS.CLASSES) or numbers


def _without_ids(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k not in ("image_id", "category_id")}


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin; the last one ends with the image."""
    last = max(0, size - window)
    return [*range(0, last, stride), last]
