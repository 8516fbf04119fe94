"""Semantic maps: an image of numbers for each image, a class for each pixel."""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from e3va.data.checks import check_files
from e3va.data.images import check_images, check_size, list_images, open_image
from e3va.data.text import read_text

UNLABELLED = 255
"""Label of the pixels that neither train nor count."""

NO_CLASS = ("unlabelled", "unlabeled", "unlabel", "ignore", "ignored", "void", "unknown", "none")
"""Names, in small letters, of values that are no class."""

SPLITS = {
    "train": ("training", "train"),
    "val": ("validation", "val", "valid"),
    "test": ("testing", "test"),
}
"""Our names of the splits, and those of their folders."""

FOLDERS = ("annotations", "masks", "maps", "labels", "annotation", "mask", "SegmentationClass")
"""Names of the folder of maps beside ``images``."""

LARGEST = 65_535
"""The largest value that a class may have in a map."""

ROUND_MAPS = (
    'python -c "import sys; from pathlib import Path; from PIL import Image; '
    "[(Image.open(p).convert('L').point(lambda v: 255 * (v > 127)).save(p.with_suffix('.png')), "
    "p.rename(f'{p}.old')) for p in sorted(Path(sys.argv[1]).glob('*.[jJ]*'))]\""
)
"""A command that takes a folder, and makes PNG files of black and white maps in JPEG."""

CLASS_FILES = ("classes.csv", "_classes.csv", "classes.txt")


@dataclass
class Maps:
    """Images and their maps.

    Attributes:
        source: the folder that they come from, for messages.
        classes: their names.
        values: the class, a position in ``classes``, of each value of a map; other values are
            unlabelled.
        pairs: (image, map) files.
        seen: the values that occur in each map.
        note: what was made of the values, in words.
    """

    source: str
    classes: list[str]
    values: dict[int, int]
    pairs: list[tuple[Path, Path]]
    seen: list[set[int]]
    note: str = ""

    def counts(self) -> dict[str, int]:
        """Maps that each class occurs in."""
        classes = ({self.values[v] for v in found & self.values.keys()} for found in self.seen)
        number = Counter(index for of_map in classes for index in of_map)
        return {name: number[index] for index, name in enumerate(self.classes)}

    def empty(self) -> list[int]:
        """Positions of the maps that no class occurs in."""
        return [i for i, found in enumerate(self.seen) if not found & self.values.keys()]

    def subset(self, chosen: Sequence[int]) -> Maps:
        """Those at some positions of ``pairs``."""
        pairs, seen = [self.pairs[i] for i in chosen], [self.seen[i] for i in chosen]
        return Maps(self.source, self.classes, self.values, pairs, seen, self.note)

    def renamed(self, names: Mapping[str, str | None], classes: Sequence[str]) -> Maps:
        """With other classes: ``names`` of the old ones, None where one is unlabelled from now
        on."""
        values = {
            value: list(classes).index(name)
            for value, index in self.values.items()
            if (name := names.get(self.classes[index])) is not None
        }
        return Maps(self.source, list(classes), values, self.pairs, self.seen, self.note)


