"""Boxes and masks against pycocotools, and what must not reach it."""

import time

import numpy as np
import pytest

from e3va.data.geometry import (
    Unusable,
    check_convention,
    check_mask_in_box,
    check_polygons,
    check_rle,
    check_segmentation,
    clip_box,
    run_lengths,
)
from tests.data.factories import SQUARE

coco_mask = pytest.importorskip("pycocotools.mask")

LARGE = 10**400  # a whole number of JSON that no float can hold
SQUARE_RUNS = [155, *[10, 20] * 9, 10, 765]  # columns of 30 pixels


def random_masks():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 9), (30, 40), (300, 7), (511, 640)):
        for share in (0.02, 0.5, 0.98):
            yield rng.random((height, width)) < share
        blob = np.zeros((height, width), bool)
        blob[height // 3 : height // 2 + 1, width // 3 : width // 2 + 1] = True
        yield blob
        yield ~blob
        yield np.ones((height, width), bool)


@pytest.mark.parametrize("mask", list(random_masks()))
def test_strings_are_decoded_as_pycocotools_encodes_them(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs = run_lengths(rle["counts"])
    column = np.repeat(np.arange(len(runs)) % 2, runs)
    np.testing.assert_array_equal(column.reshape(mask.shape, order="F"), mask)
    if not mask.any():
        with pytest.raises(Unusable, match="without a pixel"):
            check_rle(rle, *mask.shape)
        return
    found = check_rle(rle, *mask.shape)
    assert found.segmentation["counts"] == rle["counts"].decode()
    x, y, w, h = coco_mask.toBbox(rle)
    assert found.extent() == (x, y, x + w, y + h)
    listed = check_rle({"size": list(mask.shape), "counts": runs.tolist()}, *mask.shape)
    assert listed.segmentation["counts"] == runs.tolist() and listed.parts == found.parts


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([5, 6, 10, 4], (5, 6, 15, 10)),
        ([-5, -5, 100, 100], (0, 0, 40, 30)),
        ([39, 29.5, 5, 5], (39, 29.5, 40, 30)),
        ([0, 0, 0.1, 0.1], (0, 0, 0.1, 0.1)),
    ],
)
def test_boxes_are_clipped(bbox, expected):
    assert clip_box(bbox, 30, 40) == expected


@pytest.mark.parametrize(
    "bbox",
    [
        [],
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [1, 2, float("nan"), 4],
        [float("nan"), 2, 3, 4],
        [1, 2, float("inf"), 4],
        [1, 2, LARGE, 4],
        [1, -LARGE, 4, 4.5],
        [5, 5, 0, 5],
        [5, 5, -3, 5],
        [5, 5, 0.05, 5],
        [41, 5, 5, 5],
        [5, -9, 5, 5],
        [1e200, 1e200, 1e200, 1e200],
    ],
)
def test_boxes_that_hold_nothing(bbox):
    with pytest.raises(Unusable, match="box"):
        clip_box(bbox, 30, 40)


def test_polygons():
    mask = check_polygons([SQUARE, [1, 1, 2, 2], [], [20, 20, 30.5, 20, 20, 25]], 30, 40)
    assert mask.segmentation == [SQUARE, [20, 20, 30.5, 20, 20, 25]]
    assert mask.parts == [(5, 5, 15, 15), (20, 20, 30.5, 25)]
    assert mask.extent() == (5, 5, 30.5, 25)
    assert check_segmentation(SQUARE, 30, 40).segmentation == [SQUARE]  # without its list


@pytest.mark.parametrize(
    ("polygons", "reason"),
    [
        ([[1, 1, 2, float("nan"), 3, 3]], "not finite"),
        ([[1, 1, 2, 2, float("nan"), 3]], "not finite"),
        ([[1, 1, 2, float("inf"), 3, 3]], "not finite"),
        ([[1, 1, 2, LARGE, 3, 3]], "not finite"),
        ([[1, 1, 10**300, 10**300, 3.5, 10**300]], "far outside"),
        ([[1, 1, 2e8, 2, 3, 3]], "far outside"),
        ([[1, 1, 20, -2e8, 3, 3]], "far outside"),
        ([SQUARE, [1, 1, 2e8, 2, 3, 3]], "far outside"),
        ([[1, 1, 5, 5]], "no polygon with an area"),
        ([[1, 1]], "no polygon with an area"),
        ([[]], "no polygon with an area"),
        ([], "no mask"),
        (None, "no mask"),
        ([[3, 3, 3, 3, 3, 3]], "no polygon with an area"),
        ([[3, 3, 3, 8, 3, 5]], "no polygon with an area"),
        ([[-10, -10, 70, 40] * 50_000], "outline"),  # 100 bytes a pixel: gigabytes
    ],
)
def test_polygons_that_cannot_be_used(polygons, reason):
    with pytest.raises(Unusable, match=reason):
        check_segmentation(polygons, 30, 40)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 2, 2, 3, 3, 4]], "7 numbers"),
        ([1, 2, 3, 4, 5, 6, 7], "7 numbers"),
        ([[[1, 1], [2, 2], [3, 1]]], "no list of polygons"),
        ([[[1, 1, 2, 2, 3, 1]]], "no list of polygons"),
        ([[1, 1, 2, "2", 3, 3]], "no list of polygons"),
        ([[1, 1, 2, None, 3, 3]], "no list of polygons"),
        ([[1, 1, True, 2, 3, 3]], "no list of polygons"),
        ([{"x": 1, "y": 2}], "no list of polygons"),
        ([1, [2]], "no list of polygons"),
        ("polygon", "is a str"),
        (5, "is a int"),
    ],
)
def test_polygons_that_cannot_be_meant(segmentation, message):
    with pytest.raises(ValueError, match=message):
        check_segmentation(segmentation, 30, 40)


