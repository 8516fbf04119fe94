"""Training steps of a detector on shapes alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from e3va.budget.shapes import ShapesOnly
from e3va.measure import bottom_up, make_gradients, make_state, step_split


class Tracer:
    """A detector and its optimizer, made without values; its steps are counted, and take seconds.

    Leaves the random numbers as they were, of GPUs that are in use, too.

    Args:
        build: makes the detector. optimizer_of: makes the optimizer of it.

    Attributes:
        model: the detector, in training. optimizer: its optimizer, with its state.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    ) -> None:
        self._shapes = ShapesOnly()
        package = logging.getLogger("e3va")
        level = package.level
        package.setLevel(logging.ERROR)  # random weights are meant
        try:
            with _seeded(), self._shapes, self._shapes.unseen():
                self.model = build().train()
                self._shapes.forget(*self.model.parameters())
                self.optimizer = optimizer_of(self.model)
                make_state(self.model, self.optimizer)
        finally:
            package.setLevel(level)
        for owner in (bottom_up(self.model), self.optimizer):
            self._shapes.never_look_in(owner)

    def split(self, step: Callable[[], Any], part: bool = False) -> dict[str, int]:
        """The bytes of ``step()``, see :func:`e3va.measure.step_split`; as a later ``part`` of an
        accumulated step it finds the gradients of those before it (default: it is a whole one)."""
        with _seeded(), self._shapes:
            self.optimizer.zero_grad()
            if part:
                make_gradients(self.model)
            return step_split(self.model, step, self.optimizer)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    used = torch.cuda.is_initialized()  # a fork of others' would make contexts on them
    with torch.random.fork_rng(range(torch.cuda.device_count()) if used else []):
        torch.manual_seed(0)
        yield
