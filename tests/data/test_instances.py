"""Instances as the content of a COCO JSON file, and other classes for them."""

import logging
from pathlib import Path

import pytest

from e3va.data.instances import CLIPPED, Instances, categories_of
from tests.data.factories import SQUARE


@pytest.fixture
def instances():
    found = Instances("here", categories_of(["cat", "dog"]))
    for name in ("a.png", "b.png"):
        found.add_image(Path(name), 30, 40)
    return found


def test_what_is_added(instances):
    image = instances.images[0]
    assert image == {"id": 1, "file_name": "a.png", "height": 30, "width": 40}
    instances.add(image, 2, [30, 5, 20, 10], where="x")
    instances.add(image, 1, [5, 5, 10, 10], [SQUARE], where="x", wants_mask=True, area=7.0)
    instances.add(image, 1, None, [SQUARE], where="x", crowd=True, wants_mask=True)
    boxed, masked, crowd = instances.annotations
    assert boxed == {
        "id": 1,
        "image_id": 1,
        "category_id": 2,
        "bbox": [30, 5, 10, 10],
        "area": 100,
        "iscrowd": 0,
    }
    assert masked["segmentation"] == [SQUARE] and masked["area"] == 7
    assert crowd["bbox"] == [5, 5, 10, 10] and crowd["iscrowd"] == 1 and crowd["id"] == 3
    assert instances.has_masks and instances.counts() == {"cat": 1, "dog": 1}
    assert instances.content()["annotations"] is instances.annotations


def test_masks_that_are_not_wanted_are_not_looked_at(instances):
    instances.add(instances.images[0], 1, [5, 5, 10, 10], [[1, float("nan")]], where="x")
    assert "segmentation" not in instances.annotations[0]
    instances.add(instances.images[0], 1, None, [SQUARE], where="x")  # but where a box is missing
    assert instances.annotations[1]["bbox"] == [5, 5, 10, 10]
    assert not instances.has_masks


def test_what_is_left_out_is_counted_by_reason(instances):
    image = instances.images[0]
    for box in ([50, 5, 9, 9], [5, 5, 0, 9], [1, 2, 3]):
        instances.add(image, 1, box, where="x")
    instances.add(image, 1, [5, 5, 10, 10], where="x", wants_mask=True)
    instances.add(image, 1, [20, 20, 10, 10], [SQUARE], where="x", wants_mask=True)
    instances.add(image, 1, None, where="x")
    instances.drop("other", 3)
    assert not instances.annotations
    assert instances.dropped == {
        "box outside its image or thinner than 0.1 pixels": 2,
        "box without four finite numbers": 1,
        "no mask": 2,
        "mask outside its box": 1,
        "other": 3,
    }


def test_what_cannot_be_meant_is_named(instances):
    with pytest.raises(ValueError, match=r"annotation 7 of a.json has a polygon of 7"):
        instances.add(
            instances.images[0],
            1,
            [5, 5, 10, 10],
            [[1, 2, 3, 4, 5, 6, 7]],
            where="annotation 7 of a.json",
            wants_mask=True,
        )


def test_subset(instances):
    for image in instances.images:
        instances.add(image, image["id"], [5, 5, 10, 10], where="x")
    part = instances.subset(instances.images[1:])
    assert [image["id"] for image in part.images] == [2]
    assert [a["image_id"] for a in part.annotations] == [2]
    assert part.classes == ["cat", "dog"] and part.counts() == {"cat": 0, "dog": 1}


def test_renamed(instances):
    for image in instances.images:
        instances.add(image, image["id"], [5, 5, 10, 10], where="x")
    instances.drop("before")
    merged = instances.renamed({"cat": "pet", "dog": "pet"}, ["pet"])
    assert merged.counts() == {"pet": 2} and merged.dropped == {"before": 1}
    chosen = instances.renamed({"dog": "hound", "cat": None}, ["hound"])
    assert chosen.counts() == {"hound": 1} and len(chosen.images) == 2
    assert chosen.dropped == {"before": 1, "class left out": 1}
    assert instances.dropped == {"before": 1} and instances.counts() == {"cat": 1, "dog": 1}
    turned = instances.renamed({"cat": "cat", "dog": "dog"}, ["dog", "cat"])
    assert [a["category_id"] for a in turned.annotations] == [2, 1]


@pytest.mark.parametrize(
    ("bbox", "clipped"),
    [
        ([5, 5, 10, 10], 0),
        ([-1, -1, 42, 32], 0),  # a pixel on each side: counted from another corner, or rounded
        ([-1.5, 5, 10, 10], 1),
        ([5, -300, 10, 310], 1),
        ([5, 5, 36.5, 10], 1),
        ([5, 5, 10, 1e6], 1),
    ],
)
def test_boxes_that_reach_out_are_counted(bbox, clipped):
    split = Instances("x", categories_of(["a"]))
    split.add(split.add_image(Path("a.png"), 30, 40), 1, bbox, where="annotation 1")
    assert (split.clipped, len(split.annotations)) == (clipped, 1)
    assert split.renamed({"a": "b"}, ["b"]).clipped == clipped


def test_the_first_of_each_reason_is_named(instances, caplog):
    image = instances.images[0]
    for number, box in enumerate([[50, 5, 9, 9], [-9, 5, 20, 9], [60, 5, 9, 9], [-8, 5, 20, 9]]):
        instances.add(image, 1, box, where=f"annotation {number}")
    outside = "box outside its image or thinner than 0.1 pixels"
    assert instances.examples == {outside: "annotation 0", CLIPPED: "annotation 1"}
    instances.warn(logging.getLogger("e3va"))
    assert f"2: {outside}, such as annotation 0)" in caplog.text
    assert "clipped 2 boxes to their images, such as annotation 1" in caplog.text
