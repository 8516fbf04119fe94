"""Averaged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Exponential moving average of what is trained of a model.

    The decay grows to its final value, as min(decay, (1 + n) / (10 + n)) after n iterations, so
    that the first weights are soon forgotten.

    Args:
        model: the model.
        decay: the final decay, in [0, 1).

    Raises:
        ValueError: ``decay`` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"SOLVER.EMA.DECAY must be in [0, 1), got {decay}")
        self._decay = decay
        self._own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take the weights after ``iteration`` in."""
        own = list(self._own.values())
        if not self._average:
            self.load_state_dict({})
        decay = min(self._decay, (1 + iteration) / (10 + iteration))
        get_ema_multi_avg_fn(decay)(list(self._average.values()), own, 0)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights."""
        own = {name: p.detach().clone() for name, p in self._own.items()}
        self._set(self._average)
        try:
            yield
        finally:
            self._set(own)

    def apply(self) -> None:
        """Give the model the averaged weights for good."""
        self._set(self._average)

    @torch.no_grad()
    def _set(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._own[name].copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        return self._average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``; from the model's weights where they are not in it or of another
        shape."""
        fits = {n for n, p in self._own.items() if n in state and state[n].shape == p.shape}
        self._average = {
            n: (state[n].to(p) if n in fits else p.detach()).clone() for n, p in self._own.items()
        }