@pytest.mark.parametrize(
    "counts",
    [
        [155, 10, 1035],
        [155.0, 10.0, 1035.0],
        [0, 1200],
        [0, 0, 5, 10, 1185],
        SQUARE_RUNS,
    ],
)
def test_run_lengths_in_lists(counts):
    rle = check_rle({"size": [30, 40], "counts": counts}, 30, 40).segmentation
    assert all(isinstance(count, int) for count in rle["counts"])
    expected = np.repeat(np.arange(len(counts)) % 2, np.array(counts, int))
    found = coco_mask.decode(coco_mask.frPyObjects(rle, 30, 40))
    np.testing.assert_array_equal(found.ravel(order="F"), expected)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([155, 10], "sum to 165"),
        ([155, 10, 2000], "sum to 2165"),
        ([160, -10, 1050], "negative"),
        ([155.5, 9.5, 1035], "whole"),
        ([155, float("nan"), 1045], "whole"),
        ([155, float("inf")], "whole"),
        ([155, LARGE], "whole"),
        ([155, 2**62, 2**62, 2**62, 2**62, 1045], "whole"),
        ([2**53] * 2048 + [1200], "sum to"),  # 2**64 + 1200, which wraps to 1200
        (["155", "10", "1035"], "whole"),
        ([155, None, 1045], "whole"),
        ([True, 1199], "whole"),
        ([[155, 10], [5, 5]], "whole"),
        ("garbage", "no COCO string|sum|negative"),
        ("b'[5`1:N2M3'", "Python's b'"),
        (str(coco_mask.encode(np.ones((30, 40), np.uint8, order="F"))["counts"]), "Python's b'"),
        ("é5", "no COCO string"),
        ("0 0", "no COCO string"),
        ("o" * 9 + "0", "no COCO string"),
        ("oo", "cut short"),
        (5, "without 'counts'"),
        (None, "without 'counts'"),
    ],
)
def test_run_lengths_that_cannot_be_meant(counts, message):
    with pytest.raises(ValueError, match=message):
        check_rle({"size": [30, 40], "counts": counts}, 30, 40)


def test_a_string_that_is_cut_anywhere_is_refused():
    mask = np.random.default_rng(0).random((30, 40)) < 0.3
    text = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    for end in range(1, len(text)):
        with pytest.raises(ValueError, match="run-length encoding"):
            check_rle({"size": [30, 40], "counts": text[:end]}, 30, 40)


@pytest.mark.parametrize("size", [[40, 30], [30], [30, 40, 1], None, 1200, ["30", "40"], [None, 1]])
def test_run_lengths_of_another_size(size):
    with pytest.raises(ValueError, match=r"size|in an image of \[30, 40\]"):
        check_rle({"size": size, "counts": [155, 10, 1035]}, 30, 40)


@pytest.mark.parametrize("counts", [[], "", [1200], [600, 0, 600]])
def test_run_lengths_without_a_pixel(counts):
    with pytest.raises(Unusable, match="no mask"):
        check_rle({"size": [30, 40], "counts": counts}, 30, 40)


@pytest.mark.parametrize("segmentation", [[SQUARE], {"size": [30, 40], "counts": SQUARE_RUNS}])
def test_masks_lie_in_their_boxes(segmentation):
    mask = check_segmentation(segmentation, 30, 40)
    assert mask.extent() == (5, 5, 15, 15)
    check_mask_in_box(mask, (14, 14, 30, 30))
    for box in ((15, 5, 20, 15), (0, 5, 5, 15), (5, 15, 15, 20), (5, 0, 15, 5)):
        with pytest.raises(Unusable, match="outside its box"):
            check_mask_in_box(mask, box)


def test_one_of_several_polygons_in_the_box_is_enough():
    mask = check_polygons([[0, 0, 3, 0, 3, 3], [30, 20, 35, 20, 35, 25]], 30, 40)
    check_mask_in_box(mask, (29, 19, 36, 26))
    with pytest.raises(Unusable):  # although the box lies between them
        check_mask_in_box(mask, (10, 10, 20, 15))


def test_corners_are_told_from_sizes():
    corners = [[10, 5, 38, 28], [20, 12, 39, 29], [30, 20, 35, 30], [1, 1, 5, 9]]
    with pytest.raises(ValueError, match=r"a\.json: 3 of 4 boxes .* corners"):
        check_convention([(box, 30, 40) for box in corners], "a.json")
    sizes = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in corners]
    check_convention([(box, 30, 40) for box in sizes], "a.json")
    check_convention([(box, 30, 40) for box in [*corners, [30, 20, 5, 5]]], "a.json")
    check_convention([], "a.json")
    check_convention([(corners[0], 30, 40)], "a.json")  # too few to tell


def test_fractions_are_told_from_pixels():
    boxes = [([0.1, 0.2, 0.3, 0.4], 30, 40)] * 3
    with pytest.raises(ValueError, match=r"a\.json: .* fractions"):
        check_convention(boxes, "a.json")
    with pytest.raises(ValueError, match="fractions"):  # what is broken does not hide them
        check_convention([*boxes, ([float("nan"), LARGE, 1, 1], 30, 40), ([5], 30, 40)], "a.json")
    check_convention([*boxes, ([5, 5, 9, 9], 30, 40)], "a.json")


def test_a_long_list_of_runs_takes_no_time():
    counts = [1] * 1_000_000
    started = time.process_time()
    check_rle({"size": [1000, 1000], "counts": counts}, 1000, 1000)
    assert time.process_time() - started < 2
