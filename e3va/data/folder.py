"""One's own data, whatever its format: found out, read, split, and handed on in one form.

A format is a row of :data:`FORMATS`: how it is told, and how it is read.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from e3va.data import coco_json, maps, voc, yolo
from e3va.data.images import list_images
from e3va.data.instances import Instances
from e3va.data.maps import Maps

TASKS = ("boxes", "masks", "semantic")
VALIDATION = 0.2
"""Share of the images that a validation split takes where there is none."""

Split = Instances | Maps


@dataclass
class Data:
    """What was found.

    Attributes:
        format: "coco", "voc", "yolo" or "maps".
        task: one of :data:`TASKS`.
        splits: "train", and "val" and "test" where there are such.
        notes: what a user should know of how it was read.
    """

    format: str
    task: str
    splits: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return self.splits["train"].classes

    def report(self) -> dict[str, Any]:
        """Format, task, counts of images, instances, classes and of what was dropped, by reason;
        JSON can hold it. In semantic maps a class counts once for each map that it is in."""
        classes: dict[str, int] = dict.fromkeys(self.classes, 0)
        dropped: dict[str, int] = {}
        images = {}
        for name, split in self.splits.items():
            for label, number in split.counts().items():
                classes[label] = classes.get(label, 0) + number
            for reason, number in getattr(split, "dropped", {}).items():
                dropped[reason] = dropped.get(reason, 0) + number
            images[name] = len(_items(split))
        return {
            "format": self.format,
            "task": self.task,
            "images": sum(images.values()),
            "splits": images,
            "instances": sum(classes.values()),
            "classes": classes,
            "dropped": dropped,
            "notes": self.notes,
        }


class Format(NamedTuple):
    """How a format is told from a path, and read.

    Attributes:
        name: as :class:`Data` calls it.
        find: what of a path is to be read, such as the JSON files of the splits; nothing if the
            path is of another format.
        read: the splits of what was found, with the folder of images where one is named.
    """

    name: str
    find: Callable[[Path], Any]
    read: Callable[[Any, Path | None], dict[str, Any]]


def _find_coco(path: Path) -> dict[str, Path]:
    """JSON files by split."""
    if path.is_file():
        return {"train": path} if path.suffix.lower() == ".json" else {}
    found: dict[str, Path] = {}
    places = [path, path / "annotations"]
    places += [path / name for name in ("train", "val", "valid", "validation", "test")]
    for place in places:
        for file in sorted(place.glob("*.json")) if place.is_dir() else ():
            if not _is_coco(file):
                continue
            split = _split_of(file, path)
            if split in found:
                raise ValueError(
                    f"{path} holds several COCO files for {split}: {found[split]} and {file}: name "
                    "the one that is meant (and --val)"
                )
            found[split] = file
    if found and "train" not in found:
        first = next(iter(found.values()))
        raise ValueError(f"{path} holds {first}, but no COCO file to train on: name it")
    return found


def _is_coco(path: Path) -> bool:
    """Whether a JSON file says so; detections, captions and settings lie about in such folders."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def _split_of(file: Path, root: Path) -> str:
    words = f"{file.relative_to(root).parent}/{file.stem}".lower()
    for split, names in {"test": ("test",), "val": ("val", "valid"), "train": ("",)}.items():
        if any(name in words for name in names):
            return split
    return "train"


def _read_coco(found: dict[str, Path], images: Path | None) -> dict[str, Any]:
    splits: dict[str, Any] = {}
    for split in sorted(found, key=("train", "val", "test").index):
        path = found[split]
        folder = images or coco_json.find_images(path)
        if images and (images / split).is_dir() and split != "train":
            folder = images / split
        masks = splits["train"].has_masks if splits else None
        splits[split] = coco_json.read_json(path, folder, masks=masks)
    return splits


def _find_voc(path: Path) -> Any:
    if not path.is_dir():
        return None
    if (path / "ImageSets/Main").is_dir():
        return "tree", path
    if any(path.rglob("*.xml")):
        return "folder", path
    return None


def _read_voc(found: tuple[str, Path], images: Path | None) -> dict[str, Any]:
    kind, path = found
    return voc.read_tree(path) if kind == "tree" else voc.read_folder(path)


def _find_yolo(path: Path) -> Any:
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    files = [f for f in sorted(path.glob("*.y*ml")) if "names" in f.read_text(errors="replace")]
    if len(files) > 1:
        raise ValueError(f"{path} holds {files[0].name} and {files[1].name}: name the one meant")
    if files:
        return files[0]
    images = list_images(path)[:200]
    return path if any(yolo.label_file(image).is_file() for image in images) else None


def _read_yolo(found: Path, images: Path | None) -> dict[str, Any]:
    return yolo.read_yaml(found) if found.is_file() else {"train": yolo.read_folder(found)}


def _find_maps(path: Path) -> Any:
    if path.is_dir() and (path / "images").is_dir():
        folders = (path / name for name in maps.FOLDERS)
        return path if any(f.is_dir() and list_images(f) for f in folders) else None
    return None


def _read_maps(found: Path, images: Path | None) -> dict[str, Any]:
    return maps.read_folder(found)


FORMATS = (
    Format("coco", _find_coco, _read_coco),
    Format("voc", _find_voc, _read_voc),
    Format("yolo", _find_yolo, _read_yolo),
    Format("maps", _find_maps, _read_maps),
)


