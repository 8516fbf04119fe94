"""One's own data, named by config keys: in COCO format here, the rest beside."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import build_augmentation
from detectron2.structures import BoxMode

from e3va.data.coco import MIN_SIDE, check_images, clip_box, read_coco
from e3va.detectron2.catalog import register
from e3va.detectron2.config import expand_path
from e3va.detectron2.semantic import SemanticMapper, register_semantic_maps
from e3va.detectron2.voc import register_voc_tree

logger = logging.getLogger(__name__)

_KEYS = "DATASETS.COCO_JSON"


def register_datasets(cfg: CfgNode) -> None:
    """Register the data sets that cfg.DATASETS.COCO_JSON, VOC_TREE or SEMANTIC_MAPS names, and
    make ``cfg`` use them and their number of classes.

    Raises:
        FileNotFoundError: something that they name is not there.
        ValueError: more than one of the three is given, or its content is not what it should be.
    """
    data = cfg.DATASETS
    given = {
        "COCO_JSON": data.COCO_JSON.TRAIN_JSON or data.COCO_JSON.TEST_JSON,
        "VOC_TREE": data.VOC_TREE.ROOT,
        "SEMANTIC_MAPS": data.SEMANTIC_MAPS.ROOT,
    }
    names = [f"DATASETS.{section}" for section, path in given.items() if path]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are both given: give one")
    register_coco_json(cfg)
    register_voc_tree(cfg)
    register_semantic_maps(cfg)


def build_mapper(cfg: CfgNode, is_train: bool) -> DatasetMapper | SemanticMapper:
    """What makes a model's input of a record of a data set."""
    if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        return SemanticMapper(cfg, is_train)
    crop = cfg.INPUT.CROP
    if not (is_train and crop.ENABLED and crop.RESIZE):
        return DatasetMapper(cfg, is_train)
    resized_crop = [
        T.ResizeShortestEdge(crop.RESIZE, sample_style="choice"),
        InstanceCrop(crop.TYPE, crop.SIZE),
    ]
    augmentations = [
        T.RandomApply(T.AugmentationList(resized_crop), prob=0.5),
        *build_augmentation(cfg, is_train),
    ]
    # Polygons that reach out of the crop would have boxes that do.
    return DatasetMapper(cfg, is_train, augmentations=augmentations, recompute_boxes=False)


class InstanceCrop(T.RandomCrop):
    """Detectron2's random crop, except that polygons are moved and not cut, which would take
    shapely: boxes are cut, and beyond them masks are never looked at."""

    def get_transform(self, image: np.ndarray) -> T.CropTransform:
        crop = super().get_transform(image)
        return _MovingCrop(crop.x0, crop.y0, crop.w, crop.h)


class _MovingCrop(T.CropTransform):
    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        return [self.apply_coords(polygon.copy()) for polygon in polygons]


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
        json_file = expand_path(cfg, "COCO_JSON", f"{split}_JSON")
        if not json_file:
            continue
        images = expand_path(cfg, "COCO_JSON", f"{split}_IMAGES")
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
            name,
            partial(_load, name, json_file, images, cfg.MODEL.MASK_ON),
            json_file=json_file,
            image_root=images,
            evaluator_type="coco",
        )
        setattr(cfg.DATASETS, split, (name,))
    if not categories:
        return
    if not cfg.DATASETS.COCO_JSON.TEST_JSON:
        logger.warning("no %s.TEST_JSON: nothing is evaluated", _KEYS)
        cfg.DATASETS.TEST = ()
    (first, names), *others = categories.items()
    for other, other_names in others:
        if other_names != names:
            raise ValueError(
                f"{first} and {other} must have the same categories, got {names} and {other_names}"
            )
    for head in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        head.NUM_CLASSES = len(names)
    cfg.DATASETS.CLASSES = names
    logger.info("%d classes, from %s: %s", len(names), first, ", ".join(names))


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
