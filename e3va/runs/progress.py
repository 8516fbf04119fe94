"""The one bar of a training run."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from tqdm import tqdm


class Bar:
    """Iterations done and time left, with loss, learning rate, scores and peak memory; a line
    every half a minute where it is not looked at on a terminal.

    Args:
        start: iterations that were done before.
        total: all.
    """

    def __init__(self, start: int, total: int) -> None:
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(total=total, initial=start, unit="it", mininterval=interval)

    def step(self, loss: float, lr: float, metrics: Mapping[str, float], peak: int) -> None:
        """One more iteration; ``metrics`` of the last evaluation, ``peak`` in bytes."""
        shown = {"loss": f"{loss:.3f}", "lr": f"{lr:.1e}"}
        shown |= {name: f"{value:.1f}" for name, value in metrics.items() if "50" not in name}
        self._bar.set_postfix(shown | {"memory": f"{peak / 2**20:.0f} MiB"}, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """End it; may be called again."""
        self._bar.close()


def peak_bytes(device: torch.device) -> int:
    """The most GPU memory allocated since the last reset; on a CPU, resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_bytes(device: torch.device) -> None:
    """Count from now on, where that can be done: on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
