"""The folder of a run: what lies where, whichever engine has trained it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e3va.data.folder import Data
from e3va.data.instances import Instances
from e3va.data.maps import Maps
from e3va.files import atomic_path, write_json

CONFIG = "config.yaml"
METRICS = "metrics.json"
CURVES = "curves.png"
PREDICTIONS = "predictions.png"
PREDICTED = "predictions"
DATA_PAGE = "data.png"
LOG = "log.txt"
EVALUATION = "evaluation"
MAPS = "maps.json"
_SPLITS = ("train", "val")
_RECORD = (MAPS, *(f"{split}.json" for split in _SPLITS))
"""Of the data, in a folder of their own."""


def engine_of(folder: str | os.PathLike[str]) -> str:
    """The engine, "detectron2" or "torchvision", that has trained into ``folder``, or that a config
    file is of.

    Raises:
        FileNotFoundError: it is no folder of a run, and no file.
        ValueError: its config is damaged.
    """
    path = Path(folder)
    path = path if path.is_file() else path / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no folder of a run: there is no {path}")
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError("a run's config needs PyYAML: pip install 'e3va[train]'") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no config of a run")
    return "torchvision" if content.keys() >= {"config", "classes"} else "detectron2"


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is the folder of a run that ``e3va train`` has prepared, with its data."""
    data = Path(path) / "data"
    return (Path(path) / CONFIG).is_file() and any(
        (data / name).is_file() for name in (MAPS, "train.json")
    )


def rank(metrics: Mapping[str, float]) -> float:
    """The metric by which the best model is told: of masks, maps or boxes."""
    for name in ("mask_ap", "miou", "box_ap"):
        if name in metrics:
            return metrics[name]
    return -math.inf


def check_settings(settings: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """That settings are those, ``saved``, of the run that ``path`` is of.

    Raises:
        ValueError: one is another.
    """
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} is of a run with {name} {saved.get(name)}, not {value}: resume with the "
                "same settings, or start anew in another folder"
            )


def check_iterations(now: int, before: int, folder: Path) -> None:
    """That the run in ``folder`` becomes no shorter.

    Raises:
        ValueError: it does.
    """
    if now < before:
        raise ValueError(
            f"{folder} is of a run of {before} iterations, not {now}: a run may become longer "
            "(--iterations), not shorter"
        )


def check_same_data(data: Data, folder: Path) -> None:
    """That a run that is resumed goes on with the data that :func:`write_data` wrote, wherever
    these lie now.

    Raises:
        ValueError: it has another task, or other classes, images or annotations.
    """
    files = _records(folder)
    if not files:
        return
    then = _traits(files)
    now = _traits(json.loads(json.dumps(_files(data))))
    for what, before in then.items():
        after = now[what]
        if before != after:
            pairs = itertools.zip_longest(before, after)
            one, other = next(map(str, pair) for pair in pairs if pair[0] != pair[1])
            letters = enumerate(itertools.zip_longest(one, other))
            same = next((i for i, pair in letters if pair[0] != pair[1]), 0)
            number = f" ({len(before)} then, {len(after)} now)" * (len(before) != len(after))
            raise ValueError(
                f"{folder.parent} is a run on other data: {what} {_shown(one, same)}, not "
                f"{_shown(other, same)}{number}; `e3va train {folder.parent} --resume` goes on "
                "with its own, or name another folder by --output"
            )


def folder_for(data: Data, folder: Path, name: str) -> Path:
    """The subfolder called ``name``, or ``name``-2, …: the first that is free, or in which
    :func:`write_data` wrote the same annotations of the same files."""
    files = json.loads(json.dumps(_files(data)))
    place, number = folder / name, 1
    while place.exists() and not _holds(place, files):
        number += 1
        place = folder / f"{name}-{number}"
    return place


def _holds(folder: Path, files: Mapping[str, Any]) -> bool:
    """Whether :func:`write_data` wrote these, and nobody has damaged them."""
    try:
        return _records(folder) == files
    except (OSError, ValueError):
        return False


def _records(folder: Path) -> dict[str, Any]:
    """All that :func:`write_data` wrote there."""
    return {name: _read(folder / name) for name in _RECORD if (folder / name).is_file()}


def _shown(text: str, same: int) -> str:
    """The beginning of a long text, and where it goes on otherwise than another."""
    return text[:120] if same < 80 else f"{text[:50]} … {text[same - 20 : same + 50]}"


