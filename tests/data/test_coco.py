"""Instances in COCO's JSON format: read, and scored as pycocotools scores them."""

import json
import logging

import pytest
import torch
from PIL import Image

from e3va.data.coco import CocoInstances, average_precision, flip
from tests.data.conftest import annotation, coco, coco_tree, rectangle

pytest.importorskip("pycocotools")


def perfect(data):
    """What a detector that is always right finds, as COCO results."""
    results = []
    for index in range(len(data)):
        _, target = data[index]
        scores = torch.ones(len(target["labels"]))
        results += data.results(index, scores=scores, **target)
    return results


def test_masks_of_all_encodings_and_contiguous_labels(tmp_path):
    data = coco(tmp_path)
    assert len(data) == 4 and data.classes == ["tall", "wide"]
    assert data[0][1]["masks"].shape == (0, 60, 80) and data[0][1]["boxes"].shape == (0, 4)
    image, target = data[3]
    assert image.shape == (3, 60, 80) and image.dtype == torch.float32 and image.max() <= 1
    assert target["labels"].tolist() == [2, 1, 2]  # category ids 7, 3, 7
    for mask, box in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        expected = torch.zeros(60, 80, dtype=torch.uint8)
        expected[box[1] : box[3], box[0] : box[2]] = 1
        assert torch.equal(mask, expected)


