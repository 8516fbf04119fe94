"""COCO's JSON files, read with distrust."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from e3va.data.geometry import HUGE, check_convention, is_number
from e3va.data.images import check_images, check_size, match_images
from e3va.data.instances import Instances
from e3va.data.text import read_text

NO_CROWD = (None, 0, "0", "false", "False", "")
CROWD = (1, "1", "true", "True")

FOLDERS = ("", "images", "images/{split}", "{split}", "{stem}", "data", "JPEGImages")
"""Where images may lie, beside a JSON file or its folder."""


def read_json(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    masks: bool | None = None,
) -> Instances:
    """The instances that a COCO JSON file annotates.

    Of categories that share a name those without an instance are left out.

    Args:
        path: the JSON file.
        images: the folder that its file names are relative to (default: found beside it).
        masks: leave out what has no mask (default: if most have one); False: leave out all masks.

    Raises:
        FileNotFoundError: the file or an image is missing.
        ValueError: it is not in COCO's format, or says what cannot be meant; names the annotation.
    """
    content = read_content(path)
    folder = find_images(path, content) if images is None else images
    result = Instances(str(path), _categories(content, path))
    by_id = _add_images(result, content["images"], folder, path)
    known = {str(category["id"]): category["id"] for category in result.categories}
    annotations = content["annotations"]
    if masks is None:
        masks = sum(bool(a.get("segmentation")) for a in annotations) > len(annotations) / 2
    ids: set[str] = set()
    boxes = []
    for annotation in annotations:
        where = f"annotation {annotation.get('id')!s:.60} of {path}"
        for key in ("image_id", "category_id"):
            if annotation.get(key) is None:
                raise ValueError(f"{where} has no {key!r}")
        if (image := by_id.get(_key(annotation["image_id"]))) is None:
            raise ValueError(f"{where} names the unknown image {annotation['image_id']!r:.60}")
        if (category_id := known.get(_key(annotation["category_id"]))) is None:
            raise ValueError(
                f"{where} names the unknown category {annotation['category_id']!r:.60}"
            )
        if annotation.get("id") is not None:
            if (number := _key(annotation["id"])) in ids:
                raise ValueError(f"{where} is not the only one with this id")
            ids.add(number)
        height, width = image["height"], image["width"]
        area = annotation.get("area")
        # Evaluation would leave out an instance with an area below 0 without a word.
        more = {"area": float(area)} if is_number(area) and 0 < area <= height * width else {}
        bbox = annotation.get("bbox") or None
        if bbox:
            boxes.append((bbox, height, width))
        result.add(
            image,
            category_id,
            bbox,
            annotation.get("segmentation") or None,
            where=where,
            crowd=_crowd(annotation.get("iscrowd"), where),
            wants_mask=masks,
            **more,
        )
    check_convention(boxes or _kept_boxes(result), str(path))
    return result


def read_content(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a COCO JSON file: lists of images, annotations and categories.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, a list or something in it is missing, it has no category, or two
            images or categories have one id.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no annotation file at {path}")
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} is not in COCO's format: it has no list {key!r}")
    for kind, keys in _REQUIRED.items():
        for i, entry in enumerate(content[kind]):
            where = f"{path} is not in COCO's format: {kind}[{i}]"
            if not isinstance(entry, dict):
                raise ValueError(f"{where} is {entry!r:.60}")
            for key, fits in keys.items():
                if key not in entry and not fits(None):
                    raise ValueError(f"{where} has no {key!r}")
                if not fits(entry.get(key)):
                    raise ValueError(f"{where} has the {key} {entry[key]!r:.60}")
    if not content["categories"]:
        raise ValueError(f"{path} has no category")
    for kind in ("images", "categories"):
        seen: set[str] = set()
        for entry in content[kind]:
            if _key(entry["id"]) in seen:
                raise ValueError(f"{path} has several {kind} with the id {entry['id']!r}")
            seen.add(_key(entry["id"]))
    for annotation in content["annotations"]:
        box = annotation.get("bbox")
        if box is not None and not (isinstance(box, list) and all(map(is_number, box))):
            raise ValueError(
                f"annotation {annotation.get('id')!s:.60} of {path} has a bbox that is no list of "
                f"numbers: {box!r:.60}"
            )
    return content


def find_images(path: str | os.PathLike[str], content: dict[str, Any] | None = None) -> Path:
    """The folder that the file names of a COCO JSON file are relative to: the file's own, one of
    :data:`FOLDERS`, or one of these beside the file's folder.

    Args:
        path: the JSON file.
        content: what :func:`read_content` gives (default: read here).

    Raises:
        FileNotFoundError: none of them holds the first images.
    """
    path = Path(path)
    content = read_content(path) if content is None else content
    names = [image["file_name"].replace("\\", "/") for image in content["images"][:8]]
    split = path.stem.removeprefix("instances_").removesuffix("_annotations.coco").strip("_.")
    folders = [folder.format(split=split, stem=path.stem) for folder in FOLDERS]
    places = [base / folder for base in (path.parent, path.parent.parent) for folder in folders]
    tried = [place for place in dict.fromkeys(places) if place.is_dir()]
    for place in tried:
        if all(os.path.isfile(place / name) for name in names):
            return place
    # What lies about the file's folder, such as a home, may be too much to be searched.
    for place in tried:
        if place != path.parent.parent:
            try:
                match_images(names, place, path)
            except (FileNotFoundError, ValueError):
                continue
            return place
    missing = [n for n in names if not any(os.path.isfile(place / n) for place in tried)]
    raise FileNotFoundError(
        f"the images that {path} lists, such as {(missing or names)[0]!r:.200}, are in none of "
        f"{', '.join(map(str, tried))}: name their folder (--images)"
    )


def is_coco(path: Path) -> bool:
    """Whether a JSON file looks like COCO's, without parsing it; detections, captions and settings
    lie about in folders of data, too."""
    try:
        text = read_text(path)
    except (ValueError, OSError):
        return False
    keys = ("images", "annotations", "categories")
    return text.lstrip()[:1] == "{" and all(re.search(rf'"{key}"\s*:', text) for key in keys)


def _add_images(result: Instances, entries: list[Any], folder: Any, path: Any) -> dict[str, Any]:
    """Images by :func:`_key` of their ids."""
    files = match_images([entry["file_name"] for entry in entries], folder, path)
    # Evaluation sorts ids, which it cannot if they are of both types.
    mixed = len({type(entry["id"]) for entry in entries}) > 1
    by_id = {}
    for entry, file, size in zip(entries, files, check_images(files), strict=True):
        if entry.get("height") is not None and entry.get("width") is not None:
            told = round(entry["height"]), round(entry["width"])
            check_size(file, size, told, f"{path} ({entry['file_name']})")
        more = {k: v for k, v in entry.items() if k not in ("id", "file_name", "height", "width")}
        key = _key(entry["id"])
        by_id[key] = result.add_image(file, *size, key if mixed else entry["id"], **more)
    return by_id


def _categories(content: dict[str, Any], path: Any) -> list[dict[str, Any]]:
    """Categories with whole numbers for ids, ordered by them, and a name each."""
    used = Counter(
        _key(a["category_id"]) for a in content["annotations"] if a.get("category_id") is not None
    )
    by_name: dict[str, dict[str, Any]] = {}
    for category in sorted(content["categories"], key=lambda category: int(category["id"])):
        category = {**category, "id": int(category["id"])}
        other = by_name.setdefault(category["name"], category)
        if other is category or not used[str(category["id"])]:
            continue
        if used[str(other["id"])]:
            raise ValueError(
                f"{path} has instances of two categories that are called {category['name']!r}, "
                f"{other['id']} and {category['id']}: rename one, or merge them"
            )
        by_name[category["name"]] = category
    return sorted(by_name.values(), key=lambda category: category["id"])


def _kept_boxes(result: Instances) -> list[tuple[list[float], int, int]]:
    sizes = {image["id"]: (image["height"], image["width"]) for image in result.images}
    return [(a["bbox"], *sizes[a["image_id"]]) for a in result.annotations]


def _key(value: Any) -> str:
    """An id as text: files have 1, "1" and 1.0 for one image."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value)


def _is_text(value: Any) -> bool:
    """JSON can hold half of a character, which no file can."""
    return isinstance(value, str) and bool(value) and not re.search("[\ud800-\udfff]", value)


def _is_side(value: Any) -> bool:
    return value is None or (is_number(value) and 1 <= value < HUGE and value == round(value))


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_id(value) and (isinstance(value, int) or value.isdecimal())


_REQUIRED: dict[str, dict[str, Any]] = {
    "images": {"id": _is_id, "file_name": _is_text, "height": _is_side, "width": _is_side},
    "categories": {"id": _is_whole, "name": _is_text},
    "annotations": {},
}


def _crowd(value: Any, where: str) -> bool:
    if value in NO_CROWD:
        return False
    if value in CROWD:
        return True
    raise ValueError(f"{where} has the iscrowd {value!r:.60}: 0 or 1 is wanted")
