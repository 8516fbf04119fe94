"""Files of weights, read without running code, and timm's by name."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from e3va.weights.pickles import read_pickle

State = dict[str, Tensor]

TIMM = "timm:"
"""What the name of a model of timm's begins with, where it stands for a file."""


def read_weights(path: str | os.PathLike[str]) -> State:
    """The tensors of a checkpoint, on the CPU, under the names they have in it.

    Reads ``.safetensors``, PyTorch's ``.pth``, ``.pt`` and ``.bin``, and Detectron2's ``.pkl``.
    Dictionaries around the weights ("model", "state_dict") and a common prefix ``module.`` are
    taken off. No file can run code: only tensors, arrays and plain containers are built.

    ``timm:NAME`` reads the pretrained weights that timm knows by NAME, which it downloads once.

    Raises:
        FileNotFoundError: no such file.
        ImportError: timm is wanted and not installed.
        ValueError: the file has another suffix, is damaged, or holds more than plain weights; timm
            does not know the name or cannot download it.
    """
    if str(path).startswith(TIMM):
        return _read_timm(str(path))
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix not in _READERS:
        raise ValueError(
            f"cannot read {path}: weights are files ending in {', '.join(_READERS)}, "
            f"not {path.suffix!r}"
        )
    try:
        content = _READERS[path.suffix](path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds objects other than weights, which are not loaded because "
            f"they could run code. If you trust it, save its tensors again, alone: {error}"
        ) from error
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged or no {path.suffix} file: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _read_timm(source: str) -> State:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ImportError(f"{source} needs timm: pip install timm") from error
    try:
        return timm.create_model(source.removeprefix(TIMM), pretrained=True).state_dict()
    except Exception as error:  # of timm, of the Hugging Face Hub, or of any way to reach it
        raise ValueError(
            f"timm has no pretrained weights for {source}, or cannot download them; the path of a "
            f"file that is here needs no network: {error}"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not PyTorch's whole message, which recommends to load the file unsafely.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"refused the global {refused[1]}" if refused else "no plain PyTorch checkpoint"
        raise pickle.UnpicklingError(reason) from error


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": safetensors.torch.load_file,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".pkl": read_pickle,
}

# What the readers raise on truncated or foreign bytes: a pickle of garbage can fail anyhow.
_DAMAGED = (
    SafetensorError,
    RuntimeError,
    EOFError,
    OverflowError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
)
