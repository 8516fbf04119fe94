"""One's own data in COCO format."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.data import DatasetCatalog, MetadataCatalog

from e3va.detectron2 import Trainer, load_config, register_coco_json
from tests.detectron2.factories import CLASSES, DIGITS, overrides, polygon, step, write_coco


def test_classes_come_from_the_json(tiny):
    cfg = tiny("MODEL.ROI_HEADS.NUM_CLASSES", 80)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 2
    assert cfg.DATASETS.CLASSES == ["red", "green"]
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    assert MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes == ["red", "green"]
    assert [a["category_id"] for r in records for a in r["annotations"]] == [1, 0, 1]


def test_data_sets_are_those_of_the_config_without_json(tiny):
    cfg = tiny("DATASETS.COCO_JSON.TRAIN_JSON", "", "DATASETS.TRAIN", ("coco_2017_train",))
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert cfg.DATASETS.TEST[0].startswith("coco_json:")


def test_unusable_annotations_are_dropped_and_counted(tmp_path, caplog):
    """Images 0 and 1 are 70x50 and 33x64."""
    square = [polygon(5, 5, 9, 9)]
    annotations = [
        (0, 3, [5, 5, 9, 9], square),
        (0, 3, [60, -4, 20, 14], [polygon(60, -4, 20, 14)]),  # clipped
        (0, 3, [5, 5, 0, 9], square),  # empty
        (0, 3, [5, 5, 9, -9], square),  # inside out
        (0, 3, [90, 5, 9, 9], [polygon(90, 5, 9, 9)]),  # outside
        (0, 3, [float("nan"), 5, 9, 9], square),
        (0, 7, [5, 5, 9, 9], []),  # no mask
        (1, 7, [5, 5, 0, 0], square),  # all that this image has
    ]
    cfg = load_config(DIGITS, overrides(tmp_path, write_coco(tmp_path, annotations)))
    register_coco_json(cfg)
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    assert [a["bbox"] for a in records[0]["annotations"]] == [[5, 5, 14, 14], [60, 0, 70, 10]]
    assert not records[1]["annotations"]
    # Both splits are of this file.
    (warning,) = {r.getMessage() for r in caplog.records if r.name == "e3va.detectron2.data.coco"}
    assert "dropped 6 of 8 instances" in warning
    assert "1: no mask" in warning and "clipped 1 boxes" in warning

    cfg.SOLVER.MAX_ITER = 1
    assert all(np.isfinite(value) for value, _ in step(Trainer(cfg)).values())


def test_bad_data_sets(tmp_path):
    good = write_coco(tmp_path / "good")

    def fails(error, message, *more, train=good, test=None):
        cfg = load_config(DIGITS, overrides(tmp_path, train, *more, test=test))
        with pytest.raises(error, match=message):
            register_coco_json(cfg)

    fails(
        FileNotFoundError, r"TRAIN_JSON: no file '.*nowhere\.json'", train=tmp_path / "nowhere.json"
    )
    key = "DATASETS.COCO_JSON.TEST_IMAGES"
    fails(FileNotFoundError, "TEST_IMAGES: no folder 'nowhere'", key, "nowhere")
    fails(
        ValueError, "environment variable is not set", train=Path("$E3VA_NO_SUCH_VARIABLE/a.json")
    )
    fails(ValueError, "same categories", test=write_coco(tmp_path / "one", [], CLASSES[:1]))

    text = tmp_path / "text.json"
    text.write_text("{'a': 1}")
    fails(ValueError, r"text\.json is not valid JSON", train=text)
    other = tmp_path / "other.json"
    other.write_text('{"images": [{}]}')
    fails(ValueError, "no list 'annotations'", train=other)

    rle = {"size": [50, 70], "counts": "PP1"}
    encoded = write_coco(tmp_path / "rle", [(0, 3, [5, 5, 9, 9], rle)])
    fails(ValueError, "annotation 1 of .* run-length encoding", train=encoded)
    boxes = write_coco(tmp_path / "boxes", [(0, 3, [5, 5, 9, 9], []), (0, 3, [5, 5, 9, 9], None)])
    fails(ValueError, "set MODEL.MASK_ON to False", train=boxes)
    lost = write_coco(tmp_path / "lost")
    (lost.parent / "3.png").unlink()
    fails(FileNotFoundError, r"no image at .*3\.png, which .*coco\.json lists", test=lost)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("annotations", {"id": 2}, "annotation 2 of .* is not the only one with this id"),
        ("categories", {"id": 7}, "several categories with the id 7"),
        ("images", {"id": 1}, "several images with the id 1"),
        ("images", {"width": 70.5}, r"images\[0\] has the width 70\.5"),
        ("categories", None, "has no category"),
    ],
)
def test_bad_entries(tmp_path, kind, change, message):
    """Found before anything is trained; an ellipsis stands for what is missing."""
    good, path = write_coco(tmp_path / "good"), write_coco(tmp_path / "bad")
    content = json.loads(path.read_text())
    if change is None:
        content[kind] = []
    else:
        entry = content[kind][0] | change
        content[kind][0] = {k: v for k, v in entry.items() if v is not ...}
    path.write_text(json.dumps(content))
    cfg = load_config(DIGITS, overrides(tmp_path, good, test=path))
    with pytest.raises(ValueError, match=message):
        register_coco_json(cfg)
