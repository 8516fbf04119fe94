"""YOLO's labels: a text file for each image, a line for each object, in fractions of the image.

``class x y width height`` (the box's centre and size) or ``class x1 y1 x2 y2 x3 y3 …`` (a polygon).
A ``data.yaml`` names the classes and the splits; labels lie in ``labels`` where the images lie in
``images``, or beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from e3va.data.images import SUFFIXES, image_size, list_images
from e3va.data.instances import Instances, categories_of

SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
"""Keys of a data.yaml, and our names of the splits."""

CLASS_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels")
"""Files that name the classes where there is no data.yaml."""


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Instances]:
    """The splits that a data.yaml speaks of.

    Raises:
        FileNotFoundError: a folder or a list of images is missing.
        ImportError: PyYAML is missing.
        ValueError: it is no data.yaml, or a label file is broken; names file and line.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError("a data.yaml needs PyYAML: pip install pyyaml") from error
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(content, dict) or "names" not in content:
        raise ValueError(f"{path} is no data.yaml of YOLO: it has no 'names'")
    classes = _names(content["names"], path)
    if content.get("nc", len(classes)) != len(classes):
        raise ValueError(f"{path} says nc {content['nc']}, but names {len(classes)} classes")
    root = path.parent / str(content.get("path") or "")
    splits = {}
    for key, split in SPLITS.items():
        if content.get(key):
            images = _images(content[key], root, path)
            splits[split] = _read(images, classes, f"{path} ({key})")
    if not splits:
        raise ValueError(f"{path} names no split: none of {', '.join(SPLITS)}")
    return splits


def read_folder(folder: str | os.PathLike[str]) -> Instances:
    """A folder of images with their label files beside them, or in ``images`` and ``labels``.

    The classes are those of a ``classes.txt``, a name a line; without one, they are called by
    their numbers.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: a label file is broken; names file and line.
    """
    folder = Path(folder)
    images = list_images(folder)
    if not images:
        raise FileNotFoundError(f"no images in {folder}")
    classes: list[str] | None = None
    for parent in (folder, folder / "labels"):
        for name in CLASS_FILES:
            if (parent / name).is_file():
                lines = (parent / name).read_text(encoding="utf-8-sig").splitlines()
                classes = _names([line.strip() for line in lines if line.strip()], parent / name)
    return _read(images, classes, str(folder))


def label_file(image: Path) -> Path:
    """Where the labels of an image are: beside it, or in ``labels`` for its ``images``."""
    beside = image.with_suffix(".txt")
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            elsewhere = Path(*parts).with_suffix(".txt")
            return elsewhere if elsewhere.is_file() or not beside.is_file() else beside
    return beside


def _names(names: Any, path: Path) -> list[str]:
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise ValueError(
                f"{path} must name the classes 0, 1, 2, …, got {sorted(names, key=str)}"
            )
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path} names no classes")
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} names the class {twice!r} twice")
    return names


def _images(value: Any, root: Path, path: Path) -> list[Path]:
    found: list[Path] = []
    for entry in value if isinstance(value, list) else [value]:
        # Roboflow's paths begin with ../ and mean the folder of the data.yaml.
        places = [root / str(entry), path.parent / str(entry)]
        places.append(path.parent / str(entry).lstrip("./"))
        place = next((p for p in places if p.exists()), None)
        if place is None:
            raise FileNotFoundError(f"{path} names {entry!r}, but there is no {places[0]}")
        if place.is_dir():
            found += list_images(place)
        elif place.suffix == ".txt":
            lines = place.read_text(encoding="utf-8-sig").splitlines()
            for line in filter(None, map(str.strip, lines)):
                image = place.parent / line
                if not image.is_file():
                    raise FileNotFoundError(f"no image at {image}, which {place} lists")
                found.append(image)
        elif place.suffix.lower() in SUFFIXES:
            found.append(place)
        else:
            raise ValueError(f"{path} names {place}, which is no folder, list or image")
    return found


def _read(images: Iterable[Path], classes: list[str] | None, source: str) -> Instances:
    labelled = [(image, *image_size(image), _lines(label_file(image))) for image in images]
    numbers = {number for *_, lines in labelled for _, number, _ in lines}
    if classes is None:
        classes = [str(number) for number in range(max(numbers, default=-1) + 1)]
    result = Instances(source, categories_of(classes))
    polygons = any(len(values) > 4 for *_, lines in labelled for *_, values in lines)
    for path, height, width, lines in labelled:
        image = result.add_image(path, height, width)
        for where, number, values in lines:
            if number >= len(classes):
                raise ValueError(
                    f"{where} has the class {number}, but there are {len(classes)}: 0 to "
                    f"{len(classes) - 1}"
                )
            if len(values) == 4:
                x, y, w, h = values
                box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
                result.add(image, number + 1, box, where=where, wants_mask=polygons)
            else:
                points = [v * (height if i % 2 else width) for i, v in enumerate(values)]
                result.add(image, number + 1, None, [points], where=where)
    return result


def _lines(path: Path) -> list[tuple[str, int, list[float]]]:
    """Where, class and numbers of each line of a label file; none where there is no file."""
    if not path.is_file():
        return []
    found = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"line {number} of {path}"
        try:
            label, values = float(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            raise ValueError(f"{where} is no line of numbers: {line[:60]!r}") from None
        if label != int(label) or label < 0:
            raise ValueError(f"{where} has the class {words[0]}: a whole number is wanted")
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise ValueError(
                f"{where} has {len(values)} numbers after the class: 4 of a box (x y width height) "
                "or 6 and more of a polygon, in pairs"
            )
        if any(abs(value) > 2 for value in values):
            raise ValueError(
                f"{where} has numbers above 1: YOLO's are fractions of the image, not pixels"
            )
        found.append((where, int(label), values))
    return found
