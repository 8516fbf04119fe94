"""What a training run is made of, and the run that a folder holds."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from torch import nn

from e3va.data.coco import CocoInstances
from e3va.files import atomic_path
from e3va.methods import build_backbone
from e3va.precision import quantize_trunk
from e3va.runs.folder import CONFIG
from e3va.torchvision.checkpoint import load_checkpoint
from e3va.torchvision.config import ModelConfig, TrainConfig, from_json
from e3va.torchvision.model import build_detector
from e3va.trunks import trunk_config
from e3va.weights import load_trunk

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Run:
    """What ``config.yaml`` holds.

    Attributes:
        config: the settings.
        classes: their names; the class of label i is ``classes[i - 1]``.
        data: ``annotations``, ``images`` and ``masks`` of "train" and "val"; None for "val" where
            nothing is evaluated.
    """

    config: TrainConfig
    classes: list[str]
    data: dict[str, Any]

    @classmethod
    def of(
        cls, config: TrainConfig, train_data: CocoInstances, val_data: CocoInstances | None
    ) -> Self:
        """The run of a config on data."""
        val = None if val_data is None else _source(val_data)
        return cls(config, train_data.classes, {"train": _source(train_data), "val": val})

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.yaml`` into ``folder``, whole or not at all."""
        content = json.loads(json.dumps(dataclasses.asdict(self)))  # lists for tuples
        with atomic_path(Path(folder) / CONFIG) as temporary:
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Self:
        """Read it from there, or from such a file itself.

        Raises:
            FileNotFoundError: ``folder`` has no ``config.yaml``.
            ValueError: it is not what :meth:`write` writes.
        """
        path = Path(folder)
        path = path if path.is_file() else path / CONFIG
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            run = cls(**{**content, "config": from_json(TrainConfig, content["config"])})
            if not isinstance(run.classes, list) or not isinstance(run.data, dict):
                raise ValueError("classes are a list, and data a dictionary")
            return run
        except (ValueError, TypeError, LookupError, yaml.YAMLError) as error:
            raise ValueError(
                f"{path} is damaged, of another version, or of a run by Detectron2: {error}"
            ) from error


def build_model(
    config: ModelConfig,
    num_classes: int,
    device: torch.device | str = "cpu",
    pretrained: bool = True,
) -> nn.Module:
    """The detector that ``config`` describes, its trunk pretrained and the rest random.

    Args:
        config: the settings.
        num_classes: number of classes, including the background.
        device: where it is put.
        pretrained: False: the trunk is random, too, for who wants to know its shapes alone.

    Raises:
        FileNotFoundError: there are no such weights.
        ImportError: something that a setting needs is not installed.
        TypeError, ValueError: a setting is unknown or out of range, or the weights do not fit.
    """
    trunk = trunk_config(config.variant, **config.trunk_options)
    dtype = getattr(torch, config.trunk_dtype)
    backbone = build_backbone(config.method, trunk, dtype=dtype, **config.options)
    if pretrained:
        load_trunk(backbone.trunk, config.weights)
    if config.trunk_precision:
        quantize_trunk(backbone.to(device).trunk, config.trunk_precision)
    return build_detector(
        config.detector,
        backbone,
        num_classes,
        out_channels=config.out_channels,
        anchor_sizes=config.anchor_sizes,
        min_size=config.min_size,
        max_size=config.max_size,
        **config.detector_options,
    ).to(device)


def load_run(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[nn.Module, Run]:
    """The detector that was trained into ``folder``, in evaluation mode, and the run's settings.

    Raises:
        FileNotFoundError: there is no run, no checkpoint, or the trunk's weights are gone.
        ValueError: the run does not tell what its model was built from, or a file is damaged.
    """
    run = Run.read(folder)
    if run.config.model is None:
        raise ValueError(
            f"{Path(folder) / CONFIG} does not tell what the model was built from: build it as "
            "then, and call load_checkpoint"
        )
    model = build_model(run.config.model, len(run.classes) + 1, device)
    load_checkpoint(Path(folder) / CHECKPOINT, model)
    return model.eval(), run


def _source(data: CocoInstances) -> dict[str, Any]:
    return {
        "annotations": str(data.path.absolute()),
        "images": str(data.folder.absolute()),
        "masks": data.masks,
    }
