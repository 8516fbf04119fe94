"""What people would rather look at: annotations and predictions drawn in, and curves."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from e3va.data.folder import Data
from e3va.data.geometry import decode_mask
from e3va.data.images import read_image
from e3va.data.maps import UNLABELLED, Maps, read_map
from e3va.figures import font_file, pyplot
from e3va.figures import save as save_figure
from e3va.files import atomic_path

CELL = 320
"""Width of a picture on a page, in pixels."""

THINNEST = 24
"""The least that a side of such a picture has: of a panorama more than a line is seen."""

LEAST = 640
"""What the longer side of a picture by itself has at the least, in pixels."""

COLUMNS = 4
EXAMPLES = 12
OPACITY = 0.45
LONGEST_NAME = 80
"""Letters of a name that are drawn."""
MOST_PLATES = 0.1
"""Share of a picture that the names of its instances may take."""
BACKGROUND = "background"
"""Name, in small letters, of a class that is drawn as no colour: it would veil the picture."""

Plate = tuple[float, float, float, float]
"""Left, top, right and lower edge of what a name is written on."""


def colour(index: int) -> tuple[int, int, int]:
    """A colour for each class: far apart for those next to each other."""
    hue = index * 0.618034 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_instances(
    pixels: np.ndarray,
    instances: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """An image with its instances drawn in, each called by its class, unless there is one alone.

    Where names would cover each other, or more than :data:`MOST_PLATES` of the picture, a legend of
    the classes is drawn instead, and no scores.

    Args:
        pixels: [H, W, 3], uint8, RGB.
        instances: ``bbox`` [x, y, width, height], ``label`` (a position in ``classes``) and, if
            there are such, ``segmentation`` (polygons or a run-length encoding) and ``score``.
        classes: their names.
        size: (width, height) of the picture (default: the image's); boxes and names are drawn
            after it has been resized, so that they can be seen.
    """
    pixels = pixels.copy()
    for instance in instances:
        if instance.get("segmentation"):
            mask = decode_mask(instance["segmentation"], *pixels.shape[:2])
            pixels[mask] = _mixed(pixels[mask], colour(instance["label"]))
    image = _resized(pixels, size)
    across, down = image.width / pixels.shape[1], image.height / pixels.shape[0]
    pen = ImageDraw.Draw(image)
    width = max(1, min(image.size) // 250)
    font = _font_for(image, classes)
    names = []
    for instance in instances:
        x, y, w, h = instance["bbox"]
        left, top = x * across, y * down
        ink = colour(instance["label"])
        pen.rectangle((left, top, left + w * across, top + h * down), outline=ink, width=width)
        words = [classes[instance["label"]]] if len(classes) > 1 else []
        if "score" in instance:
            words.append(f"{instance['score']:.2f}")
        if words:
            text = " ".join(words)
            names.append((_plate(pen, (left, top), text, font), text, ink))
    if _are_crowded([plate for plate, _, _ in names], image):
        if len(classes) > 1:
            _legend(image, {instance["label"] for instance in instances}, classes)
        return image
    for plate, text, ink in names:  # above all boxes
        _label(pen, plate, text, ink, font)
    return image


def draw_map(
    pixels: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """An image [H, W, 3] with its classes [H, W] drawn over it, and their names; ``size`` as
    :func:`draw_instances`. What is called background is left as it is."""
    pixels = pixels.copy()
    shown = [i for i in np.unique(labels) if i != UNLABELLED and classes[i].lower() != BACKGROUND]
    for index in shown:
        mask = labels == index
        pixels[mask] = _mixed(pixels[mask], colour(int(index)))
    image = _resized(pixels, size)
    _legend(image, shown, classes)
    return image


def data_page(data: Data, path: Path, seed: int = 0) -> None:
    """A page of images of each split with their annotations drawn in."""
    pictures = []
    for name, split in data.splits.items():
        for title, image in _examples(split, np.random.default_rng(seed)):
            pictures.append((f"{name}: {title}", image))
    save(page(pictures), path)


def read_cell(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """An image [H, W, 3], uint8, RGB, and (width, height) of its picture on a :func:`page`."""
    pixels = read_image(path)
    height, width = pixels.shape[:2]
    scale = CELL / max(width, height)
    return pixels, (max(THINNEST, round(width * scale)), max(THINNEST, round(height * scale)))


def enlarged(pixels: np.ndarray) -> tuple[int, int]:
    """(width, height) of a picture of an image [H, W, 3] by itself: a whole multiple of its size,
    so that :data:`LEAST` is reached."""
    height, width = pixels.shape[:2]
    factor = math.ceil(LEAST / max(height, width))
    return width * factor, height * factor


def page(pictures: Sequence[tuple[str, Image.Image]], columns: int = COLUMNS) -> Image.Image:
    """Pictures of the size that :func:`read_cell` gives, in rows, each under its title."""
    font = _font(14, [title for title, _ in pictures])
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(image.height for _, image in row) + 24 for row in rows]
    sheet = Image.new("RGB", (columns * (CELL + 8), max(1, sum(heights))), "white")
    pen = ImageDraw.Draw(sheet)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        for column, (title, image) in enumerate(row):
            x = column * (CELL + 8)
            shown = title if len(title) <= 40 else f"{title[:10]}…{title[-29:]}"
            pen.text((x, y + 3), shown, fill="black", font=font)
            sheet.paste(image, (x, y + 22))
        y += height
    return sheet


def curves(metrics: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss and learning rate by iteration, and the metrics of the evaluations.

    Args:
        metrics: lines of metrics.json: ``iteration`` with ``loss`` and ``lr``, or with the results
            of an evaluation.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    steps = [line for line in metrics if "loss" in line]
    scores = [line for line in metrics if "loss" not in line]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4), sharex=True)
    if steps:
        loss = np.array([line["loss"] for line in steps])
        window = max(1, len(loss) // 50)
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        left.plot([line["iteration"] for line in steps][window - 1 :], smooth)
        rate = left.twinx()
        rate.plot(
            [line["iteration"] for line in steps], [line["lr"] for line in steps], color="0.8"
        )
        rate.set_ylabel("learning rate")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        left.set_zorder(rate.get_zorder() + 1)  # the loss is not hidden
        left.patch.set_visible(False)
        name = "loss" if window == 1 else f"loss (mean of {window})"
        left.set(xlabel="iteration", ylabel=name, title="training")
    for name in sorted({key for line in scores for key in line} - {"iteration"}):
        points = [(line["iteration"], line[name]) for line in scores if name in line]
        right.plot(*zip(*points, strict=True), marker="o", label=name)
    if scores:
        right.legend()
    right.set(xlabel="iteration", title="validation")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    save_figure(figure, path)


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def _examples(split: Any, random: np.random.Generator) -> list[tuple[str, Image.Image]]:
    items = split.pairs if isinstance(split, Maps) else split.images
    chosen = sorted(random.permutation(len(items))[:EXAMPLES].tolist())
    found = []
    for i in chosen:
        if isinstance(split, Maps):
            image, labels = items[i]
            pixels, size = read_cell(image)
            drawn = draw_map(pixels, read_map(labels, split.values), split.classes, size)
            found.append((image.name, drawn))
        else:
            place = {category["id"]: n for n, category in enumerate(split.categories)}
            own = [
                {**a, "label": place[a["category_id"]]}
                for a in split.annotations
                if a["image_id"] == items[i]["id"]
            ]
            path = Path(items[i]["file_name"])
            pixels, size = read_cell(path)
            found.append((path.name, draw_instances(pixels, own, split.classes, size)))
    return found


def _mixed(pixels: np.ndarray, ink: tuple[int, int, int]) -> np.ndarray:
    """Pixels [n, 3], uint8, under a veil of ``ink``."""
    return np.rint(pixels + OPACITY * (np.array(ink, np.float32) - pixels)).astype(np.uint8)


def _resized(pixels: np.ndarray, size: tuple[int, int] | None) -> Image.Image:
    image = Image.fromarray(pixels)
    return image if size is None else image.resize(size)


def _font(size: int, texts: Sequence[str]) -> Any:
    return ImageFont.truetype(font_file(frozenset("".join(texts) + "0123456789.…")), size)


def _font_for(image: Image.Image, texts: Sequence[str]) -> Any:
    return _font(max(10, min(image.size) // 35), texts)


def _legend(image: Image.Image, labels: Iterable[int], classes: Sequence[str]) -> None:
    """Write the names of ``labels``, positions in ``classes``, from the upper left corner down."""
    pen = ImageDraw.Draw(image)
    font = _font_for(image, classes)
    x, y, right = 2.0, 2.0, 0.0
    for label in sorted(labels):
        plate = _plate(pen, (x, y), classes[label], font, below=True)
        if plate[3] > image.height and y > 2:
            x, y = right + 2, 2.0
            plate = _plate(pen, (x, y), classes[label], font, below=True)
        _label(pen, plate, classes[label], colour(int(label)), font)
        y, right = plate[3], max(right, plate[2])


def _are_crowded(plates: Sequence[Plate], image: Image.Image) -> bool:
    """Whether plates cover each other, or too much of the image."""
    areas = ((right - left) * (lower - upper) for left, upper, right, lower in plates)
    return sum(areas) > MOST_PLATES * image.width * image.height or any(
        _overlap(one, other) for one, other in itertools.combinations(plates, 2)
    )


def _plate(
    pen: Any, corner: tuple[float, float], text: str, font: Any, below: bool = False
) -> Plate:
    """Where text is written above or below ``corner``, within the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), text[:LONGEST_NAME], font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(corner[0], pen.im.size[0] - 1 - width))
    y = corner[1] if below else max(0, corner[1] - height)
    return x, y, x + width, y + height


def _label(pen: Any, plate: Plate, text: str, ink: tuple[int, int, int], font: Any) -> None:
    """Text on a plate of ``ink``, black or white, whichever can be read."""
    text = text[:LONGEST_NAME]
    left, top, _, _ = pen.textbbox((0, 0), text, font=font)
    red, green, blue = ink
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128
    pen.rectangle(plate, fill=ink)
    pen.text(
        (plate[0] + 2 - left, plate[1] + 2 - top),
        text,
        fill="white" if dark else "black",
        font=font,
    )


def _overlap(one: Plate, other: Plate) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
