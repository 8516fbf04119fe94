"""Boxes and masks as files have them, looked at before any native decoder sees them.

Each check gives what can be used, or says in a word why nothing can (to be counted), or raises
ValueError where the file cannot mean what it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

MIN_SIDE = 0.1
"""A box thinner than this, in pixels, holds nothing to learn and breaks the box regression."""

OVER_THE_EDGE = 1.0
"""How far a box may reach out of its image, in pixels, before that is told: tools round, and count
from 0 or from 1."""

FAR = 1.0
"""How far a polygon may reach out of its image, as a multiple of the image's larger side: tools
draw over the edge, and pycocotools allocates by the outline."""

LONGEST = 1e6
"""The longest outline of a polygon, in pixels; pycocotools takes some 100 bytes for each."""

HUGE = 1e300

Box = tuple[float, float, float, float]


class Mask(NamedTuple):
    """A mask that can be used: polygons, or a run-length encoding, and the corners of its parts."""

    segmentation: Any
    parts: list[Box]

    def extent(self) -> Box:
        """Corners of the whole."""
        x1, y1, x2, y2 = zip(*self.parts, strict=True)
        return min(x1), min(y1), max(x2), max(y2)


class Unusable(Exception):
    """An instance that cannot be trained on; its text is the reason, for counting."""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def all_finite(values: Sequence[float]) -> bool:
    """Whether numbers, at least one, are such that one can reckon with; JSON's whole numbers may be
    larger than any float."""
    return min(values) >= -HUGE and max(values) <= HUGE and (total := sum(values)) == total  # NaN


def clip_box(bbox: Sequence[float], height: int, width: int) -> Box:
    """COCO's [x, y, width, height] as corners within the image.

    Raises:
        Unusable: a number is not finite, or a side of what is left is shorter than
            :data:`MIN_SIDE`.
    """
    if len(bbox) != 4 or not all_finite(bbox):
        raise Unusable("box without four finite numbers")
    x, y, w, h = bbox
    x1, x2 = min(max(x, 0.0), width), max(min(x + w, float(width)), 0.0)
    y1, y2 = min(max(y, 0.0), height), max(min(y + h, float(height)), 0.0)
    if min(x2 - x1, y2 - y1) < MIN_SIDE:
        raise Unusable(f"box outside its image or thinner than {MIN_SIDE:g} pixels")
    return x1, y1, x2, y2


def is_cut(bbox: Sequence[float], box: Box) -> bool:
    """Whether clipping COCO's ``bbox`` to ``box`` took more than :data:`OVER_THE_EDGE` away."""
    x, y, w, h = bbox
    x1, y1, x2, y2 = box
    return max(x1 - x, y1 - y, x + w - x2, y + h - y2) > OVER_THE_EDGE


def check_polygons(polygons: Any, height: int, width: int) -> Mask:
    """Polygons [[x, y, …], …] without those that enclose nothing.

    Raises:
        Unusable: none is left, a point is not finite or far outside of the image, or an outline is
            longer than :data:`LONGEST`.
        ValueError: they are no lists of numbers, in pairs.
    """
    # Types are compared by set and numbers by map: data sets have millions of them.
    if not all(isinstance(p, list) and set(map(type, p)) <= {int, float} for p in polygons):
        raise ValueError("has a segmentation that is no list of polygons [[x, y, …], …]")
    far = FAR * max(height, width)
    usable, parts = [], []
    for polygon in polygons:
        if len(polygon) % 2:
            raise ValueError(f"has a polygon of {len(polygon)} numbers: they come in pairs x, y")
        if not polygon:
            continue
        if not all_finite(polygon):
            raise Unusable("polygon with a point that is not finite")
        xs, ys = polygon[::2], polygon[1::2]
        x1, y1, x2, y2 = part = min(xs), min(ys), max(xs), max(ys)
        if x1 < -far or y1 < -far or x2 > width + far or y2 > height + far:
            raise Unusable("polygon far outside its image")
        if (x2 - x1 + y2 - y1) * len(polygon) / 2 > LONGEST and _outline(polygon) > LONGEST:
            raise Unusable(f"polygon with an outline of more than {LONGEST:g} pixels")
        if len(polygon) >= 6 and x1 < x2 and y1 < y2:
            usable.append(polygon)
            parts.append(part)
    if not usable:
        raise Unusable("no mask: no polygon with an area")
    return Mask(usable, parts)


