"""A step that is taken for its memory alone, before the first that counts."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from e3va.optim import state_bytes

_NORMALIZER = "loss_normalizer"
"""RetinaNet's running mean, which is no buffer."""


def probe(model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Take a step of ``loss``, forward and backward, beside the optimizer's state that is to come,
    and leave all as it was: weights, gradients, buffers and random numbers.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [0 if optimizer.state else state_bytes(optimizer, p) for p in trained]
    try:
        with _untouched(model):
            held = [
                torch.empty(size, dtype=torch.uint8, device=p.device)
                for p, size in zip(trained, sizes, strict=True)
            ]
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
