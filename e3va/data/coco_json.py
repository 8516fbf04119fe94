"""COCO's JSON files, read with distrust."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from e3va.data.geometry import check_convention, is_number
from e3va.data.images import image_size, match_images
from e3va.data.instances import Instances

NO_CROWD = (None, 0, False, "0", "false", "False", "")
CROWD = (1, True, "1", "true", "True")


def read_json(
    path: str | os.PathLike[str], images: str | os.PathLike[str], *, masks: bool | None = None
) -> Instances:
    """The instances that a COCO JSON file annotates.

    Args:
        path: the JSON file.
        images: the folder that its file names are relative to.
        masks: leave out what has no mask (default: if most have one); False: leave out all masks.

    Raises:
        FileNotFoundError: the file or an image is missing.
        ValueError: it is not in COCO's format, or says what cannot be meant; names the annotation.
    """
    content = read_content(path)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    result = Instances(str(path), [dict(category) for category in categories])
    files = match_images([image["file_name"] for image in content["images"]], images, path)
    by_id = {}
    for image, file in zip(content["images"], files, strict=True):
        size = round(image["height"]), round(image["width"])
        true_size = image_size(file)
        if size != true_size:
            raise ValueError(
                f"{path} says that {image['file_name']} is {size[1]}×{size[0]} pixels, but {file} "
                f"is {true_size[1]}×{true_size[0]}"
            )
        more = {k: v for k, v in image.items() if k not in ("id", "file_name", "height", "width")}
        by_id[image["id"]] = result.add_image(file, *size, image["id"], **more)
    known = {category["id"] for category in categories}
    ids: set[Any] = set()
    if masks is None:
        masked = sum(bool(annotation.get("segmentation")) for annotation in content["annotations"])
        masks = masked > len(content["annotations"]) / 2
    for annotation in content["annotations"]:
        where = f"annotation {annotation.get('id')} of {path}"
        for key in ("image_id", "category_id"):
            if annotation.get(key) is None:
                raise ValueError(f"{where} has no {key!r}")
        image = _find(by_id, annotation["image_id"], f"{where} names the unknown image")
        category_id = annotation["category_id"]
        if category_id not in known:
            raise ValueError(f"{where} names the unknown category {category_id!r}")
        if annotation.get("id") is not None:
            if annotation["id"] in ids:
                raise ValueError(f"{where} is not the only one with this id")
            ids.add(annotation["id"])
        area = annotation.get("area")
        more = {"area": float(area)} if is_number(area) and math.isfinite(area) else {}
        result.add(
            image,
            category_id,
            annotation.get("bbox"),
            annotation.get("segmentation") or None if masks else None,
            where=where,
            crowd=_crowd(annotation.get("iscrowd"), where),
            wants_mask=masks,
            **more,
        )
    check_convention(
        [
            (annotation["bbox"], image["height"], image["width"])
            for annotation in content["annotations"]
            if annotation.get("bbox") and (image := by_id.get(annotation["image_id"]))
        ],
        str(path),
    )
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
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} is not in COCO's format: it has no list {key!r}")
    for kind, keys in _REQUIRED.items():
        for i, entry in enumerate(content[kind]):
            for key, fits in keys.items():
                if not isinstance(entry, dict) or key not in entry:
                    raise ValueError(f"{path} is not in COCO's format: {kind}[{i}] has no {key!r}")
                if not fits(entry[key]):
                    raise ValueError(
                        f"{path} is not in COCO's format: {kind}[{i}] has the {key} {entry[key]!r}"
                    )
            if not isinstance(entry, dict):
                raise ValueError(f"{path} is not in COCO's format: {kind}[{i}] is {entry!r}")
    if not content["categories"]:
        raise ValueError(f"{path} has no category")
    for kind in ("images", "categories"):
        seen: set[Any] = set()
        for entry in content[kind]:
            if entry["id"] in seen:
                raise ValueError(f"{path} has several {kind} with the id {entry['id']!r}")
            seen.add(entry["id"])
    for annotation in content["annotations"]:
        box = annotation.get("bbox")
        if box is not None and not (isinstance(box, list) and all(map(is_number, box))):
            raise ValueError(
                f"annotation {annotation.get('id')} of {path} has a bbox that is no list of "
                f"numbers: {box!r}"
            )
    return content


def find_images(path: str | os.PathLike[str]) -> Path:
    """The folder that the file names of a COCO JSON file are relative to: the file's own, one
    called ``images`` or as the file or its split, or one of these beside or above it.

    Raises:
        FileNotFoundError: none of them holds the first images.
    """
    path = Path(path)
    content = read_content(path)
    names = [image["file_name"].replace("\\", "/") for image in content["images"][:8]]
    split = path.stem.removeprefix("instances_").removesuffix("_annotations.coco").strip("_.")
    tried = []
    for base in (path.parent, path.parent.parent):
        for folder in ("", "images", f"images/{split}", split, path.stem, "data", "JPEGImages"):
            place = base / folder
            if place not in tried and place.is_dir():
                if all((place / name).is_file() for name in names):
                    return place
                tried.append(place)
    for place in tried:
        try:
            match_images(names, place, path)
        except (FileNotFoundError, ValueError):
            continue
        return place
    raise FileNotFoundError(
        f"the images that {path} lists, such as {names[0] if names else '?'}, are in none of "
        f"{', '.join(map(str, tried))}: name their folder (--images)"
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_side(value: Any) -> bool:
    return is_number(value) and math.isfinite(value) and value >= 1 and value == round(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


_REQUIRED: dict[str, dict[str, Any]] = {
    "images": {"id": _is_id, "file_name": _is_text, "height": _is_side, "width": _is_side},
    "categories": {"id": lambda value: isinstance(value, int), "name": _is_text},
    "annotations": {},
}


def _find(by_id: dict[Any, Any], image_id: Any, problem: str) -> Any:
    if isinstance(image_id, int | str) and image_id in by_id:
        return by_id[image_id]
    other = {str(known): image for known, image in by_id.items()}
    if str(image_id) in other:  # ids of mixed types
        return other[str(image_id)]
    raise ValueError(f"{problem} {image_id!r}")


def _crowd(value: Any, where: str) -> bool:
    if isinstance(value, int | str | None) and value in NO_CROWD:
        return False
    if isinstance(value, int | str) and value in CROWD:
        return True
    raise ValueError(f"{where} has the iscrowd {value!r}: 0 or 1 is wanted")