def check_rle(rle: dict[str, Any], height: int, width: int) -> Mask:
    """A run-length encoding, its counts as a list or as COCO's string.

    Raises:
        Unusable: it covers no pixel.
        ValueError: its size is not the image's, or its counts are no whole numbers that fill it.
    """
    _check_rle_form(rle, height, width)
    counts = rle["counts"]
    if not counts:
        raise Unusable("no mask: an empty run-length encoding")
    runs = run_lengths(counts)
    pixels = height * width
    if runs.min() < 0:
        raise ValueError("has a run-length encoding with negative counts")
    if runs.max() > pixels or runs.sum() != pixels:  # the sum alone could overflow
        raise ValueError(
            f"has a run-length encoding whose counts sum to {sum(runs.tolist())} and not to "
            f"{height} × {width} = {pixels} pixels"
        )
    part = _rle_extent(runs, height)
    if isinstance(counts, list):
        counts = runs.tolist()
    elif isinstance(counts, bytes):
        counts = counts.decode("ascii")
    return Mask({"size": [height, width], "counts": counts}, [part])


def check_segmentation(segmentation: Any, height: int, width: int) -> Mask:
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


def check_mask_in_box(mask: Mask, box: Box) -> None:
    """That a mask lies, at least in part, in its box.

    Raises:
        Unusable: it does not.
    """
    left, top, right, low = box
    for x1, y1, x2, y2 in mask.parts:
        if x1 < right and x2 > left and y1 < low and y2 > top:
            return
    raise Unusable("mask outside its box")


Boxes = Sequence[tuple[Sequence[float], int, int]]
"""Four numbers as a file has them, and the height and width of the image."""


def check_fractions(boxes: Boxes, where: str, wanted: str) -> None:
    """That boxes are in pixels; ``wanted`` says in words what they should be.

    Raises:
        ValueError: no number of several boxes exceeds 1.
    """
    _check_fractions(*_numbers(boxes), where, wanted)


def check_convention(boxes: Boxes, where: str) -> None:
    """That boxes are COCO's [x, y, width, height] in pixels.

    Raises:
        ValueError: all of several look like corners or like fractions.
    """
    numbers, sizes = _numbers(boxes)
    _check_fractions(numbers, sizes, where, "COCO's are [x, y, width, height] in pixels")
    if len(numbers) < 3:
        return
    first, second, limit = numbers[:, :2], numbers[:, 2:], sizes[:, ::-1] + 1
    corners = ((first >= 0) & (second > first) & (second <= limit)).all()
    outside = int((first + second > limit).any(1).sum())
    if corners and outside >= max(2, len(numbers) // 4):
        raise ValueError(
            f"{where}: {outside} of {len(numbers)} boxes reach out of their image as [x, y, width, "
            "height], and none would as corners [x1, y1, x2, y2]: COCO's are the former"
        )


def run_lengths(counts: str | bytes | list[Any]) -> np.ndarray:
    """Run lengths [n], int64, of the ``counts`` of a run-length encoding.

    A string has 5 bits a character, the sixth says that more follow, and from the fourth run on
    holds differences to the run before the last.

    Raises:
        ValueError: a list has what is no whole number; a string is none of COCO's.
    """
    if isinstance(counts, list):
        whole = set(map(type, counts)) <= {int, float} and all_finite(counts)
        numbers = np.array(counts, np.float64) if whole else np.empty(0)
        if not whole or (numbers != np.floor(numbers)).any() or np.abs(numbers).max() > 2**53:
            raise ValueError("has a run-length encoding with counts that are no whole numbers")
        return numbers.astype(np.int64)
    problem = "has a run-length encoding that is no COCO string"
    try:
        text = counts if isinstance(counts, bytes) else counts.encode("ascii")
    except UnicodeEncodeError:
        raise ValueError(problem) from None
    if text[:2] in (b"b'", b'b"'):
        raise ValueError(f"{problem}: it looks like Python's b'…', decode it before it is written")
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    (ends,) = (codes & 32 == 0).nonzero()
    if not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError(f"{problem}: it is cut short")
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1] + 1
    length = ends - starts + 1
    if codes.min() < 0 or codes.max() > 63 or length.max() > 7:
        raise ValueError(problem)
    shift = 5 * (np.arange(len(codes)) - starts.repeat(length))
    runs = np.add.reduceat((codes & 31) << shift, starts)
    runs -= (codes[ends] >> 4 & 1) << 5 * length  # the sign of the last character
    for parity in (1, 2):
        runs[parity::2].cumsum(out=runs[parity::2])
    return runs


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask [H, W], bool, as a run-length encoding with text.

    Raises:
        ImportError: pycocotools is missing.
    """
    rle = _pycocotools().encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Polygons or a run-length encoding, checked before, as a mask [H, W], bool.

    Raises:
        ImportError: pycocotools is missing.
    """
    masks = _pycocotools()
    rle = segmentation
    if isinstance(rle, list):
        rle = masks.merge(masks.frPyObjects(rle, height, width))
    elif isinstance(rle["counts"], list):
        rle = masks.frPyObjects(rle, height, width)
    return masks.decode(rle).astype(bool)


