"""Checkpoints of a detector: all but the frozen trunk, which they name by its weights' hash."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from e3va.files import atomic_path
from e3va.trunk import FrozenSwin
from e3va.weights import trunk_hash


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, **state: Any) -> None:
    """Write the weights of ``model``, without those of a :class:`FrozenSwin`, and ``state``.

    Args:
        path: the file; replaced as a whole or not at all.
        model: the detector.
        state: more to keep: tensors, numbers, strings, and lists and dictionaries of these.
    """
    content = {"model": _own_state(model), "trunk": _hash(model), **state}
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Load what :func:`save_checkpoint` wrote into a ``model`` built alike, over the same trunk.

    Returns:
        The ``state`` saved with it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no such checkpoint, or of another model or another trunk.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved, saved_hash = content.pop("model"), content.pop("trunk")
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of save_checkpoint") from error
    here = _hash(model)
    if saved_hash != here:
        raise ValueError(
            f"{path} was trained over the frozen trunk {saved_hash}, but the model's is {here}: "
            "load the trunk's weights that it was trained with"
        )
    own = _own_state(model)
    unfit = sorted(saved.keys() ^ own.keys()) + sorted(
        name for name in saved.keys() & own.keys() if saved[name].shape != own[name].shape
    )
    if unfit:
        raise ValueError(
            f"{path} belongs to another model: {len(unfit)} tensors are missing, unexpected or of "
            f"another shape, among them {', '.join(unfit[:3])}"
        )
    model.load_state_dict(saved, strict=False)
    return content


def _trunks(model: nn.Module) -> dict[str, FrozenSwin]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FrozenSwin)}


def _hash(model: nn.Module) -> str | None:
    """The hash of the frozen trunk; None if the model has none."""
    for trunk in _trunks(model).values():
        return trunk_hash(trunk)
    return None


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    frozen = tuple(f"{name}." for name in _trunks(model))
    return {k: v for k, v in model.state_dict().items() if not k.startswith(frozen)}
