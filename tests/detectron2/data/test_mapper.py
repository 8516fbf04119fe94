"""Crops, colours and what they leave alone."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T

from e3va.detectron2 import load_config
from e3va.detectron2.data.mapper import InstanceCrop, SemanticMapper, build_mapper
from tests.detectron2.factories import FOLDER


def test_half_of_the_images_are_cropped():
    """As DETR's are: resized, cropped, then resized once more."""
    cfg = load_config(str(FOLDER / "coco/cascade_mask_rcnn_e3va_swin_t_3x.yaml"))
    mapper = build_mapper(cfg, True)
    crops = 0
    for _ in range(60):
        image = T.AugInput(np.zeros((300, 500, 3), np.uint8))
        transforms = mapper.augmentations(image).transforms
        crops += any(isinstance(t, T.CropTransform) for t in transforms)
        assert 480 <= min(image.image.shape[:2]) <= 800 or max(image.image.shape[:2]) == 1333
    assert 15 < crops < 45
    assert not any(
        isinstance(a, T.RandomApply) for a in build_mapper(cfg, False).augmentations.augs
    )


def test_crops_move_polygons():
    """And do not cut them, which Detectron2 does with a library that may not be there."""
    image = T.AugInput(np.zeros((60, 80, 3), np.uint8))
    crop = InstanceCrop("absolute", (20, 30))(image)
    assert image.image.shape == (20, 30, 3)
    polygon = np.array([[0.0, 0.0], [80.0, 0.0], [40.0, 60.0]])
    (moved,) = crop.apply_polygons([polygon])
    np.testing.assert_array_equal(moved, polygon - [crop.x0, crop.y0])


def test_semantic_training_crops(semantic):
    crop = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [32, 24]}
    cfg = semantic(**crop, **{"INPUT.MIN_SIZE_TRAIN": (40,)})
    (record, _) = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    sample = SemanticMapper(cfg, True)(record)
    assert sample["image"].shape == (3, 32, 24)
    assert sample["sem_seg"].shape == (32, 24)
    assert set(sample["sem_seg"].unique().tolist()) <= {0, 1, 2, 255}
    assert "sem_seg" not in SemanticMapper(cfg, False)(record)
    with Image.open(record["sem_seg_file_name"]) as file:
        file.resize((20, 20)).save(record["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"is 20×20 pixels, but .* is 48×40"):
        SemanticMapper(cfg, True)(record)


def test_colour_jitter(semantic):
    """Each of the three factors, found again in what is left of three colours, is drawn from 0.5 to
    1.5 for every other training image; maps and test images stay as they are."""
    as_it_is = {"INPUT.MIN_SIZE_TRAIN": (0,), "INPUT.MIN_SIZE_TEST": 0, "INPUT.RANDOM_FLIP": "none"}
    cfg = semantic(**as_it_is)
    (record, _) = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    pixels = np.full((40, 48, 3), 80, np.uint8)
    pixels[10:20], pixels[20:, :, 0] = 120, 120
    Image.fromarray(pixels).save(record["file_name"], "PNG")
    plain = SemanticMapper(cfg, True)(record)
    cfg.INPUT.COLOR_JITTER = 0.5
    mapper = SemanticMapper(cfg, True)
    np.random.seed(0)
    factors = []
    for _ in range(100):
        sample = mapper(record)
        assert torch.equal(sample["sem_seg"], plain["sem_seg"])
        assert sample["image"].dtype == torch.uint8
        assert sample["image"].shape == plain["image"].shape
        dark, bright, red = sample["image"][:, (5, 15, 25), 0].T.int().tolist()
        assert max(dark) - min(dark) <= 1  # grey stays grey
        spread = (bright[0] - dark[0]) / 40
        brightness = spread + (dark[0] - 80 * spread) / pixels.mean()
        factors.append((brightness, spread / brightness, (red[0] - red[1]) / 40 / spread))
    for factor in np.array(factors).T:
        assert 0.4 < factor.min() < 0.7 and 1.3 < factor.max() < 1.6
        assert 35 < np.sum(abs(factor - 1) < 0.1) < 85
    assert (SemanticMapper(cfg, False)(record)["image"].numpy() == pixels.transpose(2, 0, 1)).all()
    cfg.INPUT.COLOR_JITTER = 1.5
    with pytest.raises(ValueError, match=r"INPUT.COLOR_JITTER must be in \[0, 1\], got 1.5"):
        SemanticMapper(cfg, True)
