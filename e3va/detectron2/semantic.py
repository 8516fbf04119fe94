"""Semantic segmentation: one's own maps, training crops, tests on windows and at several sizes."""

from __future__ import annotations

import copy
import csv
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.evaluation import SemSegEvaluator
from detectron2.modeling import DatasetMapperTTA
from detectron2.modeling.postprocessing import sem_seg_postprocess
from fvcore.transforms.transform import HFlipTransform
from PIL import Image
from torch import Tensor, nn

from e3va.detectron2.catalog import register
from e3va.detectron2.config import expand_path

logger = logging.getLogger(__name__)

UNLABELLED = 255
"""Label of the pixels that neither train nor count."""

_IMAGES = (".jpg", ".jpeg", ".png")


def register_semantic_maps(cfg: CfgNode) -> None:
    """Register the maps that cfg.DATASETS.SEMANTIC_MAPS names, and make ``cfg`` use them.

    Sets DATASETS.TRAIN, DATASETS.TEST and the number of classes; does nothing without a ROOT.

    Raises:
        FileNotFoundError: a folder, a map or the names of the classes are not there.
        ValueError: the values of the classes are not 1, 2, …, or are too many.
    """
    root = expand_path(cfg, "SEMANTIC_MAPS", "ROOT")
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
    names = []
    for split in (maps.TRAIN_SPLIT, maps.TEST_SPLIT):
        if not split:
            logger.warning("no DATASETS.SEMANTIC_MAPS.TEST_SPLIT: nothing is evaluated")
            continue
        records = _pair(Path(root), split, len(classes))
        name = f"semantic_maps:{os.path.abspath(root)}:{split}"
        register(
            name,
            partial(list, records),
            stuff_classes=classes,
            ignore_label=UNLABELLED,
            evaluator_type="semantic_maps",
        )
        names.append(name)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(names[:1]), tuple(names[1:])
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(classes)
    cfg.DATASETS.CLASSES = classes
    logger.info("%d classes in %s: %s", len(classes), root, ", ".join(classes))


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


class SemanticMapper:
    """Makes a model's input of a record: resized, cropped (INPUT.CROP), flipped, in other colours
    (INPUT.COLOR_JITTER).

    Args:
        cfg: the config.
        is_train: for training; else the image is resized for testing, without its map.

    Raises:
        ValueError: INPUT.COLOR_JITTER is out of range.
    """

    def __init__(self, cfg: CfgNode, is_train: bool) -> None:
        self._format = cfg.INPUT.FORMAT
        self._is_train = is_train
        augmentations = utils.build_augmentation(cfg, is_train)  # resizes, then flips
        crop = cfg.INPUT.CROP
        if is_train and crop.ENABLED:
            area = crop.SINGLE_CATEGORY_MAX_AREA
            augmentations.insert(
                1, T.RandomCrop_CategoryAreaConstraint(crop.TYPE, crop.SIZE, area, UNLABELLED)
            )
        jitter = cfg.INPUT.COLOR_JITTER
        if not 0 <= jitter <= 1:
            raise ValueError(f"INPUT.COLOR_JITTER must be in [0, 1], got {jitter}")
        if is_train and jitter:
            augmentations += [
                T.RandomApply(change(1 - jitter, 1 + jitter), prob=0.5)
                for change in (T.RandomBrightness, T.RandomContrast, T.RandomSaturation)
            ]
        self._augmentations = T.AugmentationList(augmentations)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = copy.deepcopy(record)
        image = utils.read_image(record["file_name"], self._format)
        utils.check_image_size(record, image)
        path, labels = record.pop("sem_seg_file_name"), None
        if self._is_train:
            labels = read_map(path, record.get("num_classes"))
            if labels.shape != image.shape[:2]:
                raise ValueError(
                    f"{path} is {labels.shape[1]}×{labels.shape[0]} pixels, but "
                    f"{record['file_name']} is {image.shape[1]}×{image.shape[0]}"
                )
        augmented = T.AugInput(image, sem_seg=labels)
        self._augmentations(augmented)
        channels_first = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        record["image"] = torch.from_numpy(channels_first)
        if self._is_train:
            record["sem_seg"] = torch.from_numpy(augmented.sem_seg.astype(np.int64))
        return record


def build_semantic_evaluator(cfg: CfgNode, dataset_name: str) -> SemSegEvaluator:
    """Detectron2's mIoU of a registered data set, its own ones or one of SEMANTIC_MAPS."""
    meta = MetadataCatalog.get(dataset_name)
    num_classes = len(meta.stuff_classes) if meta.evaluator_type == "semantic_maps" else None
    return SemSegEvaluator(
        dataset_name,
        output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
        sem_seg_loading_fn=lambda path, dtype: read_map(path, num_classes).astype(dtype),
    )


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


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin; the last one ends with the image."""
    last = max(0, size - window)
    return [*range(0, last, stride), last]


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