def _check_fractions(numbers: np.ndarray, sizes: np.ndarray, where: str, wanted: str) -> None:
    if len(numbers) >= 3 and numbers.max() <= 1 and (sizes.min(1) > 2).any():
        raise ValueError(
            f"{where}: no number of a box exceeds 1: they look like fractions of the image, but "
            f"{wanted}"
        )


def _numbers(boxes: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [n, 4] of the boxes that are finite, and (height, width) [n, 2] of their images."""
    finite = [b for b in boxes if len(b[0]) == 4 and all_finite(b[0])]
    numbers = np.array([numbers for numbers, *_ in finite], np.float64).reshape(-1, 4)
    return numbers, np.array([size for _, *size in finite]).reshape(-1, 2)


def _check_rle_form(rle: dict[str, Any], height: int, width: int) -> None:
    size, counts = rle.get("size"), rle.get("counts")
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not isinstance(counts, str | bytes | list)
    ):
        raise ValueError("has a run-length encoding without 'counts' or a 'size' [rows, columns]")
    if list(size) != [height, width]:
        raise ValueError(
            f"has a mask of {list(size)!r:.60} rows and columns in an image of {[height, width]}"
        )


def _rle_extent(runs: np.ndarray, height: int) -> Box:
    """Corners of what runs cover; they go down the columns, from left to right."""
    ends = runs.cumsum()
    (filled,) = runs[1::2].nonzero()
    if not len(filled):
        raise Unusable("no mask: a run-length encoding without a pixel")
    (left, top), (right, low) = (
        divmod(at, height) for at in (ends[::2][filled], ends[1::2][filled] - 1)
    )
    if (right > left).any():  # a run that goes on in the next column touches both edges
        return float(left[0]), 0.0, float(right[-1] + 1), float(height)
    return float(left[0]), float(top.min()), float(right[-1] + 1), float(low.max() + 1)


def _outline(polygon: Sequence[float]) -> float:
    points = np.array(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).sum())


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError("masks need pycocotools: pip install 'e3va[train]'") from error
    return mask


def scale_to(size: tuple[int, int], shorter: int, longer: int) -> float:
    """What brings the shorter side of ``size`` to ``shorter``, and the longer one to ``longer`` at
    the most."""
    return min(shorter / min(size), longer / max(size))


def resized(size: tuple[int, int], shorter: int, longer: int) -> tuple[int, int]:
    """``size`` times :func:`scale_to`, in whole pixels."""
    scale = scale_to(size, shorter, longer)
    return round(scale * size[0]), round(scale * size[1])


def padded(sizes: Iterable[tuple[int, int]], grouped: bool = False) -> tuple[int, int]:
    """Height and width that a batch of images of these sizes may be padded to; of wide ones and
    others by themselves, if ``grouped`` (default: any come together), what has the most pixels."""
    found: dict[bool, tuple[int, int]] = {}
    for height, width in sizes:
        wide = grouped and width > height
        before = found.get(wide, (0, 0))
        found[wide] = max(before[0], height), max(before[1], width)
    return max(found.values(), key=lambda size: size[0] * size[1])
