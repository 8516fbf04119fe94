"""One's own data in COCO format."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from pycocotools import mask as masks

from e3va.data.coco_json import read_json
from e3va.data.instances import Instances
from e3va.detectron2.data.catalog import (
    DatasetFormat,
    expand_path,
    leave_out,
    register,
    set_classes,
)
from e3va.detectron2.evaluation import build_coco_evaluator

logger = logging.getLogger(__name__)

_SECTION = "COCO_JSON"
_KEYS = f"DATASETS.{_SECTION}"


def register_coco_json(cfg: CfgNode) -> None:
    """Register the data sets that cfg.DATASETS.COCO_JSON names, and make ``cfg`` use them.

    Sets DATASETS.TRAIN or DATASETS.TEST, or both, the number of classes and, where masks are
    run-length encodings, INPUT.MASK_FORMAT; without a TEST_JSON, nothing is evaluated. What cannot
    be trained on is dropped, see :func:`e3va.data.coco_json.read_json`; one warning says why.

    Raises:
        FileNotFoundError: a JSON, an image folder or an image is not there.
        ValueError: a file is no COCO data set, the two disagree about the categories, or there are
            no masks where they are trained.
    """
    splits: dict[str, Instances] = {}
    for split in ("TRAIN", "TEST"):
        json_file = expand_path(cfg, _SECTION, f"{split}_JSON")
        if not json_file:
            continue
        images = expand_path(cfg, _SECTION, f"{split}_IMAGES")
        images = images or os.path.dirname(os.path.abspath(json_file))
        if not os.path.isfile(json_file):
            raise FileNotFoundError(f"{_KEYS}.{split}_JSON: no file {json_file!r}")
        if not os.path.isdir(images):
            raise FileNotFoundError(f"{_KEYS}.{split}_IMAGES: no folder {images!r}")
        content = splits[split] = read_json(json_file, images, masks=cfg.MODEL.MASK_ON)
        content.warn(logger)
        if cfg.MODEL.MASK_ON and split == "TRAIN" and not content.has_masks:
            raise ValueError(
                f"{json_file} has no mask to train on: set MODEL.MASK_ON to False where there are "
                "boxes alone"
            )
        if any(isinstance(a.get("segmentation"), dict) for a in content.annotations):
            cfg.INPUT.MASK_FORMAT = "bitmask"  # which takes polygons, too
        numbers = {category["id"]: i for i, category in enumerate(content.categories)}
        register(
            cfg,
            split,
            f"coco_json:{os.path.abspath(json_file)}",
            partial(_records, content, numbers),
            thing_classes=content.classes,
            thing_dataset_id_to_contiguous_id=numbers,
            instances=content,
            evaluator_type="coco",
        )
    if not splits:
        return
    if "TEST" not in splits:
        leave_out(cfg, "TEST", f"{_KEYS}.TEST_JSON")
    first, *others = splits.values()
    for other in others:
        if other.classes != first.classes:
            raise ValueError(
                f"{first.source} and {other.source} must have the same categories, got "
                f"{first.classes} and {other.classes}"
            )
    set_classes(cfg, first.classes, first.source, cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET)


def _records(content: Instances, numbers: dict[Any, int]) -> list[dict[str, Any]]:
    """Detectron2's records of the images and what is on them."""
    records = {
        image["id"]: {
            "file_name": image["file_name"],
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        for image in content.images
    }
    for annotation in content.annotations:
        record = records[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        own = {
            "iscrowd": annotation["iscrowd"],
            "bbox": [x, y, x + w, y + h],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": numbers[annotation["category_id"]],
        }
        if "segmentation" in annotation:
            own["segmentation"] = _mask(annotation["segmentation"], record)
        record["annotations"].append(own)
    return list(records.values())


def _mask(segmentation: Any, record: dict[str, Any]) -> Any:
    """Run-length encodings as text, which alone Detectron2 takes."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        return masks.frPyObjects(segmentation, record["height"], record["width"])
    return segmentation


FORMAT = DatasetFormat(
    section=_SECTION,
    # A given JSON replaces DATASETS.TRAIN or DATASETS.TEST, and the number of classes is then taken
    # from it. IMAGES is the folder that the JSON's file names are relative to; empty: the folder of
    # the JSON. "~" and "$VARIABLE" are expanded.
    defaults={"TRAIN_JSON": "", "TRAIN_IMAGES": "", "TEST_JSON": "", "TEST_IMAGES": ""},
    given_by=("TRAIN_JSON", "TEST_JSON"),
    register=register_coco_json,
    evaluators={"coco": build_coco_evaluator},
)
