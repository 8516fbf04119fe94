"""One's own semantic maps."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.data import DatasetCatalog

from e3va.detectron2 import Trainer
from e3va.detectron2.data.maps import read_labels
from tests.detectron2.factories import step, write_maps


def test_maps_of_every_kind(tmp_path):
    values = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)
    expected = [[255, 0, 1], [2, 255, 255]]
    palette = Image.fromarray(values, "L").convert("P")
    palette.putpalette(list(range(255, 255 - 3 * 64, -1)))
    palette.putdata(values.ravel().tolist())
    for image in (Image.fromarray(values), palette, Image.fromarray(values.astype(np.uint16))):
        image.save(tmp_path / "map.png")
        counted = {value: value - 1 for value in (1, 2, 3)}
        assert read_labels(tmp_path / "map.png", counted).tolist() == expected
        assert read_labels(tmp_path / "map.png", None).tolist() == values.tolist()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).save(tmp_path / "map.png")
    with pytest.raises(ValueError, match="mode RGB: a semantic map"):
        read_labels(tmp_path / "map.png", None)


def test_bad_semantic_maps(semantic, tmp_path):
    root = write_maps(tmp_path / "maps")
    assert semantic(root, classes=["x", "y", "z"]).MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    (root / "classes.csv").write_text("1,a\n3,b\n")
    with pytest.raises(ValueError, match=r"must name the values 1, 2, …, got \[1, 3\]"):
        semantic(root)
    (root / "classes.csv").unlink()
    with pytest.raises(FileNotFoundError, match="no classes"):
        semantic(root)
    with pytest.raises(ValueError, match="255 classes: maps can be of 2 to 254"):
        semantic(root, classes=[str(i) for i in range(255)])
    with pytest.raises(ValueError, match=r"1 classes: .* every pixel would be of it"):
        semantic(root, classes=["x"])
    with pytest.raises(ValueError, match=r"\.png has the value 3 of 2 classes"):
        semantic(root, classes=["x", "y"])
    with pytest.raises(ValueError, match=r"needs MODEL.META_ARCHITECTURE SemanticSegmentor"):
        semantic(root, classes=["x"], **{"MODEL.META_ARCHITECTURE": "RetinaNet"})
    (root / "annotations/validation/0.png").unlink()
    with pytest.raises(FileNotFoundError, match="no map at"):
        semantic(root, classes=["x", "y", "z"])
    with pytest.raises(FileNotFoundError, match="no folder"):
        semantic(tmp_path / "nowhere", classes=["x", "y"])


def test_predictions_of_an_image_without_labels(semantic):
    """Its loss is 0, not undefined."""
    cfg = semantic()
    for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0]):
        Image.new("L", (48, 40)).save(record["sem_seg_file_name"])
    losses = step(Trainer(cfg))
    assert losses["total_loss"][0] == 0
