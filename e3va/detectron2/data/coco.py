"""One's own data in COCO format."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from e3va.data.coco import MIN_SIDE, check_images, clip_box, read_coco
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

    Sets DATASETS.TRAIN or DATASETS.TEST, or both, and the number of classes; without a TEST_JSON,
    nothing is evaluated. Annotations that cannot be trained on are dropped when the data are
    loaded: boxes that lie outside of their image or are thinner than 0.1 pixels, and, where masks
    are trained, instances without a mask.

    Raises:
        FileNotFoundError: a JSON, an image folder or an image is not there.
        ValueError: a file is no COCO data set, the two disagree about the categories, or there are
            no masks where they are trained, or such that do not fit INPUT.MASK_FORMAT.
    """
    categories: dict[str, list[str]] = {}
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
        content = read_coco(json_file)
        _check_annotations(content, json_file)
        check_images(content["images"], images, json_file)
        if split == "TRAIN" and cfg.MODEL.MASK_ON:
            _check_masks(content, json_file, cfg.INPUT.MASK_FORMAT)
        categories[json_file] = _names(content)
        name = f"coco_json:{os.path.abspath(json_file)}"
        register(
            cfg,
            split,
            name,
            partial(_load, name, json_file, images, cfg.MODEL.MASK_ON),
            json_file=json_file,
            image_root=images,
            evaluator_type="coco",
        )
    if not categories:
        return
    if not cfg.DATASETS.COCO_JSON.TEST_JSON:
        leave_out(cfg, "TEST", f"{_KEYS}.TEST_JSON")
    (first, names), *others = categories.items()
    for other, other_names in others:
        if other_names != names:
            raise ValueError(
                f"{first} and {other} must have the same categories, got {names} and {other_names}"
            )
    set_classes(cfg, names, first, cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET)


def _names(content: dict[str, Any]) -> list[str]:
    return [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]


def _check_annotations(content: dict[str, Any], json_file: str) -> None:
    ids = set()
    for annotation in content["annotations"]:
        where = f"annotation {annotation.get('id')} of {json_file}"
        for key in ("id", "image_id", "category_id", "bbox"):
            if annotation.get(key) is None:
                raise ValueError(f"{where} has no {key!r}")
        if annotation["id"] in ids:
            raise ValueError(f"{where} is not the only one with this id")
        ids.add(annotation["id"])


def _check_masks(content: dict[str, Any], json_file: str, mask_format: str) -> None:
    if not any(a.get("segmentation") for a in content["annotations"]):
        raise ValueError(
            f"{json_file} has no mask to train on: set MODEL.MASK_ON to False where there are "
            "boxes alone"
        )
    if mask_format == "polygon" and any(
        isinstance(a.get("segmentation"), dict) and not a.get("iscrowd")
        for a in content["annotations"]
    ):
        raise ValueError(
            f"{json_file} holds masks in run-length encoding: set INPUT.MASK_FORMAT to bitmask"
        )


def _load(name: str, json_file: str, images: str, masks: bool) -> list[dict[str, Any]]:
    """Detectron2's records of the data set, with boxes clipped to their images."""
    records = load_coco_json(json_file, images, name)
    empty = maskless = 0
    for record in records:
        usable = []
        for annotation in record["annotations"]:
            box = clip_box(annotation["bbox"], record["height"], record["width"])
            if box is None:
                empty += 1
            elif masks and "segmentation" not in annotation:
                maskless += 1
            else:
                annotation.update(bbox=list(box), bbox_mode=BoxMode.XYXY_ABS)
                usable.append(annotation)
        record["annotations"] = usable
    if empty or maskless:
        logger.warning(
            "%s: dropped %d instances whose box is outside of its image or thinner than %g pixels "
            "and %d without a mask",
            json_file,
            empty,
            MIN_SIDE,
            maskless,
        )
    return records


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
