"""Trunks and their files: loaded, opened, saved, and told by a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from e3va.files import atomic_path
from e3va.trunks import FAMILIES, Trunk, TrunkFamily, family_of
from e3va.trunks.base import WEIGHT_HASH
from e3va.weights.reading import State, read_candidates, resolve


def convert_weights(state: Mapping[str, Tensor]) -> State:
    """The trunk in ``state``, under our names; everything else is left out.

    Raises:
        ValueError: no trunk that a family knows is among the names.
    """
    return _translate(state)[1]


def _is_whole(family: TrunkFamily, trunk: State) -> bool:
    if any(re.search(_SWIN_V2, name) for name in trunk):
        return False
    try:
        family.config_of(trunk)
    except ValueError:
        return False
    return True


_SWIN_V2 = r"\.(logit_scale|(cpb|continuous_position_bias)_mlp)"

_FOREIGN = {
    "a Swin V2, whose attention is another": _SWIN_V2,
    "a plain vision transformer (ViT)": r"(^|\.)(cls_token|class_token|cls_token_embed)",
    "a ConvNeXt": r"(dwconv|conv_dw|depthwise_conv)\.weight$",
    "a ResNet": r"(^|\.)layer1\.0\.conv1\.weight$|(^|\.)res2\.0\.conv1\.weight$",
}
"""Networks that are taken for a trunk, and names by which they are told."""


def _translate(state: Mapping[str, Tensor]) -> tuple[TrunkFamily, State]:
    families = ", ".join(FAMILIES)
    recognised = [(family, family.translate(state)) for family in FAMILIES.values()]
    for family, translated in recognised:
        if translated is not None and _is_whole(family, translated):
            return family, translated
    for what, pattern in _FOREIGN.items():
        if any(re.search(pattern, name) for name in state):
            raise ValueError(f"holds {what}: a trunk is one of the family {families}")
    for family, translated in recognised:
        if translated is not None:  # a part of a trunk, of which there will be more to say
            return family, translated
    names = ", ".join(list(state)[:5]) or "none at all"
    wanted = ", ".join(mark for family in FAMILIES.values() for mark in family.marks)
    raise ValueError(f"holds no trunk: no name ends in one of {wanted}; its first are {names}")


def load_trunk(trunk: Trunk, path: str | os.PathLike[str]) -> None:
    """Load pretrained weights into ``trunk``, in the dtype that it stores them in.

    Args:
        trunk: the trunk; unchanged if this fails.
        path: a file that :func:`read_weights` reads, named as :func:`convert_weights` knows, or its
            URL, ``e3va://NAME`` for one that ships with the package, or ``timm:NAME``.

    Raises:
        FileNotFoundError: no such file.
        ImportError: timm is wanted and not installed.
        ValueError: the file is damaged, holds no trunk, or another one than ``trunk``; timm cannot
            bring it.
    """
    trunk.load_state_dict(_fitting(trunk, _read_trunk(path)[1], path))


def _read_trunk(path: str | os.PathLike[str]) -> tuple[TrunkFamily, State]:
    candidates = read_candidates(resolve(os.fspath(path)))
    problem = ""
    for where, state in candidates.items():
        try:
            return _translate(state)
        except ValueError as error:
            problem = problem or (f"(under {where}) {error}" if where else str(error))
    raise ValueError(f"{path} {problem}")


def check_weights(path: str | os.PathLike[str], config: Any) -> None:
    """That :func:`load_trunk` can load the weights in ``path`` into a trunk of ``config``.

    Raises:
        FileNotFoundError, ImportError, ValueError: as :func:`load_trunk` does.
    """
    with torch.device("meta"):
        trunk = family_of(config).frozen(config)
    _fitting(trunk, _read_trunk(path)[1], path)


def _fitting(trunk: Trunk, state: State, path: str | os.PathLike[str]) -> State:
    """The weights in ``state``, which are finite and fit ``trunk``."""
    weights = {name: value.float() for name, value in state.items() if name != WEIGHT_HASH}
    own = trunk.state_dict()
    if WEIGHT_HASH in own:
        weights[WEIGHT_HASH] = _hash(state)
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{path} is broken: {name} holds values that are NaN or infinite")
    family = family_of(trunk.config)
    if problems := _compare(weights, own):
        raise ValueError(
            f"{path} does not fit the trunk: it looks like {_describe(family, weights)}, the trunk "
            f"is {_describe(family, own)}. {'; '.join(problems)}"
        )
    return weights


def open_trunk(path: str | os.PathLike[str]) -> Any:
    """The frozen trunk that a file of pretrained weights holds, whichever variant it is.

    Args:
        path: a file that :func:`read_weights` reads, named as :func:`convert_weights` knows, or
            ``timm:NAME``.

    Raises:
        FileNotFoundError: no such file.
        ImportError: timm is wanted and not installed.
        ValueError: the file is damaged, or holds no trunk; timm cannot bring it.
    """
    family, state = _read_trunk(path)
    try:
        trunk = family.frozen(family.config_of(state))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    trunk.load_state_dict(_fitting(trunk, state, path))
    return trunk


def save_trunk(
    trunk: Trunk,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the trunk's weights as safetensors, under the official names.

    The file's header names the trunk's family under "family" and has the fields of its architecture
    as JSON under "config".

    Args:
        trunk: the trunk.
        path: the file; replaced as a whole or not at all.
        dtype: what to store the weights in (default: as they are).
        metadata: further strings to keep in the file's header (default: none).

    Raises:
        TypeError: ``dtype`` is not floating.
        ValueError: ``path`` does not end in ``.safetensors``, ``metadata`` has a name that the
            header has, or a weight does not fit into ``dtype``.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"a trunk is saved as .safetensors, not as {path}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating, got {dtype}")
    for name, value in trunk.named_parameters():
        if dtype is not None and value.abs().max() > torch.finfo(dtype).max:
            raise ValueError(f"{dtype} cannot hold the weights, such as {name}")
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous()
        for name, value in trunk.state_dict().items()
        if value.is_floating_point() or value.any()  # a hash that is not known says nothing
    }
    config = json.dumps(dataclasses.asdict(trunk.config))
    family = family_of(trunk.config).name
    header = {"format": "pt", "family": family, "config": config}
    if taken := header.keys() & (metadata or {}):
        raise ValueError(f"metadata must not have {', '.join(sorted(taken))}: the header does")
    header |= metadata or {}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(state, temporary, header)


def trunk_hash(trunk: Trunk, names: Collection[str] | None = None) -> str:
    """SHA-256, in hexadecimal, of the trunk's weights as their file had them.

    So it does not depend on the dtype that a frozen trunk stores them in. A trunk that was not
    loaded by :func:`load_trunk` is named by the weights it has.

    Args:
        trunk: the trunk.
        names: those of its tensors that count (default: all).
    """
    state = trunk.state_dict()
    if names is not None:
        state = {name: state[name] for name in names}
    return bytes(_hash(state).tolist()).hex()


def _hash(state: Mapping[str, Tensor]) -> Tensor:
    """The hash that ``state`` carries, else that of its weights in float32: uint8 [32]."""
    known = state.get(WEIGHT_HASH)
    if known is not None and known.any():
        return known
    digest = hashlib.sha256()
    for name in sorted(state.keys() - {WEIGHT_HASH}):
        value = state[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _compare(state: State, own: State) -> list[str]:
    """What of ``state`` does not fit ``own``, in words."""
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} ({list(state[name].shape)} instead of {list(own[name].shape)})"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    return [
        f"{len(names)} {problem}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for problem, names in problems.items()
        if names
    ]


def _describe(family: TrunkFamily, state: State) -> str:
    """The variant that the shapes of ``state`` speak of."""
    try:
        return family.describe(family.config_of(state))
    except ValueError:
        return f"no {family.name} that we know"
