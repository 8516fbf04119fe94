"""One's own semantic maps in ADE20K's layout."""

from __future__ import annotations

import csv
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from e3va.detectron2.data.catalog import (
    DatasetFormat,
    expand_path,
    leave_out,
    register,
    set_classes,
)
from e3va.detectron2.evaluation import build_semantic_evaluator

UNLABELLED = 255
"""Label of the pixels that neither train nor count."""

_SECTION = "SEMANTIC_MAPS"
_IMAGES = (".jpg", ".jpeg", ".png")


def register_semantic_maps(cfg: CfgNode) -> None:
    """Register the maps that cfg.DATASETS.SEMANTIC_MAPS names, and make ``cfg`` use them.

    Sets DATASETS.TRAIN, DATASETS.TEST and the number of classes; does nothing without a ROOT.

    Raises:
        FileNotFoundError: a folder, a map or the names of the classes are not there.
        ValueError: the values of the classes are not 1, 2, …, or are too many.
    """
    root = expand_path(cfg, _SECTION, "ROOT")
    if not root:
        return
    maps = cfg.DATASETS.SEMANTIC_MAPS
    if cfg.MODEL.META_ARCHITECTURE != "SemanticSegmentor":
        raise ValueError(
            "DATASETS.SEMANTIC_MAPS needs MODEL.META_ARCHITECTURE SemanticSegmentor, "
            f"got {cfg.MODEL.META_ARCHITECTURE}"
        )
    classes = list(maps.CLASSES) or _read_classes(Path(root) / "classes.csv")
    if len(classes) >= UNLABELLED:
        raise ValueError(f"{root} has {len(classes)} classes: at most {UNLABELLED - 1} fit a map")
    for split in ("TRAIN", "TEST"):
        name = maps[f"{split}_SPLIT"]
        if not name:
            leave_out(cfg, split, f"DATASETS.SEMANTIC_MAPS.{split}_SPLIT")
            continue
        register(
            cfg,
            split,
            f"semantic_maps:{os.path.abspath(root)}:{name}",
            partial(list, _pair(Path(root), name, len(classes))),
            stuff_classes=classes,
            ignore_label=UNLABELLED,
            evaluator_type="semantic_maps",
        )
    set_classes(cfg, classes, root, cfg.MODEL.SEM_SEG_HEAD)


def read_map(path: str | os.PathLike[str], num_classes: int | None = None) -> np.ndarray:
    """A semantic map [H, W], uint8, with 255 where a pixel is unlabelled.

    Args:
        path: an image of one number per pixel, of a palette or grey.
        num_classes: how many classes a map has whose 0 is unlabelled and whose k is class k - 1.
            None: the map has class k for k already.

    Raises:
        ValueError: it has more than one number per pixel, or one that is no class.
    """
    with Image.open(path) as file:
        labels = np.array(file)
    if labels.ndim != 2:
        raise ValueError(f"{path} is {file.mode}: a semantic map has one class number per pixel")
    if num_classes is None:
        return labels.astype(np.uint8)
    labelled = (labels != 0) & (labels != UNLABELLED)
    if (labels[labelled] > num_classes).any():
        raise ValueError(f"{path} has the value {labels[labelled].max()} of {num_classes} classes")
    return np.where(labelled, labels.astype(np.int64) - 1, UNLABELLED).astype(np.uint8)


def _read_classes(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no classes: there is no {path}, and DATASETS.SEMANTIC_MAPS.CLASSES is []"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file, skipinitialspace=True) if len(row) >= 2]
    names = {int(row[0]): row[1].strip() for row in rows if row[0].strip().isdigit()}
    names.pop(0, None)  # however the file calls what is unlabelled
    if not names or sorted(names) != list(range(1, len(names) + 1)):
        raise ValueError(f"{path} must name the values 1, 2, …, got {sorted(names)}")
    return [names[value] for value in sorted(names)]


def _pair(root: Path, split: str, num_classes: int) -> list[dict[str, Any]]:
    """Detectron2's records of the images of a split and their maps."""
    images, maps = root / "images" / split, root / "annotations" / split
    for folder in (images, maps):
        if not folder.is_dir():
            raise FileNotFoundError(f"DATASETS.SEMANTIC_MAPS.ROOT: no folder {str(folder)!r}")
    records = []
    for image in sorted(images.iterdir()):
        if image.suffix.lower() not in _IMAGES:
            continue
        path = maps / f"{image.stem}.png"
        if not path.is_file():
            raise FileNotFoundError(f"no map at {path} for the image {image}")
        records.append(
            {
                "file_name": str(image),
                "sem_seg_file_name": str(path),
                "image_id": image.stem,
                "num_classes": num_classes,
            }
        )
    if not records:
        raise FileNotFoundError(f"no images in {images}")
    return records


def _evaluator(cfg: CfgNode, dataset_name: str) -> SemSegEvaluator:
    num_classes = len(MetadataCatalog.get(dataset_name).stuff_classes)
    return build_semantic_evaluator(cfg, dataset_name, partial(read_map, num_classes=num_classes))


FORMAT = DatasetFormat(
    section=_SECTION,
    # ROOT holds images/SPLIT and annotations/SPLIT, whose maps of the same names say 0 where a
    # pixel is unlabelled and k where it is of the k-th class. CLASSES: empty, those of
    # ROOT/classes.csv (lines "value, name").
    defaults={"ROOT": "", "TRAIN_SPLIT": "training", "TEST_SPLIT": "validation", "CLASSES": []},
    given_by=("ROOT",),
    register=register_semantic_maps,
    evaluators={
        "semantic_maps": _evaluator,
        "sem_seg": lambda cfg, name: build_semantic_evaluator(cfg, name, read_map),
    },
)
