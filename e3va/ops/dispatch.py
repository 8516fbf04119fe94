"""The one place that decides which backend runs an op.

``reference`` is PyTorch, ``native`` the compiled C++/CUDA extension, ``triton`` the kernels in
``kernels/``. ``auto`` (the default) takes the first backend of an op's own preference order that
can run here. The choice is made by ``with e3va.backend(name):`` or by the environment variable
``E3VA_BACKEND``, each a name or several, most wanted first: ``triton,native``. Where none that was
asked for can run an op, it raises; ``auto`` never does.
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
_requested: tuple[str, ...] | None = None


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


def requested_backends() -> tuple[str, ...]:
    """The backends asked for here, most wanted first; none: "auto".

    Raises:
        ValueError: ``E3VA_BACKEND`` names no backend.
    """
    if _requested is not None:
        return _requested
    return _parse(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside with one backend, "reference", "native", "triton" or "auto", or with the
    first of several that can: "triton,native".

    Raises:
        ValueError: no such backend.
        RuntimeError: later, from the op, when no backend that was asked for can run it.
    """
    global _requested
    previous, _requested = _requested, _parse(name, "backend")
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
        RuntimeError: backends were asked for by name and none can run; says why not.
    """
    candidates = _ops[op]
    wanted = requested_backends()
    passed_over: list[str] = []
    for name in wanted or tuple(reversed(candidates)):
        if name not in candidates:
            passed_over.append(f"not {name}: {op} has only {', '.join(candidates)}")
            continue
        why_not = candidates[name].why_not(device, dtype)
        if why_not is None:
            if wanted:
                return Choice(name, "asked for by name")
            return Choice(name, "; ".join(passed_over) or "the fastest there is")
        passed_over.append(f"not {name}: {why_not}")
    raise RuntimeError(
        f"backend {','.join(wanted)!r} was asked for, but cannot run {op} here: "
        + "; ".join(passed_over)
    )


def run(op: str, like: torch.Tensor, *args: Any) -> Any:
    """Run ``op`` on the backend chosen for ``like``'s device and dtype, autocast or not."""
    chosen = _ops[op][explain(op, like.device, like.dtype).backend]
    with torch.autocast(like.device.type, enabled=False):
        return chosen.run(*args)


def _parse(names: str, source: str) -> tuple[str, ...]:
    if names == "auto":
        return ()
    wanted = tuple(name.strip() for name in names.split(","))
    if not set(wanted) <= set(BACKENDS):
        raise ValueError(
            f"{source} must be auto, or one or more of {', '.join(BACKENDS)}, got {names!r}"
        )
    return wanted
