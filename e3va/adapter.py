"""Adapters on disk, in PEFT's manner: all that was trained of an E³VA backbone, in a few MB.

A directory with ``adapter_config.json`` (the shapes of trunk and highway, and the hash of the
trunk's weights) and ``adapter_model.safetensors`` (the highway and the output norms).
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from e3va.backbone import E3VABackbone
from e3va.config import HighwayConfig
from e3va.files import atomic_path, write_json
from e3va.highway import FORM, check_form
from e3va.weights import trunk_hash

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def save_adapter(backbone: E3VABackbone, directory: str | os.PathLike[str]) -> None:
    """Write the highway and the output norms of ``backbone``, without its trunk.

    Args:
        backbone: the trained backbone.
        directory: made if missing. Each of its two files is replaced as a whole or not at all.

    Raises:
        TypeError: ``backbone`` has no highway.
    """
    if not isinstance(backbone, E3VABackbone):
        raise TypeError(f"an adapter is of an E3VABackbone, got a {type(backbone).__name__}")
    directory = Path(directory)
    state = {name: value.cpu().contiguous() for name, value in _state(backbone).items()}
    with atomic_path(directory / WEIGHTS_NAME) as temporary:
        safetensors.torch.save_file(state, temporary, {"format": "pt"})
    write_json(directory / CONFIG_NAME, _config(backbone))


def load_adapter(backbone: E3VABackbone, directory: str | os.PathLike[str]) -> None:
    """Load what :func:`save_adapter` wrote into a backbone of the same shapes and trunk.

    Keys of the config that this version does not know are ignored with a warning.

    Args:
        backbone: the backbone, its trunk's weights loaded; unchanged if this fails.
        directory: the adapter's.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, or the adapter belongs to another trunk or highway.
    """
    directory = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"no adapter at {directory}: {directory / name} is missing")
    _check_config(directory / CONFIG_NAME, _config(backbone))
    path = directory / WEIGHTS_NAME
    try:
        state = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    own = _state(backbone)
    state.setdefault(f"highway.{FORM}", own[f"highway.{FORM}"])  # the config has told
    unfit = sorted(state.keys() ^ own.keys()) + sorted(
        name for name in state.keys() & own.keys() if state[name].shape != own[name].shape
    )
    if unfit:
        raise ValueError(
            f"{path} does not belong to its {CONFIG_NAME}: {len(unfit)} tensors are missing, "
            f"unexpected or of another shape, among them {', '.join(unfit[:3])}"
        )
    check_form(state[f"highway.{FORM}"], backbone.highway.config)
    backbone.load_state_dict(state, strict=False)


def _state(backbone: E3VABackbone) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in backbone.state_dict().items()
        if name.startswith(("highway.", "norms."))
    }


def _config(backbone: E3VABackbone) -> dict[str, Any]:
    from e3va import __version__

    trunk = dataclasses.asdict(backbone.trunk.config)
    config = {
        "e3va_version": __version__,
        "trunk": {**trunk, "weight_hash": trunk_hash(backbone.trunk)},
        "highway": dataclasses.asdict(backbone.highway.config),
    }
    return json.loads(json.dumps(config))  # tuples as they come back from a file: lists


def _check_config(path: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON file: {error}") from error
    sections = ("trunk", "highway")
    if not isinstance(found, dict) or not all(isinstance(found.get(s), dict) for s in sections):
        raise ValueError(f"{path} is no adapter's config: it lacks {' or '.join(sections)}")
    # An adapter from before there were others is of the published form.
    form = dataclasses.asdict(HighwayConfig().published())
    found["highway"] = {key: form[key] for key in ("tap", "mixing", "state")} | found["highway"]
    unknown = sorted(found.keys() - wanted.keys())
    unfit = []
    for section in sections:
        unknown += sorted(f"{section}.{key}" for key in found[section].keys() - wanted[section])
        for key, value in wanted[section].items():
            if key != "weight_hash" and found[section].get(key) != value:
                unfit.append(f"{section}.{key} is {found[section].get(key)}, here {value}")
    if unfit:
        raise ValueError(f"{path} belongs to a backbone of another shape: {'; '.join(unfit)}")
    theirs, ours = found["trunk"].get("weight_hash"), wanted["trunk"]["weight_hash"]
    if theirs != ours:
        raise ValueError(
            f"{path} was trained over a trunk whose weights have the hash {theirs}, but those of "
            f"this trunk have {ours}: load the trunk's weights that it was trained with"
        )
    if unknown:
        warnings.warn(
            f"{path} was written by e3va {found.get('e3va_version')}; ignoring what this version "
            f"({wanted['e3va_version']}) does not know: {', '.join(unknown)}",
            stacklevel=3,
        )
