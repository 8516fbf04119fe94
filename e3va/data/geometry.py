"""Boxes and masks as files have them, looked at before any native decoder sees them.

Each check gives what can be used, or says in a word why nothing can (to be counted), or raises
ValueError where the file cannot mean what it says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MIN_SIDE = 0.1
"""A box thinner than this, in pixels, holds nothing to learn and breaks the box regression."""

FAR = 1.0
"""How far a polygon may reach out of its image, as a multiple of the image's larger side: tools
draw over the edge, and pycocotools allocates by the outline."""

Box = tuple[float, float, float, float]


class Unusable(Exception):
    """An instance that cannot be trained on; its text is the reason, for counting."""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def clip_box(bbox: Sequence[float], height: int, width: int) -> Box:
    """COCO's [x, y, width, height] as corners within the image.

    Raises:
        Unusable: a number is not finite, or a side of what is left is shorter than
            :data:`MIN_SIDE`.
    """
    if len(bbox) != 4 or not all(math.isfinite(value) for value in bbox):
        raise Unusable("box without four finite numbers")
    x, y, w, h = bbox
    x1, x2 = (min(max(value, 0.0), float(width)) for value in (x, x + w))
    y1, y2 = (min(max(value, 0.0), float(height)) for value in (y, y + h))
    if min(x2 - x1, y2 - y1) < MIN_SIDE:
        raise Unusable(f"box outside its image or thinner than {MIN_SIDE:g} pixels")
    return x1, y1, x2, y2


def check_polygons(polygons: Any, height: int, width: int) -> list[list[float]]:
    """Polygons [[x, y, …], …] without those of fewer than three points.

    Raises:
        Unusable: none is left, or a point is not finite or far outside of the image.
        ValueError: they are no lists of numbers, in pairs.
    """
    if not all(isinstance(polygon, list) and all(map(is_number, polygon)) for polygon in polygons):
        raise ValueError("has a segmentation that is no list of polygons [[x, y, …], …]")
    limit = FAR * max(height, width)
    usable = []
    for polygon in polygons:
        if len(polygon) % 2:
            raise ValueError(f"has a polygon of {len(polygon)} numbers: they come in pairs x, y")
        if not all(math.isfinite(value) for value in polygon):
            raise Unusable("polygon with a point that is not finite")
        for values, side in ((polygon[::2], width), (polygon[1::2], height)):
            if values and (min(values) < -limit or max(values) > side + limit):
                raise Unusable("polygon far outside its image")
        if len(polygon) >= 6:
            usable.append(polygon)
    if not usable:
        raise Unusable("no mask: no polygon of three points")
    return usable


def check_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """A run-length encoding, its counts as a list or as COCO's string.

    Raises:
        Unusable: it covers no pixel.
        ValueError: its size is not the image's, or its counts are no whole numbers that fill it.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not isinstance(counts, str | bytes | list)
    ):
        raise ValueError("has a run-length encoding without 'counts' or a 'size' [rows, columns]")
    if list(size) != [height, width]:
        raise ValueError(
            f"has a mask of {list(size)} rows and columns in an image of {[height, width]}"
        )
    if not counts:
        raise Unusable("no mask: an empty run-length encoding")
    if isinstance(counts, list):
        if not all(map(is_number, counts)) or not all(map(math.isfinite, counts)):
            raise ValueError("has a run-length encoding with counts that are no numbers")
        runs = np.array(counts)
    else:
        runs = _runs(counts)
    if (runs < 0).any() or (runs != np.floor(runs)).any():
        raise ValueError("has a run-length encoding with counts that are negative or not whole")
    if (total := int(runs.sum())) != height * width:
        raise ValueError(
            f"has a run-length encoding whose counts sum to {total} and not to {height} × {width} "
            f"= {height * width} pixels"
        )
    if not runs[1::2].any():
        raise Unusable("no mask: a run-length encoding without a pixel")
    if isinstance(counts, list):
        return {"size": [height, width], "counts": runs.astype(np.int64).tolist()}
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [height, width], "counts": text}


