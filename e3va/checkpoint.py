"""What a checkpoint leaves out, and how it tells which trunk it belongs to.

A trunk's frozen weights stay as their file has them. A checkpoint leaves them out, names them by
their hash, and is loaded over no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from e3va.files import atomic_path
from e3va.trunks import Trunk
from e3va.weights import trunk_hash


def find_trunk(model: nn.Module) -> tuple[str, Trunk | None]:
    """The model's trunk, and what the names of its tensors begin with; ("", None) without one."""
    for name, module in model.named_modules():
        if isinstance(module, Trunk):
            return f"{name}." if name else "", module
    return "", None


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the tensors of the model's trunk that training leaves as they are."""
    prefix, trunk = find_trunk(model)
    return {prefix + name for name in _frozen(trunk)} if trunk else set()


def frozen_hash(model: nn.Module) -> str | None:
    """The hash of what :func:`frozen_names` names (see :func:`e3va.weights.trunk_hash`); None if
    that is nothing."""
    trunk = find_trunk(model)[1]
    names = _frozen(trunk) if trunk else set()
    return trunk_hash(trunk, names) if trunk and names else None


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without its trunk's frozen tensors."""
    frozen = frozen_names(model)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def check_state(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """What of ``state`` does not fit ``own``, in words; empty if all does."""
    unfit = sorted(state.keys() ^ own.keys()) + sorted(
        name for name in state.keys() & own.keys() if state[name].shape != own[name].shape
    )
    if not unfit:
        return ""
    return (
        f"{len(unfit)} tensors are missing, unexpected or of another shape, among them "
        f"{', '.join(unfit[:3])}"
    )


def check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """That all numbers of ``state``, which ``path`` held, are finite.

    Raises:
        ValueError: they are not.
    """
    broken = [
        name
        for name, value in state.items()
        if value.is_floating_point() and not value.float().isfinite().all()
    ]
    if broken:
        raise ValueError(f"{path} holds numbers that are not finite: {', '.join(broken[:3])}")


def check_target(target: Path) -> None:
    """That :func:`write_state` can write to ``target``.

    Raises:
        ValueError: it ends in neither .safetensors nor .pth.
    """
    if target.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"a model is exported as .safetensors or .pth, not as {target}")


def write_state(state: Mapping[str, Tensor], target: Path) -> None:
    """Write a model's whole state as one .safetensors or .pth file; replaced as a whole or not at
    all.

    Raises:
        ValueError: as :func:`check_target`, or a quantised trunk is to be written as .safetensors.
    """
    check_target(target)
    if target.suffix != ".pth" and any(map(is_traceable_wrapper_subclass, state.values())):
        raise ValueError(f"a trunk in eight bits is exported as .pth, not as {target}")
    tensors = {name: value.cpu().contiguous() for name, value in state.items()}
    with atomic_path(target) as temporary:
        if target.suffix == ".pth":
            torch.save({"model": tensors}, temporary)
        else:
            safetensors.torch.save_file(tensors, temporary, {"format": "pt"})


def _frozen(trunk: Trunk) -> set[str]:
    trained = {name for name, p in trunk.named_parameters() if p.requires_grad}
    return trunk.state_dict().keys() - trained
