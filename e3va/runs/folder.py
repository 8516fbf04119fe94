"""The folder of a run: what lies where, whichever engine has trained it."""

from __future__ import annotations

import dataclasses
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
MAPS = "maps.json"


def engine_of(folder: str | os.PathLike[str]) -> str:
    """The engine, "detectron2" or "torchvision", that has trained into ``folder``.

    Raises:
        FileNotFoundError: it is no folder of a run.
        ValueError: its config is damaged.
    """
    path = Path(folder) / CONFIG
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
    return "detectron2" if "MODEL" in content else "torchvision"


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
    """That a run that is resumed goes on with the data that :func:`write_data` wrote.

    Raises:
        ValueError: it has other classes, or other numbers of images or instances.
    """
    path = folder / (MAPS if data.task == "semantic" else "train.json")
    if not path.is_file():
        return
    was = json.loads(path.read_text(encoding="utf-8"))
    then: Any
    now: Any
    if data.task == "semantic":
        then = was["classes"], len(was["splits"]["train"])
        now = data.classes, len(data.splits["train"].pairs)
    else:
        names = [category["name"] for category in was["categories"]]
        then = names, len(was["images"]), len(was["annotations"])
        train = data.splits["train"]
        now = data.classes, len(train.images), len(train.annotations)
    if then != now:
        raise ValueError(
            f"{path} tells of a run on other data: classes, images and instances were {then}, and "
            f"are {now}"
        )


def write_data(data: Data, folder: Path) -> None:
    """Write what is trained and evaluated on into ``folder``, as both engines read it: COCO's JSON
    files ``train.json`` and ``val.json``, or ``maps.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    if data.task == "semantic":
        write_json(folder / MAPS, _index(data))
        return
    for name in ("train", "val"):
        write_json(folder / f"{name}.json", _absolute(data.splits[name]).content())


def validation_images(folder: Path) -> list[Path]:
    """The images to validate on of the data that :func:`write_data` wrote into ``folder``."""
    if (folder / MAPS).is_file():
        content = json.loads((folder / MAPS).read_text(encoding="utf-8"))
        return [Path(image) for image, _ in content["splits"]["val"]]
    content = json.loads((folder / "val.json").read_text(encoding="utf-8"))
    return [Path(image["file_name"]) for image in content["images"]]


def map_values(folder: Path) -> np.ndarray | None:
    """The value that each class has in the maps that :func:`write_data` wrote of into ``folder``,
    the least one where it has several; None where there are no maps."""
    if not (folder / MAPS).is_file():
        return None
    content = json.loads((folder / MAPS).read_text(encoding="utf-8"))
    values = {index: int(value) for value, index in reversed(content["values"].items())}
    found = [values[index] for index in range(len(content["classes"]))]
    return np.array(found, np.uint8 if max(found) < 256 else np.uint16)


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
        for entry in self.entries:
            if entry["iteration"] == iteration and "loss" not in entry:
                return {name: value for name, value in entry.items() if name != "iteration"}
        return None

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
            for name in ("train", "val")
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
