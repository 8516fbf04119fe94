"""One's own data, whatever its format: found out, read, split, and handed on in one form.

A format is a row of :data:`FORMATS`: how it is told, and how it is read.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from e3va.data import coco_json, maps, voc, yolo
from e3va.data.images import list_files, list_images
from e3va.data.maps import Maps
from e3va.data.text import load_yaml
from e3va.words import quoted

TASKS = ("boxes", "masks", "semantic")
VALIDATION = 0.2
"""Share of the images that a validation split takes where there is none."""


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

    @property
    def distinct(self) -> dict[str, Any]:
        """The splits by name; one that serves as two is there once, by its last name."""
        return dict({id(split): (name, split) for name, split in self.splits.items()}.values())

    def report(self) -> dict[str, Any]:
        """Format, task, counts of images, instances, classes, of boxes that were clipped and of
        what was dropped, by reason, and an example of each; JSON can hold it. In semantic maps a
        class counts once for each map that it is in."""
        classes: dict[str, int] = dict.fromkeys(self.classes, 0)
        dropped: dict[str, int] = {}
        examples: dict[str, str] = {}
        images = {}
        splits = self.distinct
        for name, split in splits.items():
            for label, number in split.counts().items():
                classes[label] = classes.get(label, 0) + number
            for reason, number in getattr(split, "dropped", {}).items():
                dropped[reason] = dropped.get(reason, 0) + number
            examples = getattr(split, "examples", {}) | examples
            images[name] = len(_items(split))
        return {
            "format": self.format,
            "task": self.task,
            "images": sum(images.values()),
            "splits": images,
            "instances": sum(classes.values()),
            "classes": classes,
            "dropped": dropped,
            "clipped": sum(getattr(split, "clipped", 0) for split in splits.values()),
            "examples": examples,
            "notes": self.notes,
        }


class Format(NamedTuple):
    """How a format is told from a path, and read.

    Attributes:
        name: as :class:`Data` calls it.
        find: what of a path is to be read, such as the JSON files of the splits; nothing if the
            path is of another format.
        read: the splits of what was found, with the folder of images where one is named, and
            whether masks are wanted (None: if most instances have one).
    """

    name: str
    find: Callable[[Path], Any]
    read: Callable[[Any, Path | None, bool | None], dict[str, Any]]


def _find_coco(path: Path) -> dict[str, Path]:
    """JSON files by split."""
    if path.is_file():
        return {"train": path} if path.suffix.lower() == ".json" else {}
    found: dict[str, Path] = {}
    for place in _coco_places(path):
        for file in sorted(place.glob("*.json")) if place.is_dir() else ():
            if not coco_json.is_coco(file):
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


def _why_no_coco(path: Path) -> str:
    """Of the first JSON file that :func:`_find_coco` has passed over."""
    for file in (f for place in _coco_places(path) for f in sorted(place.glob("*.json"))):
        try:
            coco_json.read_content(file)
        except (OSError, ValueError) as error:
            return f"; {error}"
    return ""


def _coco_places(path: Path) -> list[Path]:
    """Folders that may hold a JSON file."""
    names = ("", "annotations", "train", "val", "valid", "validation", "test")
    return [path / name for name in names]


def _split_of(file: Path, root: Path) -> str:
    """By the words of its path, so that "latest.json" is no test split."""
    words = set(re.findall("[a-z]+", f"{file.relative_to(root).parent}/{file.stem}".lower()))
    if words & {"test", "testing"}:
        return "test"
    return "val" if words & {"val", "valid", "validation"} else "train"


def _read_coco(found: dict[str, Path], images: Path | None, masks: bool | None) -> dict[str, Any]:
    splits: dict[str, Any] = {}
    for split in sorted(found, key=("train", "val", "test").index):
        folder = images
        if images and split != "train" and (images / split).is_dir():
            folder = images / split
        splits[split] = coco_json.read_json(found[split], folder, masks=masks)
        if masks is None:  # as in those to train on
            masks = splits[split].has_masks
    return splits


def _find_voc(path: Path) -> Any:
    if not path.is_dir():
        return None
    if (path / "ImageSets/Main").is_dir():
        return "tree", path
    # Editors and builds leave other XML files about.
    if any(b"<annotation" in file.read_bytes() for file in list_files(path, (".xml",))):
        return "folder", path
    return None


def _read_voc(found: tuple[str, Path], images: Path | None, masks: bool | None) -> dict[str, Any]:
    kind, path = found
    return voc.read_tree(path) if kind == "tree" else voc.read_folder(path)


def _find_yolo(path: Path) -> Any:
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    named = re.compile(rb"""^\s*["']?names["']?\s*:""", re.MULTILINE)
    files = [f for f in sorted(path.iterdir()) if f.suffix.lower() in (".yaml", ".yml")]
    files = [f for f in files if named.search(f.read_bytes())]
    if len(files) > 1:
        raise ValueError(f"{path} holds {files[0].name} and {files[1].name}: name the one meant")
    if files:
        return files[0]
    return path if any(_is_labels(yolo.label_file(image)) for image in list_images(path)) else None


def _is_labels(path: Path) -> bool:
    """Whether a text file's first line is one of numbers; captions lie beside images, too."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        words = file.readline(4096).split()
    return bool(words) and all(re.fullmatch(rb"[-+.\deE]+|nan|inf", word) for word in words[:5])


def _read_yolo(found: Path, images: Path | None, masks: bool | None) -> dict[str, Any]:
    if found.is_file():
        return dict(yolo.read_yaml(found, masks=masks))
    return {"train": yolo.read_folder(found, masks=masks)}


def _find_maps(path: Path) -> Any:
    if path.is_dir() and (path / "images").is_dir():
        folders = (path / name for name in maps.FOLDERS)
        return path if any(f.is_dir() and list_images(f) for f in folders) else None
    return None


def _read_maps(found: Path, images: Path | None, masks: bool | None) -> dict[str, Any]:
    return dict(maps.read_folder(found))


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
    hold_out: bool = True,
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
        hold_out: where there is no validation split, make one (default); False, for what is only
            evaluated on: it is the test split, or all.

    Raises:
        FileNotFoundError: the path, or something that it names, is missing.
        ValueError: it is of no format that is known, or of several, or broken; names the file.
    """
    if task not in (None, *TASKS):
        raise ValueError(f"the task must be one of {', '.join(TASKS)}, got {task!r}")
    path = Path(path).expanduser()
    folder = Path(images).expanduser() if images else None
    if folder and not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder of images {folder}")
    data = _read(path, folder, task)
    if val is not None:
        other = _read(Path(val).expanduser(), folder, data.task, data.format)
        data.splits["val"] = other.splits.get("val", other.splits["train"])
        _use_same_classes(data, path, val)
    if classes is not None:
        renamed = {id(s): _renamed(s, classes, path) for s in data.distinct.values()}
        data.splits = {name: renamed[id(split)] for name, split in data.splits.items()}
    for name in ("train", "val"):
        if name in data.splits and not sum(data.splits[name].counts().values()):
            raise ValueError(
                f"{data.splits[name].source} has no instance to "
                f"{'train on' if name == 'train' else 'validate on (name other data by --val)'}"
                f"{_why(data.splits[name])}"
            )
    train = data.splits["train"]
    if hold_out and isinstance(train, Maps) and sum(map(bool, train.counts().values())) < 2:
        (only,) = (name for name, number in train.counts().items() if number)
        raise ValueError(
            f"{train.source}: all that is labelled in the maps to train on is {only}, which can be "
            "told from nothing"
        )
    if "val" not in data.splits and not hold_out:
        data.splits["val"] = data.splits.get("test", data.splits["train"])
    elif "val" not in data.splits:
        data.splits["train"], data.splits["val"] = _split(data.splits["train"], seed)
        data.notes.append(
            f"no validation split: {len(_items(data.splits['val']))} images, drawn with the seed "
            f"{seed}, are kept to validate on"
        )
    if data.splits["train"] is data.splits["val"]:
        return data
    if shared := len(_files(data.splits["train"]) & _files(data.splits["val"])):
        data.notes.append(f"{shared} images are both in train and in val: scores will flatter")
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
    content = load_yaml(path)
    if isinstance(content, list):
        content = {str(name): str(name) for name in content}
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{path} has no lines "old: new"')
    return {
        str(old): None if new in ("", "null", "~") else str(new) for old, new in content.items()
    }


def _read(path: Path, images: Path | None, task: str | None, wanted: str | None = None) -> Data:
    """What a path holds, for a task and of a format where these are wanted."""
    if not (os.path.isdir(path) or os.path.isfile(path)):
        raise FileNotFoundError(f"there is no folder or file {path}")
    found = [(f, what) for f in FORMATS if (what := f.find(path))]
    if len(found) > 1 and task is not None:
        found = [(f, what) for f, what in found if (f.name == "maps") == (task == "semantic")]
    if wanted and found:
        formats = ", ".join(f.name for f, _ in found)
        found = [(f, what) for f, what in found if f.name == wanted]
        if not found:
            raise ValueError(
                f"{path} is of the format {formats}, but {wanted} is wanted, as in the data to "
                "train on"
            )
    if not found:
        raise ValueError(
            f"{path} is of no format that is known: COCO's JSON, Pascal VOC's XML files, "
            "YOLO's data.yaml or text files, or images and maps in two folders"
            f"{_why_no_coco(path)}"
        )
    if len(found) > 1:
        names = " and ".join(f.name for f, _ in found)
        raise ValueError(
            f"{path} could be {names}: name the file or the folder that is meant, or the task"
        )
    chosen, what = found[0]
    splits = chosen.read(what, images, {"boxes": False, "masks": True}.get(task or ""))
    first = splits["train"] if "train" in splits else next(iter(splits.values()))
    splits = {"train": first, **splits}
    if chosen.name == "maps":
        has, notes = "semantic", [first.note] if first.note else []
    else:
        has = "masks" if first.has_masks else "boxes"
        notes = [note for split in splits.values() for note in split.notes]
    if task not in (None, has):
        raise ValueError(f"{path} is for {has}, it cannot be used for {task}{_why(first)}")
    data = Data(chosen.name, has, splits, list(dict.fromkeys(notes)))
    _use_same_classes(data, path, path)
    return data


def _why(split: Any) -> str:
    """What was left out of a split of which nothing is left."""
    dropped = dict(getattr(split, "dropped", {}))
    if crowds := sum(a["iscrowd"] for a in getattr(split, "annotations", ())):
        dropped["crowd or difficult"] = crowds
    reasons = ", ".join(f"{number} × {reason}" for reason, number in dropped.items())
    return f": left out were {reasons}" if reasons else ""


def _use_same_classes(data: Data, path: Path, other: Any) -> None:
    """Give each split the classes to train on, of which it may lack some, in another order."""
    classes = data.classes
    for name, split in data.splits.items():
        if not set(split.classes) <= set(classes):
            raise ValueError(
                f"{path} and {other} have different classes: {quoted(classes)} in "
                f"{data.splits['train'].source}, {quoted(split.classes)} in {split.source}"
            )
        if split.classes != classes:
            data.splits[name] = split.renamed(dict(zip(classes, classes, strict=True)), classes)


def _items(split: Any) -> list[Any]:
    return split.pairs if isinstance(split, Maps) else split.images


def _files(split: Any) -> set[str]:
    if isinstance(split, Maps):
        return {os.path.realpath(image) for image, _ in split.pairs}
    return {os.path.realpath(image["file_name"]) for image in split.images}


def _split(split: Any, seed: int) -> tuple[Any, Any]:
    """A split without and with a seeded share of its images, both with some that have an
    instance."""
    items, empty = list(_items(split)), split.empty()
    full = sorted(set(range(len(items))) - set(empty))
    if len(full) < 2:
        raise ValueError(
            f"{split.source} has one image with an instance: none is left to validate on (give "
            "--val)"
        )
    draw = random.Random(seed)
    count = min(max(1, round(VALIDATION * len(full))), len(full) - 1)
    chosen = set(draw.sample(full, count)) | set(draw.sample(empty, round(VALIDATION * len(empty))))
    parts = [[i for i in range(len(items)) if (i in chosen) == wanted] for wanted in (False, True)]
    if isinstance(split, Maps):
        return split.subset(parts[0]), split.subset(parts[1])
    train, val = (split.subset(items[i] for i in part) for part in parts)
    train.dropped, train.clipped = split.dropped, split.clipped
    train.examples = split.examples
    return train, val


def _renamed(split: Any, names: dict[str, str | None], path: Path) -> Any:
    unknown = names.keys() - set(split.classes)
    if unknown:
        hint = '; those with commas are named by a YAML file of lines "old: new"'
        raise ValueError(
            f"{path} has no class {quoted(sorted(unknown))}; it has {quoted(split.classes)}"
            f"{hint * any(',' in name for name in split.classes)}"
        )
    kept = list(dict.fromkeys(n for c in split.classes if (n := names.get(c)) is not None))
    if not kept:
        raise ValueError(f"of the classes of {path} none is left")
    if isinstance(split, Maps) and len(kept) < 2:
        raise ValueError(
            f"of the classes of {path} {kept[0]} alone is left: every pixel would be of it"
        )
    return split.renamed(names, kept)
