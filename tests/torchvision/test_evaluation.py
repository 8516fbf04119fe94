"""What detectors score."""

import json

import pytest
import torch

from e3va.data.coco import CocoInstances, average_precision
from tests.data.conftest import coco
from tests.torchvision.conftest import detector

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from e3va.torchvision import detect, evaluate


class Oracle(torch.nn.Module):
    """Finds what the data set says, or something else."""

    def __init__(self, data, spoil=lambda found: found):
        super().__init__()
        self.data, self.spoil, self.calls = data, spoil, 0

    def forward(self, images):
        assert not self.training
        image, target = self.data[self.calls]
        assert torch.equal(image, images[0])
        self.calls += 1
        found = {**target, "scores": torch.ones(len(target["boxes"]))}
        if "masks" in found:
            found["masks"] = found["masks"][:, None].float()
        return [self.spoil(found)]


def test_perfect_predictions_score_100(tmp_path):
    # Ids start at 0, which COCO's evaluation takes for "no match", unless they are renumbered.
    data = coco(tmp_path)
    perfect = {"box_ap": 100.0, "box_ap50": 100.0, "mask_ap": 100.0, "mask_ap50": 100.0}
    model = Oracle(data).train()
    assert evaluate(model, data, "cpu") == pytest.approx(perfect)
    assert model.training
    assert average_precision(data, json.loads(json.dumps(detect(Oracle(data), data, "cpu"))))


def test_imperfect_predictions_score_less(tmp_path):
    data = coco(tmp_path)

    def wrong_class(found):
        return {**found, "labels": 3 - found["labels"]}

    def nothing(found):
        return {k: v[:0] for k, v in found.items()}

    def half_a_mask(found):  # IoU 0.5 .. 0.55: right at the first threshold only
        masks = found["masks"].clone()
        for mask, (x1, _, x2, _) in zip(masks, found["boxes"].int().tolist(), strict=True):
            mask[..., (x1 + x2) // 2 :] = 0
        return {**found, "masks": masks}

    for spoil in (wrong_class, nothing):
        assert set(evaluate(Oracle(data, spoil), data, "cpu").values()) == {0.0}
    scores = evaluate(Oracle(data, half_a_mask), data, "cpu")
    assert scores["box_ap"] == pytest.approx(100)
    assert scores["mask_ap50"] == pytest.approx(100) and scores["mask_ap"] == pytest.approx(10)


def test_boxes_alone_are_scored_alone(tmp_path):
    data = coco(tmp_path, masks=False)
    perfect = {"box_ap": 100.0, "box_ap50": 100.0}
    assert evaluate(Oracle(data), data, "cpu") == pytest.approx(perfect)
    # A Mask R-CNN may be asked for its boxes alone.
    found = detect(detector(box_score_thresh=0.0), data, "cpu")
    assert found and not any("segmentation" in result for result in found)


def test_masks_that_are_read_must_be_predicted(tmp_path):
    data = coco(tmp_path)
    with pytest.raises(ValueError, match=r"read it with masks=False"):
        evaluate(detector(kind="retinanet"), data, "cpu")


def test_real_annotations_are_found(real_data):
    folder = real_data / "microcontrollers/valid"
    boards = CocoInstances(folder / "_annotations.coco.json", folder)
    assert evaluate(Oracle(boards), boards, "cpu")["mask_ap"] == pytest.approx(100)
