"""One's own semantic maps in ADE20K's layout."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from e3va.data.maps import UNLABELLED, look, pair, read_classes, read_map, read_values
from e3va.detectron2.data.catalog import (
    DatasetFormat,
    expand_path,
    leave_out,
    register,
    set_classes,
)
from e3va.detectron2.evaluation import build_semantic_evaluator

_SECTION = "SEMANTIC_MAPS"


def register_semantic_maps(cfg: CfgNode) -> None:
    """Register the maps that cfg.DATASETS.SEMANTIC_MAPS names, and make ``cfg`` use them.

    Sets DATASETS.TRAIN, DATASETS.TEST and the number of classes.

    Raises:
        FileNotFoundError: a folder, a map or the names of the classes are not there.
        ValueError: the values of the classes are not 1, 2, …, or are too many, or too few.
    """
    if cfg.MODEL.META_ARCHITECTURE != "SemanticSegmentor":
        raise ValueError(
            "DATASETS.SEMANTIC_MAPS needs MODEL.META_ARCHITECTURE SemanticSegmentor, "
            f"got {cfg.MODEL.META_ARCHITECTURE}"
        )
    maps = cfg.DATASETS.SEMANTIC_MAPS
    index = expand_path(cfg, _SECTION, "INDEX")
    if index:
        source, classes, values, splits = index, *_read_index(Path(index))
        names = {"TRAIN": "train", "TEST": "val"}
    else:
        source = expand_path(cfg, _SECTION, "ROOT")
        classes = list(maps.CLASSES) or _read_classes(Path(source) / "classes.csv")
        values = {value: value - 1 for value in range(1, len(classes) + 1)}
        names = {split: maps[f"{split}_SPLIT"] for split in ("TRAIN", "TEST")}
        splits = {name: _pair(Path(source), name) for name in names.values() if name}
    if not 2 <= len(classes) < UNLABELLED:
        raise ValueError(
            f"{source} has {len(classes)} classes: maps can be of 2 to {UNLABELLED - 1}; with one, "
            "every pixel would be of it"
        )
    for of_split in splits.values():
        if index:  # whose values were checked when it was written
            look(of_split)
        else:
            _check_values(of_split, len(classes))
    for split, name in names.items():
        if not name:
            leave_out(cfg, split, f"DATASETS.SEMANTIC_MAPS.{split}_SPLIT")
            continue
        register(
            cfg,
            split,
            f"semantic_maps:{os.path.abspath(source)}:{name}",
            partial(list, _records(splits[name], values)),
            stuff_classes=classes,
            ignore_label=UNLABELLED,
            values=values,
            evaluator_type="semantic_maps",
        )
    set_classes(cfg, classes, source, cfg.MODEL.SEM_SEG_HEAD)


def read_labels(path: str, values: Mapping[int, int] | None) -> np.ndarray:
    """The classes of a map [H, W], uint8, with 255 where a pixel is unlabelled.

    Args:
        path: the file.
        values: the class of each value; None: it has class k for k already, as Detectron2's own.

    Raises:
        ValueError: it has more than one number per pixel; names the file.
    """
    if values is None:
        return read_values(path).astype(np.uint8)
    return read_map(path, values)


def _read_index(path: Path) -> tuple[list[str], dict[int, int], dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = {int(value): int(index) for value, index in content["values"].items()}
        splits = {
            name: [(Path(image), Path(labels)) for image, labels in pairs]
            for name, pairs in content["splits"].items()
        }
        return list(content["classes"]), values, splits
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of maps: {error}") from error


def _read_classes(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no classes: there is no {path}, and DATASETS.SEMANTIC_MAPS.CLASSES is []"
        )
    names = read_classes(path)
    names.pop(0, None)  # however the file calls what is unlabelled
    if not names or sorted(names) != list(range(1, len(names) + 1)):
        raise ValueError(f"{path} must name the values 1, 2, …, got {sorted(names)}")
    return [names[value] for value in sorted(names)]


def _pair(root: Path, split: str) -> list[tuple[Path, Path]]:
    images, maps = root / "images" / split, root / "annotations" / split
    for folder in (images, maps):
        if not folder.is_dir():
            raise FileNotFoundError(f"DATASETS.SEMANTIC_MAPS.ROOT: no folder {str(folder)!r}")
    return pair(images, maps)


def _check_values(pairs: Sequence[tuple[Path, Path]], num_classes: int) -> None:
    labelled = False
    for (_, path), seen in zip(pairs, look(pairs), strict=True):
        values = seen - {0, UNLABELLED}
        labelled = labelled or bool(values)
        if values and max(values) > num_classes:
            raise ValueError(f"{path} has the value {max(values)} of {num_classes} classes")
    if not labelled:
        raise ValueError(
            f"no pixel of the maps beside {pairs[0][1]} is of a class: 0 and 255 are unlabelled "
            "(`e3va train` takes black and white maps as they are)"
        )


def _records(pairs: Iterable[tuple[Any, Any]], values: dict[int, int]) -> list[dict[str, Any]]:
    """Detectron2's records of images and their maps."""
    records = []
    for image, labels in pairs:
        records.append(
            {
                "file_name": str(image),
                "sem_seg_file_name": str(labels),
                "image_id": Path(image).stem,
                "values": values,
            }
        )
    return records


def _evaluator(cfg: CfgNode, dataset_name: str) -> SemSegEvaluator:
    values = MetadataCatalog.get(dataset_name).values
    return build_semantic_evaluator(cfg, dataset_name, partial(read_labels, values=values))


FORMAT = DatasetFormat(
    section=_SECTION,
    # ROOT holds images/SPLIT and annotations/SPLIT, whose maps of the same names say 0 where a
    # pixel is unlabelled and k where it is of the k-th class. CLASSES: empty, those of
    # ROOT/classes.csv (lines "value, name"). Or INDEX, a JSON file of the classes, of the class of
    # each value and of the pairs of files, as `e3va train` writes it.
    defaults={
        "INDEX": "",
        "ROOT": "",
        "TRAIN_SPLIT": "training",
        "TEST_SPLIT": "validation",
        "CLASSES": [],
    },
    given_by=("ROOT", "INDEX"),
    register=register_semantic_maps,
    evaluators={
        "semantic_maps": _evaluator,
        "sem_seg": lambda cfg, name: build_semantic_evaluator(
            cfg, name, partial(read_labels, values=None)
        ),
    },
)
