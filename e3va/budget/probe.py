"""A step that is taken for its memory alone, before the first that counts."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

_NORMALIZER = "loss_normalizer"
"""RetinaNet's running mean, which is no buffer."""


def probe(model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Take a step of ``loss``, forward and backward, beside the optimizer's state that is to come,
    and leave all as it was: weights, gradients, buffers and random numbers.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    to_come = 2 if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else 1
    try:
        with _untouched(model):
            held = [] if optimizer.state else [torch.empty_like(p) for p in trained * to_come]
            loss().backward()
            del held
    finally:
        for parameter in trained:
            parameter.grad = None


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    normalizer = getattr(model, _NORMALIZER, None)
    try:
        with torch.random.fork_rng(devices=_devices(model)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        if normalizer is not None:
            setattr(model, _NORMALIZER, normalizer)
        elif hasattr(model, _NORMALIZER):  # it begins with the first step
            delattr(model, _NORMALIZER)


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.is_cuda} - {None})
