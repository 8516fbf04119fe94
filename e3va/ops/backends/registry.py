"""Which backends each op has, in which order they are preferred, and what they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

PREFERENCE = {
    "adapters": ("triton", "native", "reference"),
    "adapters_backward": ("triton", "native", "reference"),
    "tap_gradient": ("triton", "native", "reference"),
    "stage_exit_backward": ("triton", "native", "reference"),
    "sublayer_epilogue": ("triton", "native", "reference"),
    "window_attention": ("native", "reference"),
}
"""Of each op its backends, most preferred first: the order is that on every device, for a backend
says itself where it cannot run."""


class Implementation(NamedTuple):
    """Of an op on a backend.

    Attributes:
        run: what computes it.
        why_not: of a device and a dtype: None where it can run, else the reason.
        cannot: of a device and a variant of the op, see :mod:`e3va.ops.variants`: the same.
    """

    run: Callable[..., Any]
    why_not: Callable[[torch.device, torch.dtype], str | None]
    cannot: Callable[..., str | None]

    def obstacle(self, device: torch.device, dtype: torch.dtype, variant: Any = None) -> str | None:
        """None where it can run a variant (default: any), else the reason."""
        reason = self.why_not(device, dtype)
        return self.cannot(device, variant) if reason is None and variant is not None else reason


IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {op: {} for op in PREFERENCE}
"""By op and backend."""


def register(
    op: str,
    backend: str,
    why_not: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None,
    cannot: Callable[..., str | None] = lambda device, variant: None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Attach a function to ``op`` as its ``backend``, see :class:`Implementation`.

    Raises:
        LookupError: :data:`PREFERENCE` does not name it.
    """
    if backend not in PREFERENCE.get(op, ()):
        raise LookupError(f"PREFERENCE names no backend {backend!r} of {op!r}")

    def attach(run: Callable[..., Any]) -> Callable[..., Any]:
        IMPLEMENTATIONS[op][backend] = Implementation(run, why_not, cannot)
        return run

    return attach
