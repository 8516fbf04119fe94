"""Checkpoints of a detector: all but the frozen trunk, which they name by its weights' hash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from e3va.checkpoint import check_finite, check_state, frozen_hash, own_state
from e3va.files import atomic_path
from e3va.weights.reading import read_content


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, **state: Any) -> None:
    """Write the weights of ``model``, without those of its trunk that stay frozen, and ``state``.

    Args:
        path: the file; replaced as a whole or not at all.
        model: the detector.
        state: more to keep: tensors, numbers, strings, and lists and dictionaries of these.
    """
    content = {"model": own_state(model), "trunk": frozen_hash(model), **state}
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Load what :func:`save_checkpoint` wrote into a ``model`` built alike, over the same trunk.

    Returns:
        The ``state`` saved with it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no such checkpoint, of another model or another trunk, or holds
            numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    content = read_content(path)
    try:
        saved, saved_hash = content.pop("model"), content.pop("trunk")
    except (LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of save_checkpoint") from error
    here = frozen_hash(model)
    if saved_hash != here:
        raise ValueError(
            f"{path} was trained over the frozen trunk {saved_hash}, but the model's is {here}: "
            "load the trunk's weights that it was trained with"
        )
    if unfit := check_state(saved, own_state(model)):
        raise ValueError(f"{path} belongs to another model: {unfit}")
    check_finite(path, saved)
    model.load_state_dict(saved, strict=False)
    return content
