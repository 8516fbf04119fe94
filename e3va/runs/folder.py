"""The folder of a run: what lies where, whichever engine has trained it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from e3va.data.folder import Data
from e3va.data.instances import Instances
from e3va.data.maps import Maps
from e3va.files import write_json
from e3va.runs.plan import Plan

ABOUT = "run.json"
CONFIG = "config.yaml"
METRICS = "metrics.json"
CURVES = "curves.png"
PREDICTIONS = "predictions.png"
DATA_PAGE = "data.png"
LOG = "log.txt"


@dataclasses.dataclass(frozen=True)
class Run:
    """What ``run.json`` holds: enough to evaluate, predict and export without being told more.

    Attributes:
        engine: "detectron2" or "torchvision".
        plan: what was trained.
        classes: their names.
        data: where the data came from, as it was given.
    """

    engine: str
    plan: Plan
    classes: list[str]
    data: str

    def write(self, folder: Path) -> None:
        """Write ``run.json`` into ``folder``, whole or not at all."""
        write_json(folder / ABOUT, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Self:
        """Read it from there.

        Raises:
            FileNotFoundError: ``folder`` is none of a run.
            ValueError: its ``run.json`` is damaged.
        """
        path = Path(folder) / ABOUT
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no run of `e3va train`: there is no {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            plan: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in content["plan"].items()
            }
            return cls(**{**content, "plan": Plan(**plan)})
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path} is damaged, or of another version: {error}") from error


def write_data(data: Data, folder: Path) -> None:
    """Write what is trained and evaluated on into ``folder``, as both engines read it: COCO's JSON
    files ``train.json`` and ``val.json``, or ``maps.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    if data.task == "semantic":
        write_json(folder / "maps.json", _index(data))
        return
    for name in ("train", "val"):
        write_json(folder / f"{name}.json", _absolute(data.splits[name]).content())


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
