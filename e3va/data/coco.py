"""Instances in COCO's JSON format: read for training, and scored by COCO's average precision."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

logger = logging.getLogger(__name__)

# A box thinner than this, in pixels, holds nothing to learn and breaks the box regression.
MIN_SIDE = 0.1

Target = dict[str, Tensor]


class _Instance(NamedTuple):
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 within the image
    label: int
    segmentation: Any  # polygons or a run-length encoding; None where masks are not read
    crowd: bool
    annotation: dict[str, Any]  # as in the file


class CocoInstances:
    """Images and their instances from a COCO JSON file; an item is ``(image, target)``.

    ``image`` is [3, H, W] float32 in [0, 1]. ``target`` is what torchvision's detectors train on:
    ``boxes`` [n, 4] float32 (x1, y1, x2, y2, clipped to the image), ``labels`` [n] int64 (1 is the
    first category by id, 0 is the background) and, where masks are read, ``masks`` [n, H, W]
    uint8. Crowds are no targets; evaluation ignores what is found in them. Annotations with a box
    that is outside its image or thinner than 0.1 pixels, and those without a mask where masks are
    read, are dropped; one warning says how many. Those whose mask covers no pixel are no targets
    either.

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
        ValueError: the JSON is not in COCO's format; says what is wrong with which annotation.
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
        content = read_coco(self.path)
        self._categories = sorted(content["categories"], key=lambda category: category["id"])
        self.classes = [category["name"] for category in self._categories]
        self._sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
        self._instances = self._parse(content)
        self.instances = sum(not i.crowd for group in self._instances.values() for i in group)
        self._images = [
            image
            for image in content["images"]
            if keep_empty or any(not i.crowd for i in self._instances[image["id"]])
        ]
        check_images(self._images, self.folder, self.path)

    def _parse(self, content: dict[str, Any]) -> dict[Any, list[_Instance]]:
        labels = {category["id"]: i + 1 for i, category in enumerate(self._categories)}
        instances: dict[Any, list[_Instance]] = {image_id: [] for image_id in self._sizes}
        needed = ["image_id", "category_id", "bbox", *(["segmentation"] if self.masks else [])]
        dropped = 0
        for annotation in content["annotations"]:
            where = f"annotation {annotation.get('id')} of {self.path}"
            for key in needed:
                if key not in annotation:
                    raise ValueError(f"{where} has no {key!r}")
            if annotation["image_id"] not in instances:
                raise ValueError(f"{where} names the unknown image {annotation['image_id']!r}")
            if annotation["category_id"] not in labels:
                raise ValueError(
                    f"{where} names the unknown category {annotation['category_id']!r}"
                )
            box = clip_box(annotation["bbox"], *self._sizes[annotation["image_id"]])
            segmentation = _usable(annotation["segmentation"], where) if self.masks else None
            if box is None or (self.masks and segmentation is None):
                dropped += 1
                continue
            label, crowd = labels[annotation["category_id"]], bool(annotation.get("iscrowd", 0))
            instances[annotation["image_id"]].append(
                _Instance(box, label, segmentation, crowd, annotation)
            )
        if dropped:
            logger.warning(
                "dropped %d of %d annotations of %s: %sa box outside its image or thinner than %g "
                "pixels",
                dropped,
                len(content["annotations"]),
                self.path,
                "no mask, or " if self.masks else "",
                MIN_SIDE,
            )
        return instances

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        record = self._images[index]
        targets = [i for i in self._instances[record["id"]] if not i.crowd]
        target = {
            "boxes": torch.tensor([i.box for i in targets], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([i.label for i in targets], dtype=torch.int64),
        }
        if self.masks:
            masks = np.zeros((len(targets), record["height"], record["width"]), dtype=np.uint8)
            for mask, instance in zip(masks, targets, strict=True):
                mask[:] = self._decode(instance)
            visible = torch.from_numpy(masks.any((1, 2)))
            target["masks"] = torch.from_numpy(masks)
            target = {name: values[visible] for name, values in target.items()}
        return self.image(index), target

    def image(self, index: int) -> Tensor:
        """The image alone: [3, H, W] float32 in [0, 1].

        Raises:
            ValueError: it is not of the size that the JSON file says.
        """
        record = self._images[index]
        path = self.folder / record["file_name"]
        with Image.open(path) as file:
            pixels = np.array(ImageOps.exif_transpose(file).convert("RGB"))
        height, width = pixels.shape[:2]
        if (height, width) != (record["height"], record["width"]):
            raise ValueError(
                f"{path} is {width}×{height} pixels, "
                f"but {self.path} says {record['width']}×{record['height']}"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)

    def _decode(self, instance: _Instance) -> np.ndarray:
        _, _, mask = _pycocotools()
        image = self._sizes[instance.annotation["image_id"]]
        rle = instance.segmentation
        if isinstance(rle, list):
            rle = mask.merge(mask.frPyObjects(rle, *image))
        elif isinstance(rle["counts"], list):
            rle = mask.frPyObjects(rle, *rle["size"])
        if tuple(rle["size"]) != image:
            raise ValueError(
                f"annotation {instance.annotation.get('id')} of {self.path} has a mask of "
                f"{list(rle['size'])} rows and columns in an image of {list(image)}"
            )
        return mask.decode(rle)

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
            _, _, mask = _pycocotools()
            pixels = masks.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            encoded = mask.encode(np.asfortranarray(pixels))
            for result, rle in zip(results, encoded, strict=True):
                result["segmentation"] = {**rle, "counts": rle["counts"].decode()}
        return results

    def ground_truth(self) -> dict[str, Any]:
        """The annotations that predictions are scored against, crowds included, in COCO's format;
        see :func:`scorable`."""
        annotations = [i.annotation for image in self._images for i in self._instances[image["id"]]]
        return {
            "info": {},
            "images": self._images,
            "categories": self._categories,
            "annotations": scorable(annotations, self.masks)[0],
        }


def scorable(
    annotations: Sequence[dict[str, Any]], masks: bool
) -> tuple[list[dict[str, Any]], int]:
    """What pycocotools can score predictions against.

    Each annotation gets what pycocotools needs and files often lack: ``area`` (default: the box's)
    and ``iscrowd`` (default: 0). They are numbered afresh from 1, because pycocotools takes a match
    with annotation 0 for no match. Polygons of fewer than three points are left out.

    Args:
        annotations: in COCO's format; not changed.
        masks: whether masks are scored as well as boxes.

    Returns:
        The annotations that are kept, as new dictionaries, and how many are dropped: those without
        a box of positive width and height and, where masks are scored, those without a mask.

    Raises:
        ValueError: a run-length encoding lacks its counts or its size.
    """
    kept: list[dict[str, Any]] = []
    for annotation in annotations:
        box = annotation.get("bbox") or []
        if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
            continue
        scored = {
            **annotation,
            "id": len(kept) + 1,
            "iscrowd": int(bool(annotation.get("iscrowd"))),
        }
        if scored.get("area") is None:
            scored["area"] = box[2] * box[3]
        if masks:
            where = f"annotation {annotation.get('id')}"
            scored["segmentation"] = _usable(annotation.get("segmentation"), where)
            if scored["segmentation"] is None:
                continue
        kept.append(scored)
    return kept, len(annotations) - len(kept)


def average_precision(data: CocoInstances, results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """COCO's AP of predictions, as made by :meth:`CocoInstances.results`, on the scale 0–100.

    Returns:
        ``box_ap``, ``box_ap50`` and, where ``data`` has masks, ``mask_ap``, ``mask_ap50``.

    Raises:
        ImportError: pycocotools is missing.
        ValueError: the data set has no instance, so that AP is undefined.
    """
    coco, cocoeval, _ = _pycocotools()
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


def read_coco(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a COCO JSON file: lists of images, annotations and categories.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, a list or something in it is missing, it has no category, or two
            images or categories have one id.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no annotation file at {path}")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} is not in COCO's format: it has no list {key!r}")
    for kind, keys in _REQUIRED.items():
        for i, entry in enumerate(content[kind]):
            for key, types in keys.items():
                if not isinstance(entry, dict) or key not in entry:
                    raise ValueError(f"{path} is not in COCO's format: {kind}[{i}] has no {key!r}")
                if not isinstance(entry[key], types):
                    raise ValueError(
                        f"{path} is not in COCO's format: {kind}[{i}] has the {key} {entry[key]!r}"
                    )
    if not content["categories"]:
        raise ValueError(f"{path} has no category")
    for kind in ("images", "categories"):
        ids = [entry["id"] for entry in content[kind]]
        if len(set(ids)) < len(ids):
            twice = next(number for number in ids if ids.count(number) > 1)
            raise ValueError(f"{path} has several {kind} with the id {twice!r}")
    for annotation in content["annotations"]:
        where = f"annotation {annotation.get('id')} of {path}"
        box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
        if box is not None and not _is_numbers(box):
            raise ValueError(f"{where} has a bbox that is no list of numbers: {box!r}")
        if isinstance(segmentation, list) and not all(map(_is_numbers, segmentation)):
            raise ValueError(
                f"{where} has a segmentation that is no list of polygons [[x, y, …], …]"
            )
    return content


def check_images(
    records: Sequence[dict[str, Any]], folder: str | os.PathLike[str], path: str | os.PathLike[str]
) -> None:
    """Look for the files of the images that the JSON file ``path`` lists.

    Raises:
        FileNotFoundError: one is not in ``folder``.
    """
    for record in records:
        file = Path(folder) / record["file_name"]
        if not file.is_file():
            raise FileNotFoundError(
                f"no image at {file}, which {path} lists: its file names must be relative to the "
                "image folder"
            )


_REQUIRED: dict[str, dict[str, Any]] = {
    "images": {"id": object, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {},
}


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int | float) for v in values)


def clip_box(
    bbox: Sequence[float] | None, height: int, width: int
) -> tuple[float, float, float, float] | None:
    """COCO's [x, y, width, height] as corners within the image.

    None if there is none, or a side of what is left is shorter than :data:`MIN_SIDE`.
    """
    if bbox is None or len(bbox) != 4 or not all(math.isfinite(value) for value in bbox):
        return None
    x, y, w, h = bbox
    x1, x2 = (min(max(value, 0.0), float(width)) for value in (x, x + w))
    y1, y2 = (min(max(value, 0.0), float(height)) for value in (y, y + h))
    return (x1, y1, x2, y2) if min(x2 - x1, y2 - y1) >= MIN_SIDE else None


def _usable(segmentation: Any, where: str) -> Any:
    """The segmentation without polygons of fewer than three points; None if nothing is left."""
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(counts, str | list) or not isinstance(size, list) or len(size) != 2:
            raise ValueError(
                f"{where} has a run-length encoding without 'counts' or a 'size' [rows, columns]"
            )
        return segmentation if counts else None
    return [polygon for polygon in segmentation or () if len(polygon) >= 6] or None


def _pycocotools() -> tuple[Any, Any, Any]:
    try:
        from pycocotools import coco, cocoeval, mask
    except ImportError as error:
        raise ImportError(
            "COCO annotations need pycocotools: pip install 'e3va[torchvision]'"
        ) from error
    return coco, cocoeval, mask
