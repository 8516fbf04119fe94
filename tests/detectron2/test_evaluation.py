"""Scores against what they are defined to be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from e3va.detectron2 import Trainer, load_config, register_coco_json
from tests.detectron2.factories import (
    DIGITS,
    detections,
    overrides,
    polygon,
    score,
    write_coco,
    write_voc,
)


def test_what_cannot_be_scored_is_left_out(tmp_path, caplog):
    box, square = [5, 5, 9, 9], [polygon(5, 5, 9, 9)]
    annotations = [(box, square), (box, []), (box, None), ([5, 5, 9], square)]
    path = write_coco(tmp_path, [(0, 3, *annotation) for annotation in annotations])
    content = json.loads(path.read_text())
    del content["annotations"][2]["segmentation"]
    path.write_text(json.dumps(content))
    for masks, left in (("True", 1), ("False", 3)):
        caplog.clear()
        cfg = load_config(DIGITS, overrides(tmp_path, path, "MODEL.MASK_ON", masks))
        register_coco_json(cfg)
        evaluator = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
        assert len(evaluator._coco_api.loadAnns(evaluator._coco_api.getAnnIds())) == left
        assert f"dropped {4 - left} of 4 instances" in caplog.text
        evaluator.reset()
        for record in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
            found = Instances((record["height"], record["width"]))
            found.pred_boxes = Boxes(torch.tensor([[5.0, 5, 14, 14]]))
            found.pred_classes, found.scores = torch.tensor([0]), torch.ones(1)
            found.pred_masks = torch.zeros(1, *found.image_size, dtype=torch.bool)
            found.pred_masks[:, 5:14, 5:14] = True
            evaluator.process([record], [{"instances": found}])
        assert evaluator.evaluate()["bbox"]["AP"] > 0


@pytest.mark.parametrize("first", [0, 1])
def test_a_perfect_detector_scores_100(tmp_path, first):
    """Whatever number the annotations start from."""
    path = write_coco(tmp_path)
    content = json.loads(path.read_text())
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = first + i
    path.write_text(json.dumps(content))
    cfg = load_config(DIGITS, overrides(tmp_path, path))
    register_coco_json(cfg)
    evaluator = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    evaluator.reset()
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
        found = Instances((record["height"], record["width"]))
        boxes = [a["bbox"] for a in record["annotations"]]
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        found.scores = torch.ones(len(boxes))
        masks = torch.zeros(len(boxes), *found.image_size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = True
        found.pred_masks = masks
        evaluator.process([record], [{"instances": found}])
    metrics = evaluator.evaluate()
    assert metrics["bbox"]["AP"] == metrics["segm"]["AP"] == pytest.approx(100)


def test_who_finds_nothing_scores_zero(tmp_path):
    cfg = load_config(DIGITS, overrides(tmp_path, write_coco(tmp_path)))
    register_coco_json(cfg)
    evaluator = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    evaluator.reset()
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
        found = Instances((record["height"], record["width"]))
        found.pred_boxes, found.pred_classes = Boxes(torch.empty(0, 4)), torch.empty(0)
        found.scores, found.pred_masks = torch.empty(0), torch.empty(0, *found.image_size)
        evaluator.process([record], [{"instances": found}])
    metrics = evaluator.evaluate()
    assert metrics["bbox"]["AP50"] == metrics["segm"]["AP"] == 0.0


NAMES = ["absent", "red car", "N/A"]


def test_a_perfect_detector_scores_100_on_a_tree(voc):
    """Without the tags that Detectron2's evaluator demands, with names of blanks and slashes, and
    with a class that does not occur."""
    cfg = voc(classes=NAMES)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert cfg.DATASETS.CLASSES == NAMES
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert MetadataCatalog.get(name).thing_classes == NAMES
        result = score(Trainer.build_evaluator(cfg, name), detections(DatasetCatalog.get(name)))
        assert result == {
            "AP": pytest.approx(100),
            "AP50": pytest.approx(100),
            "AP75": result["AP"],
        }


def test_trees_are_scored_as_detectron2_scores_them(voc, tmp_path):
    boxes = [("b", 5, 6, 30, 40, 0), ("b", 9, 9, 20, 22, 1), ("a", 20, 3, 60, 33, 0)]
    cfg = voc(write_voc(tmp_path / "tags", boxes, tags=True))
    name = cfg.DATASETS.TEST[0]
    records = DatasetCatalog.get(name)
    assert MetadataCatalog.get(name).thing_classes == ["a", "b"]
    # Detectron2's own evaluator cannot read names with blanks.
    root = Path(MetadataCatalog.get(name).dirname)
    for old in (root / "Annotations/a b.xml", root / "JPEGImages/a b.jpg"):
        old.rename(old.with_stem("ab"))
    (root / "ImageSets/Main/val.txt").write_text("ab\n")
    for shift in (0.0, 2.0, 6.0):
        ours = score(Trainer.build_evaluator(cfg, name), detections(records, shift))
        renamed = [{**record, "image_id": "ab"} for record in records]
        theirs = score(PascalVOCDetectionEvaluator(name), detections(renamed, shift))
        assert ours == pytest.approx(theirs)
        assert shift == 0 or ours["AP"] < 100


def miou(truth, found, classes):
    """The definition: intersection over union of each class that occurs, without unlabelled."""
    known = truth != 255
    ratios = []
    for label in range(classes):
        expected, got = truth == label, (found == label) & known
        if expected.any():
            ratios.append((expected & got).sum() / (expected | got).sum())
    return 100 * np.mean(ratios)


def test_miou_against_its_definition(semantic):
    cfg = semantic()
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    name = cfg.DATASETS.TEST[0]
    assert MetadataCatalog.get(name).stuff_classes == ["class 1", "class 2", "class 3"]
    assert cfg.DATASETS.CLASSES == ["class 1", "class 2", "class 3"]
    (record,) = DatasetCatalog.get(name)
    with Image.open(record["sem_seg_file_name"]) as file:
        truth = np.array(file).astype(int) - 1
    truth[truth < 0] = 255
    rng = np.random.default_rng(1)
    for wrong in (0.0, 0.3, 1.0):
        found = np.where(rng.random(truth.shape) < wrong, 1, truth % 255)
        evaluator = Trainer.build_evaluator(cfg, name)
        evaluator.reset()
        logits = torch.nn.functional.one_hot(torch.from_numpy(found), 3).permute(2, 0, 1)
        evaluator.process([record], [{"sem_seg": logits}])
        result = evaluator.evaluate()["sem_seg"]
        assert result["mIoU"] == pytest.approx(miou(truth, found, 3))
        assert wrong or result["mIoU"] == 100
