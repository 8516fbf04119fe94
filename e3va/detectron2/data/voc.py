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

from e3va.data.images import image_size
from e3va.data.voc import Object, read_xml
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
    Boxes are clipped to their images; those without width or height are dropped, and one warning
    says how many.

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
    splits = {split: tree[f"{split}_SPLIT"] for split in ("TRAIN", "TEST")}
    read = {name: _read_split(Path(root), name) for name in dict.fromkeys(splits.values()) if name}
    found = {box.name for records in read.values() for r in records for box in r["boxes"]}
    classes = list(tree.CLASSES) or sorted(found)
    if not found <= set(classes):
        unknown = ", ".join(sorted(found - set(classes)))
        raise ValueError(f"{root} has boxes of {unknown}, which DATASETS.VOC_TREE.CLASSES lacks")
    dropped = 0
    for records in read.values():
        for record in records:
            boxes = record.pop("boxes")
            usable = [_annotation(box, classes, record) for box in boxes]
            record["annotations"] = [a for a in usable if a]
            dropped += usable.count(None)
    if dropped:
        logger.warning("%s: dropped %d boxes without width or height", root, dropped)
    for split, name in splits.items():
        if not name:
            leave_out(cfg, split, f"DATASETS.VOC_TREE.{split}_SPLIT")
            continue
        register(
            cfg,
            split,
            f"voc_tree:{os.path.abspath(root)}:{name}",
            partial(list, read[name]),
            thing_classes=classes,
            dirname=root,
            split=name,
            year=2012,
            evaluator_type="voc_tree",
        )
    set_classes(cfg, classes, root, cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET)


def _read_split(root: Path, split: str) -> list[dict[str, Any]]:
    """Detectron2's records of a split, with raw "boxes" instead of annotations."""
    folders = {name: root / name for name in ("Annotations", "JPEGImages", "ImageSets/Main")}
    for folder in folders.values():
        if not folder.is_dir():
            raise FileNotFoundError(f"DATASETS.VOC_TREE.ROOT: no folder {str(folder)!r}")
    names = folders["ImageSets/Main"] / f"{split}.txt"
    if not names.is_file():
        known = ", ".join(sorted(file.stem for file in names.parent.glob("*.txt")))
        raise FileNotFoundError(f"no split {split!r} at {names}; known: {known or 'none'}")
    images = {file.stem: file for file in folders["JPEGImages"].iterdir()}
    records = []
    for name in filter(None, map(str.strip, names.read_text().splitlines())):
        if name not in images:
            folder = folders["JPEGImages"]
            raise FileNotFoundError(f"no image {name!r} in {folder}, but {names} lists it")
        xml = folders["Annotations"] / f"{name}.xml"
        size, boxes = read_xml(xml)
        height, width = size or image_size(images[name])
        records.append(
            {
                "file_name": str(images[name]),
                "image_id": name,
                "height": height,
                "width": width,
                "boxes": boxes,
            }
        )
    return records


def _annotation(box: Object, classes: list[str], record: dict[str, Any]) -> dict[str, Any] | None:
    """A box as Detectron2 has it, clipped to its image; None if it is empty.

    VOC counts pixels from 1 and includes the last.
    """
    xmin, ymin, xmax, ymax = box.corners
    xmin, ymin = max(xmin, 1.0), max(ymin, 1.0)
    xmax, ymax = min(xmax, float(record["width"])), min(ymax, float(record["height"]))
    if not (xmin < xmax and ymin < ymax):
        return None
    return {
        "category_id": classes.index(box.name),
        "bbox": [xmin - 1, ymin - 1, xmax, ymax],
        "bbox_mode": BoxMode.XYXY_ABS,
        "difficult": box.difficult,
    }


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