def read_values(path: str | os.PathLike[str]) -> np.ndarray:
    """The numbers of a map: [H, W], uint8 or wider.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, damaged, a JPEG, in colour, or has negative numbers; names the
            file.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no map at {path}")
    with open_image(path) as file:
        values, mode, kind = np.asarray(file), file.mode, file.format
    if kind in ("JPEG", "MPO"):
        raise ValueError(
            f"{path} is a JPEG, whose pixels are not the ones that were saved: its values are no "
            "classes. Export the maps as PNG; black and white ones can be rounded by "
            f"{ROUND_MAPS} {shlex.quote(str(Path(path).parent))}"
        )
    if mode == "1":
        return values.astype(np.uint8)
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]  # grey, written in three channels
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"{path} has the mode {mode}: a semantic map has one class number per pixel, in grey "
            "or by a palette"
        )
    if values.min(initial=0) < 0:
        raise ValueError(f"{path} has negative numbers, such as {values.min()}")
    return values


def read_map(path: str | os.PathLike[str], values: Mapping[int, int]) -> np.ndarray:
    """A map's classes: [H, W], uint8, with 255 where a pixel is unlabelled.

    Args:
        path: the file.
        values: the class of each value; others are unlabelled.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_values`.
    """
    found = read_values(path)
    other = max(values, default=0) + 1
    table = np.full(other + 1, UNLABELLED, np.uint8)
    for value, index in values.items():
        table[value] = index
    # Larger ones are clipped: a table of all 32-bit numbers would take gigabytes.
    return table[np.minimum(found, other, dtype=np.int64)]


def read_classes(path: str | os.PathLike[str]) -> dict[int, str]:
    """The names of values: lines "value, name" under any heading, or a name a line, from 0.

    Raises:
        ValueError: a value or a name stands there twice, or none does.
    """
    path = Path(path)
    try:
        lines = csv.reader(io.StringIO(read_text(path), newline=""))
        rows = [[cell.strip() for cell in row] for row in lines if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    if path.suffix == ".txt" and not any(len(row) > 1 and row[0].isdecimal() for row in rows):
        rows = [[str(value), *row] for value, row in enumerate(rows)]
    elif rows and not rows[0][0].isdecimal():
        rows = rows[1:]  # a heading
    names: dict[int, str] = {}
    for row in rows:
        if len(row) < 2 or not row[0].isdecimal() or not row[1] or int(row[0]) > LARGEST:
            raise ValueError(
                f'{path} has the line {",".join(row)!r:.60}: "value, name" is wanted, the value a '
                f"whole number up to {LARGEST}"
            )
        value, name = int(row[0]), row[1]
        if value in names:
            raise ValueError(f"{path} names the value {value} twice")
        if name in names.values() and name.lower() not in NO_CLASS:
            raise ValueError(
                f"{path} calls two values {name!r}: give them different names (and merge them by "
                "the class mapping if one class is meant)"
            )
        names[value] = name
    if not names:
        raise ValueError(f'{path} names no class: lines "value, name" are wanted')
    return names


def read_folder(root: str | os.PathLike[str]) -> dict[str, Maps]:
    """The splits of a folder that holds ``images`` and a folder of maps beside it, each with a
    folder for each split or none; a file ``classes.csv`` names the values.

    A value whose name says that it is no class, or that no line names, is unlabelled. Without such
    a file black and white maps (0 and 255, or 0 and 1) are of a background and an object.

    Raises:
        FileNotFoundError: a folder or a map is missing.
        ValueError: a map is of another size than its image, in colour, damaged or holds values that
            no class has; no pixel to train on is labelled, or the classes are not clear.
    """
    root = Path(root)
    images = root / "images"
    maps = next((root / name for name in FOLDERS if (root / name).is_dir()), None)
    if not images.is_dir() or maps is None:
        raise FileNotFoundError(f"{root} has no images and {' or '.join(FOLDERS[:2])}")
    places = {
        split: (images / name, next((maps / n for n in names if (maps / n).is_dir()), maps / name))
        for split, names in SPLITS.items()
        for name in names
        if (images / name).is_dir()
    } or {"train": (images, maps)}
    pairs = {split: pair(*folders) for split, folders in places.items()}
    seen = {split: look(of_split) for split, of_split in pairs.items()}
    every = {value for of_split in seen.values() for found in of_split for value in found}
    named = next((root / name for name in CLASS_FILES if (root / name).is_file()), None)
    classes, values, note = _classes(every, named, root)
    result = {
        split: Maps(f"{root} ({split})", classes, values, of_split, seen[split], note)
        for split, of_split in pairs.items()
    }
    first = seen["train" if "train" in seen else next(iter(seen))]
    if not any(found & values.keys() for found in first):
        raise ValueError(f"{root}: no pixel of the maps to train on is of a class")
    return result


def pair(images: Path, maps: Path) -> list[tuple[Path, Path]]:
    """The images of a folder, each with the map of the same name.

    Raises:
        FileNotFoundError: a map is missing, or there is no image.
        ValueError: several maps or images have one name.
    """
    if not maps.is_dir():
        raise FileNotFoundError(f"no folder {maps} for the images of {images}")
    by_name: dict[Path, Path] = {}
    for path in list_images(maps):
        name = path.relative_to(maps).with_suffix("")
        if name in by_name:
            raise ValueError(f"{by_name[name]} and {path} have one name: which map is it?")
        by_name[name] = path
    pairs: dict[Path, tuple[Path, Path]] = {}
    for image in list_images(images):
        name = image.relative_to(images).with_suffix("")
        if name not in by_name:
            raise FileNotFoundError(f"no map at {maps / name}.png for the image {image}")
        if name in pairs:
            raise ValueError(f"{pairs[name][0]} and {image} have one name: whose is the map?")
        pairs[name] = (image, by_name[name])
    if not pairs:
        raise FileNotFoundError(f"no images in {images}")
    return list(pairs.values())


def look(pairs: Sequence[tuple[Path, Path]]) -> list[set[int]]:
    """The values that occur in each map; checks them and their images, and that both are of one
    size."""
    images, maps = [image for image, _ in pairs], [path for _, path in pairs]
    sizes = check_images(images)
    seen = []
    for image, path, true_size, (*size, values) in zip(
        images, maps, sizes, check_files(check_map, maps), strict=True
    ):
        check_size(image, true_size, (size[0], size[1]), path)
        seen.append(set(values))
    return seen


def check_map(path: Path) -> tuple[int, int, list[int]]:
    """Height, width and the values that occur in a map.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_values`, or there are more values than a map
            can have classes.
    """
    values = read_values(path)
    if values.dtype == np.uint8:  # Pillow counts faster than NumPy, and lets other threads run
        found = [v for v, count in enumerate(Image.fromarray(values).histogram()) if count]
    else:
        found = np.unique(values).tolist()
    if len(found) > UNLABELLED + 1:
        raise ValueError(
            f"{path} has {len(found)} different values, and at most {UNLABELLED - 1} classes fit: "
            "a semantic map has a number for each class (are these depths, or instances?)"
        )
    height, width = values.shape
    return height, width, found


def _classes(
    seen: set[int], named: Path | None, root: Path
) -> tuple[list[str], dict[int, int], str]:
    found = sorted(seen - {UNLABELLED})
    note = ""
    if named is None:
        if seen in ({0, 255}, {0, 1}):
            note = f"0 is the background, {max(seen)} an object"
            return ["background", "object"], {0: 0, max(seen): 1}, note
        raise ValueError(
            f'{root} names no classes: write a classes.csv with lines "value, name" there. Its '
            f"maps hold {_listed(sorted(seen))}; 255, and values called unlabelled, are ignored"
        )
    names = read_classes(named)
    if seen == {0, 255} and 255 not in names and len(names.keys() - {0}) == 1:
        # Black and white, whose white is counted as 1.
        names = {0: names.get(0, "background"), 255: names[max(names)]}
        note = f"0 is {names[0]}, 255 {names[255]}"
    kept = {v: name for v, name in sorted(names.items()) if name.lower() not in NO_CLASS}
    unknown = [value for value in found if value not in names and value != 0]
    if unknown:
        raise ValueError(
            f"maps in {root} hold the values {_listed(unknown)}, which {named} does not name: name "
            "them, or call them unlabelled"
        )
    if 0 in found and 0 not in names and max(kept, default=0) not in seen:
        raise ValueError(
            f"maps in {root} hold 0, which {named} does not name, and never "
            f"{max(kept, default=0)}, its last: are the values counted from 0? Name 0 there, or "
            "call it unlabelled"
        )
    if len(kept) < 2:
        raise ValueError(
            f"{named} leaves one class, {', '.join(kept.values()) or 'none'}: every pixel would be "
            'of it. Name the background, too ("0, background")'
        )
    if len(kept) >= UNLABELLED:
        raise ValueError(f"{root} has {len(kept)} classes: at most {UNLABELLED - 1} fit a map")
    if ignored := sorted(seen - kept.keys()):
        note = f"the values {_listed(ignored)} are unlabelled"
    return list(kept.values()), {value: index for index, value in enumerate(kept)}, note


def _listed(values: Sequence[Any]) -> str:
    more = f", … ({len(values)})" if len(values) > 8 else ""
    return ", ".join(map(str, values[:8])) + more
