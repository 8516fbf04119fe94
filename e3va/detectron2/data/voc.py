"""One's own boxes in a Pascal VOC tree."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import BoxMode

from e3va.data.instances import Instances
from e3va.data.voc import read_tree
from e3va.detectron2.data.catalog import (
    DatasetFormat,
    expand_path,
    leave_out,
    register,
    set_classes,
)
from e3va.detectron2.evaluation import VOCTreeEvaluator

logger = logging.getLogger(__name__)

_SECTION = "VOC_TREE"


def register_voc_tree(cfg: CfgNode) -> None:
    """Register the splits of the tree that cfg.DATASETS.VOC_TREE names, and make ``cfg`` use them.

    Sets DATASETS.TRAIN, DATASETS.TEST and the number of classes; does nothing without a ROOT.
    Boxes are clipped to their images, and those outside of them or without width or height
    dropped, as :meth:`e3va.data.instances.Instances.add` does; warnings say how many.

    Raises:
        FileNotFoundError: the tree lacks a folder, a split, an annotation or an image.
        ValueError: an XML file is broken or names an unknown class, or masks are asked for.
    """
    root = expand_path(cfg, _SECTION, "ROOT")
    if not root:
        return
    tree = cfg.DATASETS.VOC_TREE
    if cfg.MODEL.MASK_ON:
        raise ValueError("DATASETS.VOC_TREE has boxes and no masks: set MODEL.MASK_ON to False")
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        if not os.path.isdir(os.path.join(root, folder)):
            raise FileNotFoundError(
                f"DATASETS.VOC_TREE.ROOT: no folder {os.path.join(root, folder)!r}"
            )
    splits = {split: tree[f"{split}_SPLIT"] for split in ("TRAIN", "TEST")}
    read = read_tree(root, list(dict.fromkeys(filter(None, splits.values()))))
    found = next(iter(read.values())).classes
    classes = list(tree.CLASSES) or found
    if not set(found) <= set(classes):
        unknown = ", ".join(sorted(set(found) - set(classes)))
        raise ValueError(f"{root} has boxes of {unknown}, which DATASETS.VOC_TREE.CLASSES lacks")
    for content in read.values():
        content.warn(logger)
    for split, name in splits.items():
        if not name:
            leave_out(cfg, split, f"DATASETS.VOC_TREE.{split}_SPLIT")
            continue
        register(
            cfg,
            split,
            f"voc_tree:{os.path.abspath(root)}:{name}",
            partial(_records, read[name], classes),
            thing_classes=classes,
            dirname=root,
            split=name,
            year=2012,
            evaluator_type="voc_tree",
        )
    set_classes(cfg, classes, root, cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET)


def _records(content: Instances, classes: list[str]) -> list[dict[str, Any]]:
    """Detectron2's records of a split; what is difficult is trained on, as its own VOC's is, and
    not scored."""
    records: dict[int, dict[str, Any]] = {
        image["id"]: {
            "file_name": image["file_name"],
            "image_id": Path(image["file_name"]).stem,
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
        for image in content.images
    }
    names = {category["id"]: category["name"] for category in content.categories}
    for annotation in content.annotations:
        x, y, w, h = annotation["bbox"]
        records[annotation["image_id"]]["annotations"].append(
            {
                "category_id": classes.index(names[annotation["category_id"]]),
                "bbox": [x, y, x + w, y + h],
                "bbox_mode": BoxMode.XYXY_ABS,
                "difficult": bool(annotation["iscrowd"]),
            }
        )
    return list(records.values())


FORMAT = DatasetFormat(
    section=_SECTION,
    # ROOT holds Annotations, ImageSets/Main and JPEGImages. A given ROOT replaces DATASETS.TRAIN
    # and DATASETS.TEST by its splits, those of ImageSets/Main; an empty TEST_SPLIT: nothing is
    # evaluated. CLASSES: empty, those that the XML files name, in alphabetical order.
    defaults={"ROOT": "", "TRAIN_SPLIT": "train", "TEST_SPLIT": "val", "CLASSES": []},
    given_by=("ROOT",),
    register=register_voc_tree,
    evaluators={
        "voc_tree": lambda cfg, name: VOCTreeEvaluator(name),
        "pascal_voc": lambda cfg, name: PascalVOCDetectionEvaluator(name),
    },
)