def open_data(
    path: str | os.PathLike[str],
    *,
    val: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    task: str | None = None,
    classes: dict[str, str | None] | None = None,
    seed: int = 0,
) -> Data:
    """Find out what a path holds, read and check it.

    Args:
        path: a folder or a file.
        val: another one to validate on (default: its own split, else a seeded share of the images).
        images: the folder of the images of COCO files (default: found beside them).
        task: "boxes", "masks" or "semantic" (default: what the data are for).
        classes: what each class is to be called; those that are not named, or called None, are left
            out (default: all as they are).
        seed: of a split that is made here.

    Raises:
        FileNotFoundError: the path, or something that it names, is missing.
        ValueError: it is of no format that is known, or of several, or broken; names the file.
    """
    path = Path(path).expanduser()
    data = _read(path, Path(images) if images else None)
    if val is not None:
        other = _read(Path(val).expanduser(), Path(images) if images else None)
        if other.format != data.format:
            raise ValueError(f"{path} is of the format {data.format}, but {val} of {other.format}")
        data.splits["val"] = other.splits.get("val", other.splits["train"])
        _check_same_classes(data, path, val)
    if task is not None and task != data.task:
        _change_task(data, task, path)
    if classes is not None:
        for name, split in data.splits.items():
            data.splits[name] = _renamed(split, classes, path)
    for name, split in data.splits.items():
        if name == "train" and not sum(split.counts().values()):
            raise ValueError(f"{path} has no instance to train on")
    if "val" not in data.splits:
        data.splits["train"], data.splits["val"] = _split(data.splits["train"], seed)
        data.notes.append(
            f"no validation split: {len(_items(data.splits['val']))} images, drawn with the seed "
            f"{seed}, are kept to validate on"
        )
    return data


def read_classes(text: str) -> dict[str, str | None]:
    """Of ``--classes``: names to keep, separated by commas, or a YAML file of lines "old: new".

    Raises:
        ImportError: PyYAML is missing.
        ValueError: the file has no such lines.
    """
    path = Path(text)
    if not path.is_file():
        return {name.strip(): name.strip() for name in text.split(",") if name.strip()}
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError("a file of classes needs PyYAML: pip install 'e3va[train]'") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if isinstance(content, list):
        content = {name: name for name in content}
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{path} has no lines "old: new"')
    return {str(old): None if new is None else str(new) for old, new in content.items()}


def _read(path: Path, images: Path | None) -> Data:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    found = [(f, what) for f in FORMATS if (what := f.find(path))]
    if len(found) > 1 and found[0][0].name == "coco":
        found = [f for f in found if f[0].name != "maps"]  # its images and annotations
    if len(found) > 1 and {f.name for f, _ in found} == {"yolo", "maps"}:
        found = found[:1]  # its images and labels
    if not found:
        raise ValueError(
            f"{path} is of no format that is known: COCO's JSON, Pascal VOC's XML files, "
            "YOLO's data.yaml or text files, or images and maps in two folders"
        )
    if len(found) > 1:
        names = " and ".join(f.name for f, _ in found)
        raise ValueError(f"{path} could be {names}: name the file or the folder that is meant")
    chosen, what = found[0]
    splits = chosen.read(what, images)
    first = splits["train"] if "train" in splits else next(iter(splits.values()))
    splits = {"train": first, **splits}
    task = "semantic" if chosen.name == "maps" else "masks" if first.has_masks else "boxes"
    data = Data(chosen.name, task, splits)
    if chosen.name == "maps" and first.note:
        data.notes.append(first.note)
    if chosen.name != "maps":
        _check_same_classes(data, path, path)
    return data


def _check_same_classes(data: Data, path: Path, other: Any) -> None:
    for split in data.splits.values():
        if split.classes != data.classes:
            raise ValueError(
                f"{path} and {other} have different classes: {', '.join(data.classes)} in "
                f"{data.splits['train'].source}, {', '.join(split.classes)} in {split.source}"
            )


def _change_task(data: Data, task: str, path: Path) -> None:
    if task not in TASKS:
        raise ValueError(f"the task must be one of {', '.join(TASKS)}, got {task!r}")
    if (data.task, task) != ("masks", "boxes"):
        raise ValueError(f"{path} is for {data.task}, it cannot be used for {task}")
    for split in data.splits.values():
        for annotation in split.annotations:
            annotation.pop("segmentation", None)
    data.task = task


def _items(split: Any) -> list[Any]:
    return split.pairs if isinstance(split, Maps) else split.images


def _split(split: Any, seed: int) -> tuple[Any, Any]:
    """A split without and with a seeded share of its images."""
    items = list(_items(split))
    if len(items) < 2:
        raise ValueError(f"{split.source} has one image: none is left to validate on (give --val)")
    count = min(max(1, round(VALIDATION * len(items))), len(items) - 1)
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    kept = [item for i, item in enumerate(items) if i not in chosen]
    drawn = [item for i, item in enumerate(items) if i in chosen]
    train, val = split.subset(kept), split.subset(drawn)
    if isinstance(split, Instances):
        train.dropped = split.dropped
    return train, val


def _renamed(split: Any, names: dict[str, str | None], path: Path) -> Any:
    unknown = names.keys() - set(split.classes)
    if unknown:
        raise ValueError(
            f"{path} has no class {', '.join(sorted(unknown))}; it has {', '.join(split.classes)}"
        )
    kept = list(dict.fromkeys(n for c in split.classes if (n := names.get(c)) is not None))
    if not kept:
        raise ValueError(f"of the classes of {path} none is left")
    return split.renamed(names, kept)
