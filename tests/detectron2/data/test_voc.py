"""One's own boxes in a Pascal VOC tree."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.data import DatasetCatalog

from e3va.detectron2 import Trainer
from tests.detectron2.factories import write_voc


def test_degenerate_boxes_are_dropped_and_told(voc, tmp_path, caplog):
    boxes = [
        ("a", 5, 6, 30, 40, 0),
        ("a", 5, 6, 5, 40, 0),
        ("a", 5, 46, 30, 40, 0),
        ("a", 80, 6, 99, 40, 0),  # outside
        ("a", -4, 6, 75.5, 60, 0),  # clipped
    ]
    cfg = voc(write_voc(tmp_path / "odd", boxes))
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    assert [a["bbox"] for a in records[0]["annotations"]] == [[4, 5, 30, 40], [0, 5, 70, 50]]
    Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    warnings = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert len(warnings) == 2  # one for each split
    for text in warnings:
        assert "(2: box without width or height, such as object 2 of " in text
        assert "; 1: box outside its image" in text and "clipped 1 boxes to their images" in text


def test_bad_trees(voc, tmp_path):
    root = write_voc(tmp_path / "voc")
    key = "DATASETS.VOC_TREE"
    with pytest.raises(FileNotFoundError, match=r"no split 'test' .*; known: train, val"):
        voc(root, **{f"{key}.TEST_SPLIT": "test"})
    with pytest.raises(ValueError, match=r"has boxes of red car, which .* lacks"):
        voc(root, classes=["N/A"])
    with pytest.raises(ValueError, match=r"set MODEL.MASK_ON to False"):
        voc(root, **{"MODEL.MASK_ON": True})
    with pytest.raises(ValueError, match="both given"):
        voc(root, **{"DATASETS.COCO_JSON.TRAIN_JSON": "a.json"})
    with pytest.raises(FileNotFoundError, match="no folder"):
        voc(tmp_path / "nowhere")
    assert voc(root, **{f"{key}.TEST_SPLIT": ""}).DATASETS.TEST == ()
    (root / "Annotations/c.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(ValueError, match=r"c\.xml is no annotation of Pascal VOC"):
        voc(root)
    (root / "Annotations/c.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"no annotation file at .*c\.xml"):
        voc(root)
    (root / "JPEGImages/a b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="no image 'a b'"):
        voc(root)
