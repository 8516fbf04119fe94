"""YOLO's labels: a text file for each image, a line for each object, in fractions of the image.

``class x y width height`` (the box's centre and size) or ``class x1 y1 x2 y2 x3 y3 …`` (a polygon).
A ``data.yaml`` names the classes and the splits; labels lie in ``labels`` where the images lie in
``images``, or beside them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from e3va.data.images import SUFFIXES, check_images, list_images
from e3va.data.instances import Instances, categories_of
from e3va.data.text import load_yaml, read_text

_ABSENT = ("", "null", "~")
"""How YAML says that there is nothing."""

SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
"""Keys of a data.yaml, and our names of the splits."""

CLASS_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels")
"""Files that name the classes where there is no data.yaml."""


MOST_CLASSES = 10_000
"""A class number from here on is a mistake, where no file says how many classes there are."""


def read_yaml(path: str | os.PathLike[str], *, masks: bool | None = None) -> dict[str, Instances]:
    """The splits that a data.yaml speaks of.

    Args:
        path: the file.
        masks: leave out boxes (default: if most are polygons); False: polygons become boxes.

    Raises:
        FileNotFoundError: a folder or a list of images is missing.
        ImportError: PyYAML is missing.
        ValueError: it is no data.yaml, or a label file is broken; names file and line.
    """
    path = Path(path)
    content = load_yaml(path)
    if not isinstance(content, dict) or "names" not in content:
        raise ValueError(f"{path} is no data.yaml of YOLO: it has no 'names'")
    if content.get("kpt_shape") not in (None, *_ABSENT):
        raise ValueError(f"{path} has a kpt_shape: its labels are of poses, which we do not train")
    classes = _names(content["names"], path)
    count = content.get("nc")
    if count not in (None, *_ABSENT) and (not _is_scalar(count) or str(count) != str(len(classes))):
        raise ValueError(f"{path} has an nc that is not {len(classes)}, the number of its names")
    root = path.parent / _text(content.get("path") or "", "path", path)
    splits: dict[str, Instances] = {}
    for key, split in SPLITS.items():
        if content.get(key) not in (None, [], *_ABSENT):
            if split in splits:
                raise ValueError(f"{path} has both val and valid: keep the one that is meant")
            if masks is None and splits:  # as in those to train on
                masks = splits["train"].has_masks if "train" in splits else None
            images = _images(content[key], key, root, path)
            splits[split] = _read(images, classes, f"{path} ({key})", masks)
    if not splits:
        raise ValueError(f"{path} names no split: none of {', '.join(SPLITS)}")
    return splits


def read_folder(folder: str | os.PathLike[str], *, masks: bool | None = None) -> Instances:
    """A folder of images with their label files beside them, or in ``images`` and ``labels``.

    The classes are those of a ``classes.txt``, a name a line; without one, they are called by
    their numbers.

    Args:
        folder: the folder.
        masks: as :func:`read_yaml`.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: a label file is broken; names file and line.
    """
    folder = Path(folder)
    images = list_images(folder)
    if not images:
        raise FileNotFoundError(f"no images in {folder}")
    classes: list[str] | None = None
    places = (parent / name for parent in (folder, folder / "labels") for name in CLASS_FILES)
    if file := next(filter(Path.is_file, places), None):
        classes = _names(list(filter(None, map(str.strip, read_text(file).splitlines()))), file)
    return _read(images, classes, str(folder), masks)


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


def _is_scalar(value: Any) -> bool:
    """Not a list of lists of …: a few lines of YAML can hold one whose text is gigabytes."""
    return isinstance(value, str | int | float)


def _text(value: Any, key: str, path: Path) -> str:
    if not _is_scalar(value):
        raise ValueError(f"{path} has a {type(value).__name__} for {key!r}: a text is wanted")
    return str(value)


def _names(names: Any, path: Path) -> list[str]:
    if isinstance(names, dict):
        numbers = {_text(key, "names", path): name for key, name in names.items()}
        wrong = sorted(numbers.keys() ^ set(map(str, range(len(names)))))
        if wrong:
            raise ValueError(
                f"{path} must name the classes 0, 1, 2, …: {', '.join(wrong[:8])} "
                "should not be there, or is missing"
            )
        names = [numbers[str(number)] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path} names no classes")
    names = [_text(name, "names", path) for name in names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} names the class {twice!r} twice")
    return names


def _images(value: Any, key: str, root: Path, path: Path) -> list[Path]:
    found: list[Path] = []
    for entry in value if isinstance(value, list) else [value]:
        name = _text(entry, key, path).replace("\\", "/")
        # Roboflow's paths begin with ../ and mean the folder of the data.yaml.
        places = [root / name, path.parent / name, path.parent / re.sub(r"^(\.*/)+", "", name)]
        place = next(filter(os.path.exists, places), None)
        if place is None:
            raise FileNotFoundError(f"{path} names {name!r}, but there is no {places[0]}")
        if place.is_dir():
            found += list_images(place)
        elif place.suffix.lower() == ".txt":
            found += [
                _listed(line.strip(), place)
                for line in read_text(place).splitlines()
                if line.strip()
            ]
        elif place.suffix.lower() in SUFFIXES:
            found.append(place)
        else:
            raise ValueError(f"{path} names {place}, which is no folder, list or image")
    if not found:
        raise FileNotFoundError(f"{path} names {key}, but there are no images")
    return list(dict.fromkeys(found))


def _listed(line: str, by: Path) -> Path:
    image = by.parent / line.replace("\\", "/")
    if not os.path.isfile(image):  # unlike Path's it takes any text
        raise FileNotFoundError(f"no image at {image}, which {by} lists")
    return image


def _read(
    images: Iterable[Path], classes: list[str] | None, source: str, masks: bool | None
) -> Instances:
    files = {image: label_file(image) for image in images}
    _check_names(files)
    sizes = check_images(list(files))
    labelled = [
        (image, *size, _lines(file))
        for (image, file), size in zip(files.items(), sizes, strict=True)
    ]
    objects = [values for *_, lines in labelled for *_, values in lines]
    if masks is None:
        masks = sum(len(values) > 4 for values in objects) > len(objects) / 2
    if classes is None:
        largest = max((number for *_, lines in labelled for _, number, _ in lines), default=-1)
        if largest >= MOST_CLASSES:
            raise ValueError(
                f"{source} has the class {largest}, and no file that names the classes "
                f"({CLASS_FILES[0]})"
            )
        classes = [str(number) for number in range(largest + 1)]
    result = Instances(source, categories_of(classes))
    if bare := sum(not file.is_file() for file in files.values()):
        result.notes.append(f"{bare} images of {source} have no label file: nothing is on them")
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
                result.add(image, number + 1, box, where=where, wants_mask=masks)
            else:
                points = [v * (height if i % 2 else width) for i, v in enumerate(values)]
                result.add(image, number + 1, None, [points], where=where, wants_mask=masks)
    return result


def _check_names(files: dict[Path, Path]) -> None:
    """That no two images share a label file that is there."""
    owners: dict[Path, Path] = {}
    for image, file in files.items():
        if (other := owners.setdefault(file, image)) != image and file.is_file():
            raise ValueError(f"{other} and {image} both have the labels {file}: keep or rename one")


def _lines(path: Path) -> list[tuple[str, int, list[float]]]:
    """Where, class and numbers of each line of a label file; none where there is no file."""
    found = []
    for number, line in enumerate(read_text(path).splitlines() if path.is_file() else (), start=1):
        words = line.split()
        if not words:
            continue
        where = f"line {number} of {path}"
        try:
            label, *values = map(float, words)
        except ValueError:
            raise ValueError(f"{where} is no line of numbers: {line[:60]!r}") from None
        if not (label >= 0 and label.is_integer()):
            raise ValueError(f"{where} has the class {words[0]:.60}: a whole number is wanted")
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise ValueError(
                f"{where} has {len(values)} numbers after the class: 4 of a box (x y width height) "
                "or 6 and more of a polygon, in pairs"
            )
        if any(2 < abs(value) < math.inf for value in values):  # others are dropped, and counted
            raise ValueError(
                f"{where} has numbers above 1: YOLO's are fractions of the image, not pixels"
            )
        found.append((where, int(label), values))
    return found
