"""The one place that decides which backend runs an op.

``reference`` is PyTorch, ``native`` the compiled C++/CUDA extension, ``triton`` the kernels in
``kernels/``. ``auto`` (the default) takes the first backend of an op's own preference order that
can run here. The choice is made by ``with e3va.backend(name):`` or by the environment variable
``E3VA_BACKEND``; a backend asked for by name that cannot run raises, ``auto`` never does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

BACKENDS = ("reference", "native", "triton")
ENVIRONMENT_VARIABLE = "E3VA_BACKEND"

# A process-wide value, not a ContextVar: autograd runs backward in threads of its own.
_requested: str | None = None


class _Backend(NamedTuple):
    run: Callable[..., Any]
    why_not: Callable[[torch.device, torch.dtype], str | None]


_ops: dict[str, dict[str, _Backend]] = {}


class Choice(NamedTuple):
    """The backend an op will use, and why in words."""

    backend: str
    reason: str


def register(
    op: str,
    backend: str,
    why_not: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Attach a function to ``op`` as its ``backend``. Backends are preferred in the reverse order
    of registration. ``why_not(device, dtype)`` is None where it can run, else the reason."""

    def attach(run: Callable[..., Any]) -> Callable[..., Any]:
        _ops.setdefault(op, {})[backend] = _Backend(run, why_not)
        return run

    return attach


def requested_backend() -> str:
    """The backend asked for here: a name of :data:`BACKENDS`, or "auto".

    Raises:
        ValueError: ``E3VA_BACKEND`` names no backend.
    """
    return _requested or _checked(
        os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE
    )


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside with one backend: "reference", "native", "triton" or "auto".

    Raises:
        ValueError: no such backend.
        RuntimeError: later, from the op, when the backend cannot run it.
    """
    global _requested
    previous, _requested = _requested, _checked(name, "backend")
    try:
        yield
    finally:
        _requested = previous


def operators() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(_ops)


def explain(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Which backend ``op`` uses for tensors of ``device`` and ``dtype``, and why.

    Raises:
        RuntimeError: a backend was asked for by name and cannot run; says why not.
    """
    candidates = _ops[op]
    wanted = requested_backend()
    if wanted != "auto":
        if wanted not in candidates:
            raise RuntimeError(
                f"backend {wanted!r} was asked for, but {op} has only {', '.join(candidates)}"
            )
        why_not = candidates[wanted].why_not(device, dtype)
        if why_not is not None:
            raise RuntimeError(
                f"backend {wanted!r} was asked for, but cannot run {op} here: {why_not}"
            )
        return Choice(wanted, "asked for by name")
    passed_over: list[str] = []
    for name in reversed(candidates):
        why_not = candidates[name].why_not(device, dtype)
        if why_not is None:
            return Choice(name, "; ".join(passed_over) or "the fastest there is")
        passed_over.append(f"not {name}: {why_not}")
    raise AssertionError(f"{op} has no reference backend")


def run(op: str, like: torch.Tensor, *args: Any) -> Any:
    """Run ``op`` on the backend chosen for ``like``'s device and dtype."""
    return _ops[op][explain(op, like.device, like.dtype).backend].run(*args)


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name
