"""Small data sets that the tests of e3va.data write for themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 30, 40
SQUARE = [5, 5, 15, 5, 15, 15, 5, 15]
"""A polygon, the outline of the box [5, 5, 10, 10]."""


def write_image(path: Path, height: int = HEIGHT, width: int = WIDTH, **options: Any) -> Path:
    """A picture of noise, in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_text(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def annotation(number: int = 1, **entries: Any) -> dict[str, Any]:
    """A COCO annotation of a square; an entry that is ... is left out."""
    complete = {
        "id": number,
        "image_id": 1,
        "category_id": 1,
        "bbox": [5, 5, 10, 10],
        "area": 100,
        "iscrowd": 0,
        "segmentation": [SQUARE],
        **entries,
    }
    return {key: value for key, value in complete.items() if value is not ...}


def coco(annotations: Sequence[Any] = (), count: int = 1, **entries: Any) -> dict[str, Any]:
    """The content of a COCO JSON file of images 1.png, 2.png, …"""
    listed = [
        {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH}
        for number in range(1, count + 1)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {
        "images": listed,
        "annotations": list(annotations),
        "categories": categories,
        **entries,
    }


def write_coco(folder: Path, content: dict[str, Any], name: str = "train.json") -> Path:
    """A COCO JSON file and, in ``images`` beside it, the images that it lists."""
    for image in content["images"]:
        write_image(folder / "images" / image["file_name"].replace("\\", "/"))
    return write_text(folder / name, json.dumps(content))


def xml(objects: Sequence[dict[str, Any]] = (), size: tuple[int, int] | None = (HEIGHT, WIDTH)):
    """Text of a VOC annotation; an object has name, box (xmin, ymin, xmax, ymax), difficult."""
    text = "<annotation>"
    if size:
        text += f"<size><width>{size[1]}</width><height>{size[0]}</height></size>"
    for entry in objects:
        corners = zip(
            ("xmin", "ymin", "xmax", "ymax"), entry.get("box", (6, 6, 15, 15)), strict=False
        )
        box = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
        name, difficult = entry.get("name", "cat"), entry.get("difficult", 0)
        text += f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        text += f"<bndbox>{box}</bndbox></object>"
    return text + "</annotation>"


def write_voc(root: Path, splits: dict[str, dict[str, str]]) -> Path:
    """VOC's tree: for each split the XML text of each image."""
    for split, files in splits.items():
        for name, text in files.items():
            write_image(root / "JPEGImages" / f"{name}.jpg")
            write_text(root / "Annotations" / f"{name}.xml", text)
        write_text(root / "ImageSets/Main" / f"{split}.txt", "\n".join(files))
    return root


def write_yolo(root: Path, labels: dict[str, str], data: str = "") -> Path:
    """Images in images/, labels in labels/, by names such as train/1, and a data.yaml."""
    for name, text in labels.items():
        write_image(root / "images" / f"{name}.png")
        write_text(root / "labels" / f"{name}.txt", text)
    if data:
        write_text(root / "data.yaml", data)
    return root


def write_maps(
    root: Path, splits: dict[str, Sequence[Any]], classes: str | None = None, dtype: Any = np.uint8
) -> Path:
    """For each split maps, each given as the values of its left and its right half, …"""
    shutil.rmtree(root, ignore_errors=True)
    for split, of_split in splits.items():
        for number, values in enumerate(of_split):
            write_image(root / "images" / split / f"{number}.jpg")
            columns = np.array(values)[np.arange(WIDTH) * len(values) // WIDTH]
            path = root / "annotations" / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.tile(columns, (HEIGHT, 1)).astype(dtype)).save(path)
    if classes is not None:
        write_text(root / "classes.csv", classes)
    return root