def test_unusable_annotations_are_dropped_and_counted_once(tmp_path, caplog):
    extra = [
        annotation([3, 3, 0, 5]),
        annotation([3, 3, 5, -2]),
        annotation([90, 3, 5, 5]),
        annotation([float("nan"), 3, 5, 5]),
        annotation([3, 3, 5, 5], segmentation=[]),
        annotation([3, 3, 5, 5], segmentation=[[1, 2, 3, 4]]),
        annotation([-10, 50, 30, 40], segmentation=rectangle(0, 50, 20, 10)),  # clipped
        annotation([10, 10, 20, 1], segmentation=rectangle(10, 10, 20, 1)),  # one pixel high
        annotation([3, 3, 5, 5], iscrowd=1),
    ]
    extra = [{**a, "id": 100 + i} for i, a in enumerate(extra)]
    with caplog.at_level(logging.WARNING):
        data = coco(tmp_path, extra=extra)
    (message,) = caplog.messages
    assert "dropped 6 of 15" in message and str(data.path) in message
    assert data[0][1]["boxes"].tolist() == [[0, 50, 20, 60], [10, 10, 30, 11]]
    crowds = [a["iscrowd"] for a in data.ground_truth()["annotations"]]
    assert crowds == [0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_images_without_targets_can_be_left_out(tmp_path):
    path = coco_tree(tmp_path, extra=[annotation([3, 3, 5, 5], iscrowd=1)])
    assert len(CocoInstances(path, tmp_path)) == 4
    assert len(CocoInstances(path, tmp_path, keep_empty=False)) == 3


def test_bad_files_are_named(tmp_path):
    path = coco_tree(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        CocoInstances(tmp_path / "nowhere.json", tmp_path)
    (tmp_path / "2.png").rename(tmp_path / "3.png")
    with pytest.raises(FileNotFoundError, match=r"2\.png.*instances\.json"):
        CocoInstances(path, tmp_path)
    Image.new("RGB", (50, 40)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2\.png\) says 80×60 pixels, .* is 50×40"):
        CocoInstances(path, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "no list 'categories'"),
        (lambda c: c["annotations"][1].update(image_id=77), "annotation 1 .* unknown image 77"),
        (lambda c: c["annotations"][1].update(category_id=5), "unknown category 5"),
        (
            lambda c: c["annotations"][0].update(segmentation={"counts": "PP1"}),
            "annotation 0 .* run-length encoding",
        ),
        (
            lambda c: c["annotations"][0].update(segmentation=[1, 1, "9", 1, 9, 9]),
            "annotation 0 .* no list of polygons",
        ),
        (lambda c: c["annotations"][0].update(bbox=["1", 2, 3, 4]), "no list of numbers"),
        (lambda c: c["images"][0].pop("file_name"), r"images\[0\] has no 'file_name'"),
        (lambda c: c["categories"][0].pop("id"), r"categories\[0\] has no 'id'"),
    ],
)
def test_broken_annotations_are_named(tmp_path, change, message):
    path = coco_tree(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        CocoInstances(path, tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        CocoInstances(path, tmp_path)


def test_masks_without_a_pixel_are_no_targets(tmp_path):
    path = coco_tree(tmp_path)
    content = json.loads(path.read_text())
    before = [len(target["labels"]) for _, target in CocoInstances(path, tmp_path)]
    outside = [[500.0, 500.0, 510.0, 500.0, 510.0, 510.0]]
    first = content["annotations"][0]
    content["annotations"].append({**first, "id": 99, "segmentation": outside})
    path.write_text(json.dumps(content))
    data = CocoInstances(path, tmp_path)
    assert [len(target["labels"]) for _, target in data] == before
    assert all(target["masks"].any((1, 2)).all() for _, target in data)


def test_mask_of_another_size_is_named(tmp_path):
    extra = [annotation([3, 3, 5, 5], segmentation=rectangle(3, 3, 5, 5, "rle", size=(9, 9)))]
    with pytest.raises(ValueError, match=r"annotation 99 .*\[9, 9\].*\[60, 80\]"):
        coco(tmp_path, extra=extra)[0]


def test_flip_moves_boxes_with_masks(tmp_path):
    image, target = coco(tmp_path)[3]
    mirrored, flipped = flip(image, target)
    assert torch.equal(mirrored.flip(-1), image)
    for mask, box in zip(flipped["masks"], flipped["boxes"].tolist(), strict=True):
        rows, columns = mask.nonzero().unbind(1)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_ap_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no instance"):
        average_precision(coco(tmp_path, images=1), [])


# Boxes alone


def test_boxes_need_no_mask(tmp_path, caplog):
    path = coco_tree(tmp_path)
    with_masks = CocoInstances(path, tmp_path)
    content = json.loads(path.read_text())
    for bare in content["annotations"]:
        del bare["segmentation"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json has no mask: read it with masks=False"):
        CocoInstances(path, tmp_path)
    caplog.clear()
    boxes = CocoInstances(path, tmp_path, masks=False)
    assert not caplog.messages
    for (image, expected), (same, target) in zip(with_masks, boxes, strict=True):
        assert torch.equal(image, same) and set(target) == {"boxes", "labels"}
        assert all(torch.equal(target[name], expected[name]) for name in target)
        assert set(flip(image, target)[1]) == set(target)


def test_boxes_are_scored_alone_as_beside_masks(tmp_path):
    both, boxes = coco(tmp_path), coco(tmp_path, masks=False)
    spoiled = perfect(both)[1:]
    spoiled[0]["bbox"][0] += 3
    expected = average_precision(both, spoiled)
    found = average_precision(boxes, [{**r, "segmentation": None} for r in spoiled])
    assert 0 < found["box_ap"] < 100
    assert found == {name: expected[name] for name in ("box_ap", "box_ap50")}
    assert "segmentation" not in perfect(boxes)[0]


def test_masks_that_are_read_must_be_predicted(tmp_path):
    data = coco(tmp_path)
    _, target = data[3]
    with pytest.raises(ValueError, match=r"instances\.json was read with masks.*masks=False"):
        data.results(3, target["boxes"], target["labels"], torch.ones(3))


# What pycocotools scores against


def test_ground_truth_is_complete_and_leaves_out_what_cannot_be_scored(tmp_path, caplog):
    square = rectangle(5, 5, 9, 9)
    bare = {"image_id": 3, "category_id": 7, "bbox": [5, 5, 9, 9]}
    given = [
        {**bare, "segmentation": square, "area": None, "iscrowd": None},
        {**bare, "segmentation": [*square, [1, 2]], "iscrowd": 1, "area": 7.5},
        {**bare, "segmentation": []},
        {**bare, "segmentation": [[1, 2, 3, 4]]},
        {**bare, "bbox": [5, 5, 9], "segmentation": square},
        {**bare, "bbox": [5, 5, 0, 9], "segmentation": square},
        {**bare, "bbox": [5, float("nan"), 9, 9], "segmentation": square},
    ]
    given = [{**a, "id": 50 + i} for i, a in enumerate(given)]
    path = coco_tree(tmp_path, extra=given)
    truth = CocoInstances(path, tmp_path).ground_truth()["annotations"]
    assert "dropped 5 of 13 instances" in caplog.text
    assert [a["id"] for a in truth] == list(range(1, len(truth) + 1))
    last = truth[-2:]
    assert [(a["area"], a["iscrowd"]) for a in last] == [(81, 0), (7.5, 1)]
    assert [a["segmentation"] for a in last] == [square, square]
    boxes = CocoInstances(path, tmp_path, masks=False).ground_truth()["annotations"]
    assert len(boxes) == len(truth) + 2 and not any("segmentation" in a for a in boxes)


# Real images


def test_real_annotations_are_read(real_data):
    nuclei = CocoInstances(real_data / "nuclei/instances_val.json", real_data / "nuclei/images")
    assert len(nuclei) == 70 and len(nuclei.ground_truth()["annotations"]) == 2641
    boards = real_data / "microcontrollers/valid"
    boards = CocoInstances(boards / "_annotations.coco.json", boards)
    places = real_data / "coco_open"
    places = CocoInstances(places / "annotations/instances_val2017.json", places / "val2017")
    assert (len(boards), len(places), len(places.classes)) == (15, 20, 80)
    for data in (nuclei, boards, places):
        _, target = data[0]
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (found - box).abs().max() <= 2
    assert average_precision(boards, perfect(boards))["mask_ap"] == pytest.approx(100)
    assert average_precision(boards, [])["mask_ap"] == 0
