"""Argument checks shared by the ops: TypeError for types, ValueError for shapes and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

REMEMBERED = 1000
_passed: set[tuple[Any, ...]] = set()


def check_once(check: Callable[..., None], *arguments: Any) -> None:
    """Call ``check(*arguments)``, unless arguments of the same form passed: it may look at their
    shapes, dtypes and devices, and at what is no tensor, alone."""
    if torch.compiler.is_compiling():  # once as it is
        check(*arguments)
        return
    form = check, _form(arguments)
    try:
        known = form in _passed
    except TypeError:  # sizes that are symbols, or what no op takes
        check(*arguments)
        return
    if not known:
        check(*arguments)
        if len(_passed) >= REMEMBERED:
            _passed.clear()
        _passed.add(form)


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    return tuple(map(_form, value)) if isinstance(value, list | tuple) else value


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise ValueError unless ``tensor`` has ``shape``; -1 stands for any size."""
    if tensor.dim() != len(shape) or any(
        want not in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is of a floating dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")


def check_same_dtype(**tensors: Tensor) -> None:
    """Raise TypeError unless all tensors share one floating dtype."""
    check_floating(**tensors)
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, {reference.dtype}, got {tensor.dtype}"
            )


def check_same_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on one device."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {first}, {reference.device}, got {tensor.device}"
            )


def check_frozen(op: str, **tensors: Tensor | None) -> None:
    """Raise RuntimeError if gradients were to flow through an op that has none."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"e3va::{op} belongs to the frozen trunk and has no backward, but {name} requires "
                "a gradient: call it under torch.no_grad()"
            )
