"""How long training steps take."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm


class Seconds(NamedTuple):
    """Of a training step: in all, and of its parts. Medians, so that the parts need not sum up."""

    step: float
    forward: float
    backward: float
    optimizer: float


def step_seconds(
    steps: Mapping[str, Callable[[], Tensor]],
    repeats: int,
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
) -> dict[str, Seconds]:
    """Seconds of training steps, by name: each gives the loss, whose backward runs. Medians of
    interleaved ``repeats``; on a GPU by its own clock.

    Args:
        steps: by name.
        repeats: steps of each.
        optimizers: what takes a step after each backward, and forgets the gradients (default:
            nothing).
    """
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for _ in tqdm(range(repeats), desc="steps", unit="round", disable=None):
        for name, step in steps.items():
            moments = [_moment()]
            loss = step()
            moments.append(_moment())
            loss.backward()
            moments.append(_moment())
            if optimizers:
                optimizers[name].step()
                optimizers[name].zero_grad()
            moments.append(_moment())
            parts = [_between(*pair) for pair in itertools.pairwise(moments)]
            measured[name].append((sum(parts), *parts))
    return {
        name: Seconds(*map(statistics.median, zip(*rounds, strict=True)))
        for name, rounds in measured.items()
    }


def _moment() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3
