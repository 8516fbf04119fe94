"""What is chosen for data, and why."""

import dataclasses

import pytest

pytest.importorskip("pycocotools")

from e3va.data.folder import open_data
from e3va.data.instances import Instances, categories_of
from e3va.runs.plan import DETECTORS, ITERATIONS, SIDES, make_plan
from tests.runs.factories import write_coco, write_maps, write_yolo


@pytest.fixture
def masks(tmp_path):
    return open_data(write_coco(tmp_path / "data"))


def boxes_of(sides, size=(600, 800), images=40, names=("a",)):
    """Squares of some sides, one an image."""
    split = Instances("somewhere", categories_of(names))
    for i in range(images):
        image = split.add_image(f"{i}.jpg", *size)
        split.add(image, 1, [5, 5, sides[i % len(sides)], sides[i % len(sides)]], where="here")
    return split


def with_train(data, split):
    return dataclasses.replace(data, task="boxes", splits={"train": split, "val": split})


def test_the_task_decides_the_detector(tmp_path, masks):
    boxes, maps = open_data(write_yolo(tmp_path / "y")), open_data(write_maps(tmp_path / "m"))
    for data in (boxes, masks, maps):
        plan = make_plan(data, model="swin_digits")
        assert (plan.task, plan.detector) == (data.task, DETECTORS[data.task][0])
    plan = make_plan(boxes, model="retinanet_swin_digits")
    assert (plan.detector, plan.variant) == ("retinanet", "swin_digits")
    assert make_plan(boxes).weights.startswith("https://")


def test_a_plan_tells_of_anchors_where_there_are_such(tmp_path, masks):
    assert "anchor_sizes" in make_plan(masks).describe()
    assert "anchor" not in make_plan(open_data(write_maps(tmp_path / "maps"))).describe()


@pytest.mark.parametrize("size", [(40, 60), (600, 800), (3000, 4000), (20, 900)], ids=str)
def test_images_are_brought_to_a_size_that_fits(masks, size):
    plan = make_plan(with_train(masks, boxes_of([10], size)))
    assert SIDES[0] <= plan.min_size <= SIDES[1]
    assert plan.min_size == min(max(min(size), SIDES[0]), SIDES[1])
    assert plan.min_size <= plan.max_size <= 5 / 3 * plan.min_size + 1


@pytest.mark.parametrize("side, first", [(4, 8), (16, 16), (30, 32), (300, 32)])
def test_the_smallest_anchor_suits_the_small_objects(masks, side, first):
    plan = make_plan(with_train(masks, boxes_of([side, side, side, 200])))
    assert plan.anchor_sizes == tuple(first * 2**level for level in range(5))
    # Images that are halved have objects of half the side.
    large = make_plan(with_train(masks, boxes_of([2 * side] * 3 + [400], (1600, 2000))))
    assert large.anchor_sizes == plan.anchor_sizes


@pytest.mark.parametrize("images, iterations", [(1, 500), (100, 1500), (1_000_000, 90_000)])
def test_the_schedule_grows_with_the_images(masks, images, iterations):
    split = boxes_of([20], images=min(images, 100))
    split.images = split.images * (images // len(split.images))
    plan = make_plan(with_train(masks, split))
    assert plan.iterations == iterations and ITERATIONS[0] <= iterations <= ITERATIONS[1]
    assert 0 <= plan.warmup < plan.iterations
    assert make_plan(with_train(masks, split), iterations=7).iterations == 7


@pytest.mark.parametrize("iterations, period", [(1, 1), (40, 4), (5000, 500), (90_000, 500)])
def test_short_runs_are_kept_often(masks, iterations, period):
    assert make_plan(masks, iterations=iterations).checkpoint_period == period


def test_digits_are_not_mirrored(masks):
    assert make_plan(with_train(masks, boxes_of([20], names=("a", "b")))).flip
    assert not make_plan(with_train(masks, boxes_of([20], names=("3", "8")))).flip


def test_a_file_of_weights_is_found_from_anywhere(masks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    assert make_plan(masks, weights="w.pth").weights == str(tmp_path / "w.pth")
    assert make_plan(masks, weights="timm:swin").weights == "timm:swin"


def test_what_cannot_be_planned(masks):
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        make_plan(masks, iterations=0)
    with pytest.raises(ValueError, match="unknown trunk variant 'swin_xl'"):
        make_plan(masks, model="mask_rcnn_swin_xl")
