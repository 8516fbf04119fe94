"""Pascal VOC's boxes: an XML file for each image, in VOC's tree or in flat folders."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from e3va.data.images import image_size, list_images
from e3va.data.instances import Instances, categories_of

CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Object(NamedTuple):
    """An object of an XML file: its name, whether it is difficult, and its corners, counted from
    1, the last pixel included."""

    name: str
    difficult: bool
    corners: tuple[float, float, float, float]


def read_tree(root: str | os.PathLike[str]) -> dict[str, Instances]:
    """The splits of a tree with Annotations, ImageSets/Main and JPEGImages: "train", "val" and
    "test" where it has them; "train" is "trainval" where that alone is there.

    Raises:
        FileNotFoundError: a folder, an image or an annotation is missing.
        ValueError: an XML file is broken; names it.
    """
    root = Path(root)
    lists = {path.stem: path for path in (root / "ImageSets/Main").glob("*.txt")}
    if "train" not in lists and "trainval" in lists:
        lists["train"] = lists["trainval"]
    wanted = [split for split in ("train", "val", "test") if split in lists]
    if not wanted:
        raise FileNotFoundError(f"{root / 'ImageSets/Main'} has no train.txt and no trainval.txt")
    images = {path.stem: path for path in list_images(root / "JPEGImages")}
    pairs: dict[str, Any] = {}
    for split in wanted:
        pairs[split] = []
        # Lists of one class end each line in 1 or -1.
        lines = lists[split].read_text(encoding="utf-8-sig").splitlines()
        for name in (line.split()[0] for line in lines if line.strip()):
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
        ValueError: an XML file is broken; names it.
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
    try:
        content = ElementTree.parse(path)
        size = tuple(_size(content.findtext(f"size/{side}")) for side in ("height", "width"))
        objects = [_object(item) for item in content.findall("object")]
    except (ElementTree.ParseError, ValueError, LookupError) as error:
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


def _pair(folder: Path) -> list[tuple[Path, Path | None]]:
    annotations: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.xml")):
        if path.stem in annotations:
            raise ValueError(
                f"{annotations[path.stem]} and {path} have one name: which image is whose?"
            )
        annotations[path.stem] = path
    images = list_images(folder)
    missing = annotations.keys() - {image.stem for image in images}
    if missing:
        raise FileNotFoundError(f"no image in {folder} for {annotations[min(missing)]}")
    return [(image, annotations.get(image.stem)) for image in images]


def _read(
    pairs: dict[str, Iterable[tuple[Path, Path | None]]] | dict[str, Any], source: str
) -> dict[str, Instances]:
    read: dict[str, list[tuple[Path, Path | None, Any, list[Object]]]] = {
        split: [(image, xml, *(read_xml(xml) if xml else (None, []))) for image, xml in of_split]
        for split, of_split in pairs.items()
    }
    names = sorted({o.name for of_split in read.values() for *_, found in of_split for o in found})
    numbers = {name: number for number, name in enumerate(names, start=1)}
    splits = {}
    for split, of_split in read.items():
        result = splits[split] = Instances(f"{source} ({split})", categories_of(names))
        for path, xml, size, objects in of_split:
            true_size = image_size(path)
            if size and size != true_size:
                raise ValueError(
                    f"{xml} says {size[1]}×{size[0]} pixels, but {path} is "
                    f"{true_size[1]}×{true_size[0]}"
                )
            image = result.add_image(path, *true_size)
            for number, found in enumerate(objects, start=1):
                xmin, ymin, xmax, ymax = found.corners
                if not (xmin < xmax and ymin < ymax):
                    result.drop("box without width or height")
                    continue
                # VOC counts pixels from 1 and includes the last.
                result.add(
                    image,
                    numbers[found.name],
                    [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1],
                    where=f"object {number} of {xml}",
                    crowd=found.difficult,
                )
    return splits
