"""Instances in COCO's JSON format: read for training, and scored by COCO's average precision."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e3va.data.coco_json import read_json
from e3va.data.geometry import decode_mask, encode_mask, scale_to
from e3va.data.images import read_image

logger = logging.getLogger(__name__)

Target = dict[str, Tensor]


class CocoInstances:
    """Images and their instances from a COCO JSON file; an item is ``(image, target)``.

    ``image`` is [3, H, W] float32 in [0, 1]. ``target`` is what torchvision's detectors train on:
    ``boxes`` [n, 4] float32 (x1, y1, x2, y2, clipped to the image), ``labels`` [n] int64 (1 is the
    first category by id, 0 is the background) and, where masks are read, ``masks`` [n, H, W]
    uint8. Crowds are no targets; evaluation ignores what is found in them. What cannot be trained
    on is dropped, see :func:`e3va.data.coco_json.read_json`; one warning says how many and why.
    Instances whose mask covers no pixel are no targets either.

    Args:
        annotations: the JSON file; masks as polygons or as run-length encodings.
        images: the folder that its file names are relative to.
        masks: read masks (default True); False: boxes alone, and no annotation needs a mask.
        keep_empty: keep the images without a target (default True).

    Attributes:
        classes: names of the categories, ordered by id; the class of label i is ``classes[i - 1]``.
        instances: how many there are, crowds not counted.

    Raises:
        FileNotFoundError: the JSON file or an image is missing.
        ValueError: the JSON is not in COCO's format, or has no mask where masks are read; says what
            is wrong with which annotation.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str],
        *,
        masks: bool = True,
        keep_empty: bool = True,
    ) -> None:
        self.path = Path(annotations)
        self.folder = Path(images)
        self.masks = masks
        content = read_json(annotations, images, masks=masks)
        content.warn(logger)
        maskless = any(reason.startswith("no mask") for reason in content.dropped)
        if masks and maskless and not content.annotations:
            raise ValueError(f"{self.path} has no mask: read it with masks=False for its boxes")
        self.classes = content.classes
        self._categories = content.categories
        self._labels = {c["id"]: i for i, c in enumerate(content.categories, start=1)}
        self._instances: dict[Any, list[dict[str, Any]]] = {i["id"]: [] for i in content.images}
        for annotation in content.annotations:
            self._instances[annotation["image_id"]].append(annotation)
        self.instances = sum(content.counts().values())
        self._images = [
            image
            for image in content.images
            if keep_empty or any(not a["iscrowd"] for a in self._instances[image["id"]])
        ]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        record = self._images[index]
        targets = [a for a in self._instances[record["id"]] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in targets], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self._labels[a["category_id"]] for a in targets], dtype=torch.int64)
        target = {"boxes": boxes, "labels": labels}
        if self.masks:
            masks = np.zeros((len(targets), record["height"], record["width"]), dtype=np.uint8)
            for mask, annotation in zip(masks, targets, strict=True):
                mask[:] = decode_mask(annotation["segmentation"], *mask.shape)
            visible = torch.from_numpy(masks.any((1, 2)))
            target["masks"] = torch.from_numpy(masks)
            target = {name: values[visible] for name, values in target.items()}
        return self.image(index), target

    def largest(self, shorter: int, longer: int) -> tuple[int, int]:
        """Positions of the image that has the most pixels once its shorter side is brought to
        ``shorter``, its longer one to ``longer`` at the most, and of that with the most
        instances."""

        def pixels(index: int) -> float:
            height, width, _ = self.shape(index)
            return height * width * scale_to((height, width), shorter, longer) ** 2

        every = range(len(self))
        return max(every, key=pixels), max(every, key=lambda index: self.shape(index)[2])

    def shape(self, index: int) -> tuple[int, int, int]:
        """Height and width of image ``index``, and how many instances it has, crowds included."""
        record = self._images[index]
        return record["height"], record["width"], len(self._instances[record["id"]])

    def image(self, index: int) -> Tensor:
        """The image alone: [3, H, W] float32 in [0, 1]; see :func:`e3va.data.images.read_image`."""
        pixels = read_image(self._images[index]["file_name"])
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)

    def results(
        self,
        index: int,
        boxes: Tensor,
        labels: Tensor,
        scores: Tensor,
        masks: Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Predictions for image ``index`` in COCO's result format, with masks where they are read.

        Args:
            index: position of the image in this data set.
            boxes: [n, 4], x1, y1, x2, y2. labels: [n], from 1. scores: [n].
            masks: [n, H, W], boolean; not looked at where masks are not read.

        Raises:
            ValueError: masks are read, but there are none here.
        """
        sizes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        results = [
            {
                "image_id": self._images[index]["id"],
                "category_id": self._categories[label - 1]["id"],
                "bbox": box,
                "score": score,
            }
            for box, label, score in zip(
                sizes.tolist(), labels.tolist(), scores.tolist(), strict=True
            )
        ]
        if self.masks:
            if masks is None:
                raise ValueError(
                    f"{self.path} was read with masks, but the detector predicts none: "
                    "read it with masks=False"
                )
            for result, mask in zip(results, masks.cpu().numpy(), strict=True):
                result["segmentation"] = encode_mask(mask)
        return results

    def ground_truth(self) -> dict[str, Any]:
        """The annotations that predictions are scored against, crowds included, in COCO's format.

        They are numbered afresh from 1: pycocotools takes a match with annotation 0 for no match.
        """
        annotations = [a for image in self._images for a in self._instances[image["id"]]]
        return {
            "info": {},
            "images": self._images,
            "categories": self._categories,
            "annotations": [{**a, "id": i} for i, a in enumerate(annotations, start=1)],
        }


def average_precision(data: CocoInstances, results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """COCO's AP of predictions, as made by :meth:`CocoInstances.results`, on the scale 0–100.

    Returns:
        ``box_ap``, ``box_ap50`` and, where ``data`` has masks, ``mask_ap``, ``mask_ap50``.

    Raises:
        ImportError: pycocotools is missing.
        ValueError: the data set has no instance, so that AP is undefined.
    """
    coco, cocoeval = _pycocotools()
    truth = data.ground_truth()
    if all(annotation["iscrowd"] for annotation in truth["annotations"]):
        raise ValueError(f"{data.path} has no instance to find: its AP is undefined")
    kinds = [("bbox", "box", "segmentation")] + [("segm", "mask", "bbox")] * data.masks
    metrics = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind, name, other in kinds:
            # pycocotools writes into what it is given, hence a copy for each kind.
            expected = coco.COCO()
            expected.dataset = {**truth, "annotations": [dict(a) for a in truth["annotations"]]}
            expected.createIndex()
            scores = [0.0, 0.0]
            if results:
                found = [{k: v for k, v in r.items() if k != other} for r in results]
                scorer = cocoeval.COCOeval(expected, expected.loadRes(found), kind)
                scorer.evaluate()
                scorer.accumulate()
                scorer.summarize()
                scores = scorer.stats
            metrics[f"{name}_ap"] = 100 * float(scores[0])
            metrics[f"{name}_ap50"] = 100 * float(scores[1])
    return metrics


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirror an image and its target left to right."""
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    width = image.shape[-1]
    flipped = {**target, "boxes": torch.stack([width - x2, y1, width - x1, y2], dim=1)}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped


def _pycocotools() -> tuple[Any, Any]:
    try:
        from pycocotools import coco, cocoeval
    except ImportError as error:
        raise ImportError(
            "COCO annotations need pycocotools: pip install 'e3va[torchvision]'"
        ) from error
    return coco, cocoeval
