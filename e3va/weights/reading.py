"""Files of weights, read without running code, and timm's by name."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from e3va.files import atomic_path, placeholder
from e3va.weights.pickles import read_pickle

State = dict[str, Tensor]

TIMM = "timm:"
"""What the name of a model of timm's begins with, where it stands for a file."""


PACKAGED = "e3va://"
"""What the name of weights that ship with the package begins with."""


def resolve(source: str) -> Path | str:
    """The file that a name of weights stands for: a path, a URL (downloaded once, into PyTorch's
    hub folder, and compared with the hash that its name tells, if any), or e3va://NAME, which
    ships with the package; timm:NAME stays as it is.

    Raises:
        FileNotFoundError: no such weights ship with the package.
        ValueError: the URL cannot be reached, or brings another file than its name says.
    """
    if source.startswith(TIMM):
        return source
    if source.startswith(PACKAGED):
        name = source.removeprefix(PACKAGED)
        folder = Path(__file__).parents[1] / "demo"
        if not (folder / name).is_file():
            known = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
            raise FileNotFoundError(f"no weights {source!r} ship with e3va; known: {known}")
        return folder / name
    if source.startswith(("http://", "https://")):
        name = Path(urllib.parse.urlsplit(source).path).name
        # Files of one name are published at many places.
        place = hashlib.sha256(source.encode()).hexdigest()[:12]
        target = Path(torch.hub.get_dir()) / "checkpoints" / f"{place}-{name}"
        if not target.is_file():
            told = re.search(r"-([a-f0-9]{8,})\.", name)  # as in swin_t-704ceda3.pth
            try:
                with atomic_path(target) as temporary:
                    torch.hub.download_url_to_file(
                        source, str(temporary), hash_prefix=told and told[1]
                    )
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"cannot download {source}; the path of a file that is here needs no network, "
                    f"nor does --model swin_digits: {error}"
                ) from error
        return target
    return Path(source).expanduser()


def read_weights(path: str | os.PathLike[str]) -> State:
    """The tensors of a checkpoint, on the CPU, under the names they have in it.

    Reads ``.safetensors``, PyTorch's ``.pth``, ``.pt`` and ``.bin``, and Detectron2's ``.pkl``.
    Dictionaries around the weights, of any name and depth, and a common prefix ``module.`` are
    taken off. No file can run code: only tensors, arrays and plain containers are built.

    ``timm:NAME`` reads the pretrained weights that timm knows by NAME, which it downloads once.

    Raises:
        FileNotFoundError: no such file.
        ImportError: timm is wanted and not installed.
        ValueError: the file has another suffix, is damaged, or holds more than plain weights, or
            none; timm does not know the name or cannot download it.
    """
    return next(iter(read_candidates(path).values()))


def read_candidates(path: str | os.PathLike[str]) -> dict[str, State]:
    """All dictionaries of tensors in a checkpoint, by the keys that lead to them ("model",
    "state_dict.model", …; "": the file itself), as :func:`read_weights` reads and prefers them."""
    if str(path).startswith(TIMM):
        return {"": _read_timm(str(path))}
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix not in _READERS:
        raise ValueError(
            f"cannot read {path}: weights are files ending in {', '.join(_READERS)}, "
            f"not {path.suffix!r}"
        )
    if what := placeholder(path):
        raise ValueError(f"{path} is no weights but {what}")
    content = read_content(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    found = dict(_dictionaries(content))
    if not found:
        keys = ", ".join(f"{key} ({_kind(value)})" for key, value in list(content.items())[:8])
        raise ValueError(f"{path} holds no dictionary of weights; its keys are {keys or 'none'}")
    return found


def read_content(path: Path) -> Any:
    """What a file that :func:`read_weights` reads holds, as it is, on the CPU; one of another
    suffix is PyTorch's.

    Raises:
        ValueError: the file is damaged, does not fit into the memory, or holds more than tensors,
            arrays and plain containers.
    """
    try:
        return _READERS.get(path.suffix, _read_torch)(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds objects other than weights, which are not loaded because "
            f"they could run code. If you trust it, save its tensors again, alone: {error}"
        ) from error
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into the memory: {error}") from error
    except _DAMAGED as error:
        why = str(error) or "it ends too early"
        raise ValueError(f"{path} is damaged or no {path.suffix} file: {why}") from error


_PREFERRED = ("model", "state_dict", "teacher", "model_ema", "state_dict_ema", "ema")
"""Keys of the weights, where a checkpoint has several of them."""

_DEEPEST = 8
"""Dictionaries within each other that are looked into."""


def _dictionaries(content: Mapping[Any, Any]) -> Iterator[tuple[str, State]]:
    """The dictionaries of tensors in ``content``, the outermost first."""
    level: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    for _ in range(_DEEPEST):
        inner: list[tuple[str, Mapping[Any, Any]]] = []
        for where, mapping in level:
            state = {str(name): v for name, v in mapping.items() if isinstance(v, Tensor)}
            if state:
                if all(name.startswith("module.") for name in state):
                    state = {name.removeprefix("module."): v for name, v in state.items()}
                yield where, state
            keys = sorted(
                (key for key, value in mapping.items() if isinstance(value, Mapping)),
                key=lambda key: _PREFERRED.index(key) if key in _PREFERRED else len(_PREFERRED),
            )
            inner += [(f"{where}.{key}" if where else str(key), mapping[key]) for key in keys]
        level = inner


def _kind(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, Mapping) else type(value).__name__


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
    except OSError as error:
        if error.errno == errno.EINVAL:  # a file that is cut
            raise EOFError from error
        raise
    except (pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
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
