"""What makes a model's input of a record: images cropped and flipped, with instances or maps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from e3va.data.images import read_image
from e3va.data.maps import UNLABELLED
from e3va.detectron2.data.maps import read_labels


def build_mapper(cfg: CfgNode, is_train: bool) -> DatasetMapper | SemanticMapper:
    """What makes a model's input of a record of a data set, whatever its format."""
    if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        return SemanticMapper(cfg, is_train)
    crop = cfg.INPUT.CROP
    if not (is_train and crop.ENABLED and crop.RESIZE):
        return InstanceMapper(cfg, is_train)
    resized_crop = [
        T.ResizeShortestEdge(crop.RESIZE, sample_style="choice"),
        InstanceCrop(crop.TYPE, crop.SIZE),
    ]
    augmentations = [
        T.RandomApply(T.AugmentationList(resized_crop), prob=0.5),
        *utils.build_augmentation(cfg, is_train),
    ]
    # Polygons that reach out of the crop would have boxes that do.
    return InstanceMapper(cfg, is_train, augmentations=augmentations, recompute_boxes=False)


def read_pixels(path: str, image_format: str) -> np.ndarray:
    """An image [H, W, 3], uint8, as a config's INPUT.FORMAT has it, see
    :func:`e3va.data.images.read_image`."""
    if image_format not in ("RGB", "BGR"):
        return utils.read_image(path, image_format)
    pixels = read_image(path)
    return np.ascontiguousarray(pixels[..., ::-1]) if image_format == "BGR" else pixels


class InstanceMapper(DatasetMapper):
    """Detectron2's mapper, but that images of any kind are read as they are meant."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = copy.deepcopy(record)
        image = read_pixels(record["file_name"], self.image_format)
        utils.check_image_size(record, image)
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        shape = augmented.image.shape[:2]
        channels_first = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        record["image"] = torch.from_numpy(channels_first)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, shape)
        return record


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
        image = read_pixels(record["file_name"], self._format)
        utils.check_image_size(record, image)
        path, labels = record.pop("sem_seg_file_name"), None
        if self._is_train:
            labels = read_labels(path, record.get("values"))
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


class InstanceCrop(T.RandomCrop):
    """Detectron2's random crop, except that polygons are moved and not cut, which would take
    shapely: boxes are cut, and beyond them masks are never looked at."""

    def get_transform(self, image: np.ndarray) -> T.CropTransform:
        crop = super().get_transform(image)
        return _MovingCrop(crop.x0, crop.y0, crop.w, crop.h)


class _MovingCrop(T.CropTransform):
    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        return [self.apply_coords(polygon.copy()) for polygon in polygons]
