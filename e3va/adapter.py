"""Adapters on disk, in PEFT's manner: all that a method has trained of a backbone, in a few MB.

A directory with ``adapter_config.json`` (the method and its options, the trunk's architecture, and
the hash of its frozen weights) and ``adapter_model.safetensors`` (what was trained, and the output
norms).
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from e3va.backbone import Backbone
from e3va.checkpoint import check_finite, check_state, frozen_hash
from e3va.config import HighwayConfig
from e3va.files import atomic_path, write_json
from e3va.highway import FORM, check_form
from e3va.methods import METHODS, E3VABackbone, build_backbone, options_of
from e3va.trunks import FAMILIES, family_of
from e3va.weights import load_trunk

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def save_adapter(backbone: Backbone, directory: str | os.PathLike[str]) -> None:
    """Write what was trained of ``backbone``, and its output norms, without its frozen trunk.

    Args:
        backbone: the trained backbone, as :func:`e3va.build_backbone` has built it.
        directory: made if missing. Each of its two files is replaced as a whole or not at all.

    Raises:
        TypeError: ``backbone`` is none that tells its method.
    """
    config = _config(backbone)
    directory = Path(directory)
    state = {name: value.cpu().contiguous() for name, value in _state(backbone).items()}
    with atomic_path(directory / WEIGHTS_NAME) as temporary:
        safetensors.torch.save_file(state, temporary, {"format": "pt"})
    write_json(directory / CONFIG_NAME, config)


def load_adapter(backbone: Backbone, directory: str | os.PathLike[str]) -> None:
    """Load what :func:`save_adapter` wrote into a backbone of the same method, shapes and trunk.

    Keys of the config that this version does not know are ignored with a warning.

    Args:
        backbone: the backbone, its trunk's weights loaded; unchanged if this fails.
        directory: the adapter's.

    Raises:
        FileNotFoundError: one of the two files is missing.
        TypeError: ``backbone`` is none that tells its method.
        ValueError: a file is damaged, or the adapter belongs to another method or trunk.
    """
    directory = Path(directory)
    found = _read_config(directory)
    _check_config(directory / CONFIG_NAME, found, _config(backbone))
    path = directory / WEIGHTS_NAME
    try:
        state = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    own = _state(backbone)
    form = f"highway.{FORM}"
    if form in own:
        state.setdefault(form, own[form])  # the config has told
    if unfit := check_state(state, own):
        raise ValueError(f"{path} does not belong to its {CONFIG_NAME}: {unfit}")
    check_finite(path, state)
    if isinstance(backbone, E3VABackbone):
        check_form(state[form], backbone.highway.config)
    backbone.load_state_dict(state, strict=False)


def open_backbone(
    directory: str | os.PathLike[str],
    trunk: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> Backbone:
    """The backbone that an adapter was trained as, rebuilt from its own config.

    Args:
        directory: the adapter's.
        trunk: the file of the pretrained weights that it was trained over, as for
            :func:`e3va.load_trunk`.
        dtype: what the trunk's frozen weights are stored in (default: as in the training).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the trunk is not the adapter's.
    """
    path = Path(directory) / CONFIG_NAME
    found = _read_config(Path(directory))
    architecture = {k: v for k, v in found["trunk"].items() if k not in _ABOUT_TRUNK}
    try:
        family = FAMILIES[found["trunk"]["family"]]
        names = {field.name for field in dataclasses.fields(family.config)}
        config = family.config(**{k: v for k, v in architecture.items() if k in names})
        stored = getattr(torch, found["trunk"]["dtype"])
        options = {k: v for k, v in found["options"].items() if k in options_of(found["method"])}
        backbone = build_backbone(found["method"], config, dtype=dtype or stored, **options)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} describes no backbone that can be built: {error}") from error
    load_trunk(backbone.trunk, trunk)
    load_adapter(backbone, directory)
    return backbone


_ABOUT_TRUNK = ("family", "dtype", "weight_hash")
"""What of a config's trunk is not its architecture."""


def _state(backbone: Backbone) -> dict[str, Tensor]:
    names = backbone.adapter_names()
    return {name: value for name, value in backbone.state_dict().items() if name in names}


def _config(backbone: Backbone) -> dict[str, Any]:
    from e3va import __version__

    method = getattr(backbone, "method", None)
    if method is None:
        raise TypeError(
            "an adapter is of a backbone that e3va.build_backbone has built, or of an "
            f"E3VABackbone, got a {type(backbone).__name__}"
        )
    trunk = backbone.trunk
    config = {
        "e3va_version": __version__,
        "method": method.name,
        "options": dataclasses.asdict(method),
        "trunk": {
            "family": family_of(trunk.config).name,
            **dataclasses.asdict(trunk.config),
            "dtype": str(trunk.storage_dtype()).removeprefix("torch."),
            "weight_hash": frozen_hash(backbone),
        },
    }
    return json.loads(json.dumps(config))  # tuples as they come back from a file: lists


def _read_config(directory: Path) -> dict[str, Any]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"no adapter at {directory}: {directory / name} is missing")
    path = directory / CONFIG_NAME
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON file: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("highway"), dict):
        found = _from_highway(found)
    sections = ("trunk", "options")
    if not isinstance(found, dict) or not all(isinstance(found.get(s), dict) for s in sections):
        raise ValueError(f"{path} is no adapter's config: it lacks {' or '.join(sections)}")
    return found


def _from_highway(found: dict[str, Any]) -> dict[str, Any]:
    """An adapter from before other methods had one; one that tells no form is published."""
    form = dataclasses.asdict(HighwayConfig().published())
    options = {key: form[key] for key in ("tap", "mixing", "state")} | found.pop("highway")
    if isinstance(found.get("trunk"), dict):
        found["trunk"] = {"family": next(iter(FAMILIES)), "dtype": "float32", **found["trunk"]}
    return {**found, "method": "e3va", "options": options}


def _check_config(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found.get("method") != wanted["method"]:
        raise ValueError(
            f"{path} belongs to a backbone tuned by {found.get('method')!r}, this one is tuned by "
            f"{wanted['method']!r}"
        )
    free = {f"options.{name}" for name in METHODS[wanted["method"]].free} | {"trunk.dtype"}
    unknown = sorted(found.keys() - wanted.keys())
    unfit = []
    for section in ("trunk", "options"):
        unknown += sorted(f"{section}.{key}" for key in found[section].keys() - wanted[section])
        for key, value in wanted[section].items():
            name = f"{section}.{key}"
            if key != "weight_hash" and name not in free and found[section].get(key) != value:
                unfit.append(f"{name} is {found[section].get(key)}, here {value}")
    if unfit:
        raise ValueError(f"{path} belongs to a backbone of another form: {'; '.join(unfit)}")
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