def check_segmentation(segmentation: Any, height: int, width: int) -> Any:
    """Polygons or a run-length encoding, checked as above.

    Raises:
        Unusable, ValueError: as :func:`check_polygons` and :func:`check_rle`.
    """
    if isinstance(segmentation, dict):
        return check_rle(segmentation, height, width)
    if segmentation is None or segmentation == []:
        raise Unusable("no mask")
    if isinstance(segmentation, list):
        if all(map(is_number, segmentation)):  # one polygon, without the list around it
            segmentation = [segmentation]
        return check_polygons(segmentation, height, width)
    raise ValueError(f"has a segmentation that is a {type(segmentation).__name__}")


def check_mask_in_box(segmentation: Any, box: Box) -> None:
    """That polygons lie, at least in part, in their box.

    Raises:
        Unusable: they do not.
    """
    if not isinstance(segmentation, list):
        return
    x1, y1, x2, y2 = box
    for polygon in segmentation:
        xs, ys = polygon[::2], polygon[1::2]
        if min(xs) < x2 and max(xs) > x1 and min(ys) < y2 and max(ys) > y1:
            return
    raise Unusable("mask outside its box")


def check_convention(boxes: Sequence[tuple[Sequence[float], int, int]], where: str) -> None:
    """That boxes (bbox, height, width) are COCO's [x, y, width, height] in pixels.

    Raises:
        ValueError: all of several look like corners or like fractions.
    """
    finite = [b for b in boxes if len(b[0]) == 4 and all(math.isfinite(v) for v in b[0])]
    if len(finite) < 3:
        return
    if all(max(bbox) <= 1 for bbox, height, width in finite) and any(
        min(height, width) > 2 for _, height, width in finite
    ):
        raise ValueError(
            f"{where}: no number of a box exceeds 1: they look like fractions of the image, but "
            "COCO's are [x, y, width, height] in pixels"
        )
    outside = 0
    for (x, y, w, h), height, width in finite:
        if not (w > x >= 0 and h > y >= 0 and w <= width + 1 and h <= height + 1):
            return
        outside += x + w > width + 1 or y + h > height + 1
    if outside >= max(2, len(finite) // 4):
        raise ValueError(
            f"{where}: {outside} of {len(finite)} boxes reach out of their image as [x, y, width, "
            "height], and none would as corners [x1, y1, x2, y2]: COCO's are the former"
        )


def _runs(counts: str | bytes) -> np.ndarray:
    """The run lengths of COCO's string: 5 bits a character, the sixth says that more follow, and
    from the fourth run on differences to the run before the last."""
    problem = "has a run-length encoding that is no COCO string"
    try:
        text = counts if isinstance(counts, bytes) else counts.encode("ascii")
    except UnicodeEncodeError:
        raise ValueError(problem) from None
    if text[:2] in (b"b'", b'b"'):
        raise ValueError(f"{problem}: it looks like Python's b'…'")
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError(f"{problem}: it is cut short")
    length = ends - starts + 1
    if codes.min() < 0 or codes.max() > 63 or length.max() > 7:
        raise ValueError(problem)
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, length))
    runs = np.add.reduceat((codes & 31) << shift, starts)
    runs -= (codes[ends] & 16 > 0).astype(np.int64) << 5 * length  # the sign of the last character
    for parity in (1, 2):
        runs[parity::2] = np.cumsum(runs[parity::2])
    return runs


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Polygons or a run-length encoding, checked before, as a mask [H, W], bool.

    Raises:
        ImportError: pycocotools is missing.
    """
    try:
        from pycocotools import mask as masks
    except ImportError as error:
        raise ImportError("masks need pycocotools: pip install 'e3va[train]'") from error
    rle = segmentation
    if isinstance(rle, list):
        rle = masks.merge(masks.frPyObjects(rle, height, width))
    elif isinstance(rle["counts"], list):
        rle = masks.frPyObjects(rle, height, width)
    return masks.decode(rle).astype(bool)