def _traits(files: Mapping[str, Any]) -> dict[str, list[Any]]:
    """By what the data of such files are told apart, the plainest first, each with its name."""
    if MAPS in files:
        content = files[MAPS]
        traits = {"task": ["semantic"], "classes": content["classes"]}
        traits["values"] = [f"{value}: {index}" for value, index in content["values"].items()]
        for split, pairs in content["splits"].items():
            images, maps = zip(*pairs, strict=True)
            traits |= {f"{split} image": _relative(images), f"{split} map": _relative(maps)}
        return traits
    every = [a for content in files.values() for a in content["annotations"]]
    traits = {"task": ["masks" if any("segmentation" in a for a in every) else "boxes"]}
    for file, content in files.items():
        split, images = Path(file).stem, content["images"]
        names = _relative([image["file_name"] for image in images])
        by_id = {image["id"]: name for image, name in zip(images, names, strict=True)}
        traits |= {
            "classes": [category["name"] for category in content["categories"]],
            f"{split} image": names,
            f"{split} annotation": [
                {"image": by_id[a["image_id"]], "bbox": a["bbox"], **a}
                for a in content["annotations"]
            ],
        }
    return traits


def _relative(names: Sequence[str]) -> list[str]:
    """Names of files within the folder that holds them all."""
    root = os.path.commonpath([os.path.dirname(name) for name in names])
    return [os.path.relpath(name, root) for name in names]


def write_data(data: Data, folder: Path) -> None:
    """Write what is trained and evaluated on into ``folder``, as both engines read it: COCO's JSON
    files ``train.json`` and ``val.json``, or ``maps.json``."""
    files = _files(data)
    for name in set(_RECORD) - files.keys():  # of another task
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_json(folder / name, content)


def _files(data: Data) -> dict[str, Any]:
    """The contents of these files."""
    if data.task == "semantic":
        return {MAPS: _index(data)}
    return {f"{split}.json": _absolute(data.splits[split]).content() for split in _SPLITS}


def _read(path: Path) -> Any:
    """What :func:`write_data` wrote into a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content


def validation_images(folder: Path) -> list[Path]:
    """The images to validate on of the data that :func:`write_data` wrote into ``folder``."""
    if (folder / MAPS).is_file():
        return [Path(image) for image, _ in _read(folder / MAPS)["splits"]["val"]]
    content = _read(folder / "val.json")
    return [Path(image["file_name"]) for image in content["images"]]


def map_values(folder: Path) -> np.ndarray | None:
    """The value that each class has in the maps that :func:`write_data` wrote of into ``folder``,
    the least one where it has several; None where there are no maps, or one does not fit into the
    16 bits of a PNG."""
    if not (folder / MAPS).is_file():
        return None
    content = _read(folder / MAPS)
    pairs = sorted(((int(v), index) for v, index in content["values"].items()), reverse=True)
    values = {index: value for value, index in pairs}
    found = [values[index] for index in range(len(content["classes"]))]
    if max(found) >= 2**16:
        return None
    return np.array(found, np.uint8 if max(found) < 2**8 else np.uint16)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.json``; one whose writing was interrupted is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def evaluation_after(entries: Sequence[Mapping[str, Any]], iteration: int) -> dict[str, Any] | None:
    """The metrics of the evaluation after ``iteration`` iterations, if lines of ``metrics.json``
    tell of one."""
    for entry in entries:
        if entry["iteration"] == iteration and "loss" not in entry:
            return {name: value for name, value in entry.items() if name != "iteration"}
    return None


class History:
    """``metrics.json`` of a run that goes on: its lines up to ``start``, and those that are added.

    Args:
        path: the file; made, or cut, at once.
        start: iterations that have been done.

    Attributes:
        entries: the lines.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self.entries = [e for e in read_metrics(path) if e.get("iteration", math.inf) <= start]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))

    def add(self, **entry: float) -> None:
        """Add a line: an iteration (with its loss), or the metrics of an evaluation."""
        self.entries.append(entry)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def evaluation(self, iteration: int) -> dict[str, float] | None:
        """The metrics of the evaluation after ``iteration`` iterations, if there has been one."""
        return evaluation_after(self.entries, iteration)

    def best(self) -> float:
        """The highest :func:`rank` of an evaluation so far."""
        scores = (rank(entry) for entry in self.entries if "loss" not in entry)
        return max(scores, default=-math.inf)


def _index(data: Data) -> dict[str, Any]:
    """Semantic maps as one JSON file: classes, the class of each value, and pairs of files."""
    train: Maps = data.splits["train"]
    return {
        "classes": train.classes,
        "values": {str(value): index for value, index in train.values.items()},
        "splits": {
            name: [
                [str(image.absolute()), str(labels.absolute())]
                for image, labels in data.splits[name].pairs
            ]
            for name in _SPLITS
        },
    }


def _absolute(split: Instances) -> Instances:
    images = [{**i, "file_name": str(Path(i["file_name"]).absolute())} for i in split.images]
    return dataclasses.replace(split, images=images)


@dataclasses.dataclass
class Found:
    """What a model finds on an image, whichever engine it is of.

    Attributes:
        instances: ``label`` (a position in the classes), ``bbox`` [x, y, width, height], ``score``
            and, if there are masks, ``segmentation`` as run-length encoding with text; the best
            first.
        labels: the class of each pixel [H, W], uint8, for semantic segmentation.
    """

    instances: Sequence[Mapping[str, Any]] = ()
    labels: np.ndarray | None = None
