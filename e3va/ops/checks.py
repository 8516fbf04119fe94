"""Argument checks shared by the ops: TypeError for types, ValueError for shapes and values."""

from __future__ import annotations

import torch
from torch import Tensor


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
