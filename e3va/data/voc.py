"""Pascal VOC's boxes: an XML file for each image, in VOC's tree or in flat folders."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from e3va.data.geometry import check_fractions
from e3va.data.images import check_images, check_size, list_files, list_images
from e3va.data.instances import Instances, categories_of
from e3va.data.text import read_text

CORNERS = ("xmin", "ymin", "xmax", "ymax")


Pairs = list[tuple[Path, Path | None]]
"""Images and their XML files."""


class Object(NamedTuple):
    """An object of an XML file: its name, whether it is difficult, and its corners, counted from
    1, the last pixel included."""

    name: str
    difficult: bool
    corners: tuple[float, float, float, float]


def read_tree(
    root: str | os.PathLike[str], splits: Sequence[str] | None = None
) -> dict[str, Instances]:
    """Splits of a tree with Annotations, ImageSets/Main and JPEGImages.

    Args:
        root: the tree.
        splits: their names (default: "train", "val" and "test" where it has them; "train" is
            "trainval" where that alone is there).

    Raises:
        FileNotFoundError: a split, an image or an annotation is missing.
        ValueError: an XML file is broken; names it.
    """
    root = Path(root)
    lists = {path.stem: path for path in sorted((root / "ImageSets/Main").glob("*.txt"))}
    known = ", ".join(lists) or "none"
    if splits is None:
        if "train" not in lists and "trainval" in lists:
            lists["train"] = lists["trainval"]
        splits = [split for split in ("train", "val", "test") if split in lists]
    if not splits:
        raise FileNotFoundError(f"{root / 'ImageSets/Main'} has no train.txt and no trainval.txt")
    for split in splits:
        if split not in lists:
            raise FileNotFoundError(
                f"no split {split!r} at {root / 'ImageSets/Main' / split}.txt; known: {known}"
            )
    images = _by_name(list_images(root / "JPEGImages"), root / "JPEGImages")
    pairs: dict[str, Pairs] = {}
    for split in splits:
        pairs[split] = []
        for line in filter(None, map(str.strip, read_text(lists[split]).splitlines())):
            # Lists of one class end each line in 1, 0 or -1.
            name = line if line in images else re.sub(r"\s+-?[01]$", "", line)
            if name not in images:
                raise FileNotFoundError(
                    f"no image {name!r} in {root / 'JPEGImages'}, but {lists[split]} lists it"
                )
            pairs[split].append((images[name], root / "Annotations" / f"{name}.xml"))
    return _read(pairs, str(root))


def read_folder(folder: str | os.PathLike[str]) -> dict[str, Instances]:
    """Flat folders of images and XML files of the same names, or split into folders called train,
    val (valid) and test. Images without an XML file have no object.

    Raises:
        FileNotFoundError: there is no image to an XML file.
        ValueError: an XML file is broken, or several images or XML files have one name; names it.
    """
    folder = Path(folder)
    named = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
    splits = {
        split: folder / name
        for split, names in named.items()
        for name in names
        if (folder / name).is_dir()
    }
    pairs = {split: _pair(place) for split, place in (splits or {"train": folder}).items()}
    return _read(pairs, str(folder))


def read_xml(path: str | os.PathLike[str]) -> tuple[tuple[int, int] | None, list[Object]]:
    """The image's (height, width), None if it is not given, and its objects.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no annotation of Pascal VOC.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file at {path}")
    text = path.read_bytes()
    try:
        # Entities that hold entities grow to gigabytes, and no tool for labels writes any. In
        # UTF-16 there is a zero beside each letter.
        if b"<!ENTITY" in text.replace(b"\0", b""):
            raise ValueError("it defines entities")
        content = ElementTree.fromstring(text)
        if content.tag != "annotation":
            raise ValueError(f"its root is <{content.tag:.60}>, not <annotation>")
        size = tuple(_size(content.findtext(f"size/{side}")) for side in ("height", "width"))
        objects = [_object(item) for item in content.findall("object")]
    except (ElementTree.ParseError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{path} is no annotation of Pascal VOC: {error}") from error
    return (size if all(size) else None), objects  # type: ignore[return-value]


def _size(text: str | None) -> int:
    return round(float(text)) if text and text.strip() else 0


def _object(item: Any) -> Object:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    difficult = (item.findtext("difficult") or "0").strip().lower()
    if difficult not in ("0", "1", "true", "false", ""):
        raise ValueError(f"an object {name!r} has the difficult {difficult!r}, not 0 or 1")
    corners = []
    for corner in CORNERS:
        text = item.findtext(f"bndbox/{corner}")
        if text is None or not text.strip():
            raise ValueError(f"an object {name!r} has no {corner}")
        corners.append(float(text))
    if not all(map(math.isfinite, corners)):
        raise ValueError(f"an object {name!r} has the corners {corners}")
    return Object(name, difficult in ("1", "true"), tuple(corners))  # type: ignore[arg-type]


def _pair(folder: Path) -> Pairs:
    annotations = _by_name(list_files(folder, (".xml",)), folder)
    images = list_images(folder)
    found = _by_name([image for image in images if image.stem in annotations], folder)
    missing = annotations.keys() - found.keys()
    if missing:
        raise FileNotFoundError(f"no image in {folder} for {annotations[min(missing)]}")
    return [(image, annotations.get(image.stem)) for image in images]


def _by_name(paths: list[Path], folder: Path) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in paths:
        if (other := names.setdefault(path.stem, path)) != path:
            raise ValueError(
                f"{other} and {path} have one name: which is meant? Keep or rename one, or name "
                f"the folder that is meant instead of {folder}"
            )
    return names


def _read(pairs: dict[str, Pairs], source: str) -> dict[str, Instances]:
    read = {
        split: [(image, xml, *(read_xml(xml) if xml else (None, []))) for image, xml in of_split]
        for split, of_split in pairs.items()
    }
    names = sorted({o.name for of_split in read.values() for *_, found in of_split for o in found})
    numbers = {name: number for number, name in enumerate(names, start=1)}
    splits = {}
    for split, of_split in read.items():
        result = splits[split] = Instances(f"{source} ({split})", categories_of(names))
        if bare := sum(xml is None for _, xml, *_ in of_split):
            result.notes.append(f"{bare} images of {split} have no XML file: nothing is on them")
        boxes = []
        sizes = check_images([path for path, *_ in of_split])
        for (path, xml, told, objects), size in zip(of_split, sizes, strict=True):
            if told:
                check_size(path, size, told, xml)
            image = result.add_image(path, *size)
            for number, found in enumerate(objects, start=1):
                where = f"object {number} of {xml}"
                xmin, ymin, xmax, ymax = found.corners
                boxes.append(([xmin, ymin, xmax, ymax], image["height"], image["width"]))
                if not (xmin < xmax and ymin < ymax):
                    result.drop("box without width or height", where=where)
                    continue
                # VOC counts pixels from 1 and includes the last.
                result.add(
                    image,
                    numbers[found.name],
                    [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1],
                    where=where,
                    crowd=found.difficult,
                )
        check_fractions(boxes, result.source, "VOC's are corners in pixels")
    return splits
