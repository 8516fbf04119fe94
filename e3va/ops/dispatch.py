"""The one place that decides which backend runs an op.

``auto`` (the default) takes the first of the backends that
:data:`~e3va.ops.backends.registry.PREFERENCE` names for an op that can run here; on a GPU only if
it is right and faster than the reference there, which a trial at its first use shows, see
:mod:`e3va.ops.trial`. The choice is made by ``with e3va.backend(name):`` or by
the environment variable ``E3VA_BACKEND``, each a name or several, most wanted first:
``triton,native``. Where none that was asked for can run an op, it raises; ``auto`` never does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from e3va.ops import verdicts
from e3va.ops.backends.registry import IMPLEMENTATIONS, PREFERENCE
from e3va.ops.variants import VARIANTS

BACKENDS = ("reference", "native", "triton")
ENVIRONMENT_VARIABLE = "E3VA_BACKEND"
TRIED_ON = {"cuda"}
"""Types of devices on which "auto" tries a kernel before it takes it: they differ too much."""

# A process-wide value, not a ContextVar: autograd runs backward in threads of its own.
_requested: tuple[str, ...] | None = None


_chosen: dict[tuple[Any, ...], str] = {}


class BackendUnavailable(RuntimeError):
    """No backend that was asked for by name can run an op here; says why not."""


class Choice(NamedTuple):
    """The backend an op will use, and why in words."""

    backend: str
    reason: str


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
        BackendUnavailable: later, from the op, when no backend that was asked for can run it.
    """
    global _requested
    previous, _requested = _requested, _parse(name, "backend")
    try:
        yield
    finally:
        _requested = previous


def explain(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    arguments: tuple[Any, ...] | None = None,
    size: int = 0,
) -> Choice:
    """Which backend ``op`` uses for tensors of ``device`` and ``dtype``, and why.

    Args:
        arguments: of the op, with which it is tried where "auto" has to; default: it is told what
            is known without them.
        size: of its maps, see :func:`size_of`.

    Raises:
        BackendUnavailable: backends were asked for by name and none can run.
    """
    wanted = requested_backends()
    variant = None if arguments is None else VARIANTS[op].of(*arguments)
    passed_over: list[str] = []
    for name in wanted or PREFERENCE[op]:
        if name not in PREFERENCE[op]:
            passed_over.append(f"not {name}: {op} has only {', '.join(PREFERENCE[op])}")
            continue
        reason = IMPLEMENTATIONS[op][name].obstacle(device, dtype, variant)
        if reason is None and wanted:
            return Choice(name, "asked for by name")
        if reason is None and device.type in TRIED_ON and name != "reference":
            if arguments is None:
                return Choice(name, "if it is right and faster, which its first use will show")
            verdict = verdicts.verdict(op, name, device, dtype, arguments, size)
            if verdict.passed:
                return Choice(name, verdict.describe())
            reason = verdict.describe()
        if reason is None:
            return Choice(name, "; ".join(passed_over) or "the fastest there is")
        passed_over.append(f"not {name}: {reason}")
    raise BackendUnavailable(
        f"backend {','.join(wanted)!r} was asked for, but cannot run {op} here: "
        + "; ".join(passed_over)
    )


def run(op: str, like: torch.Tensor, *arguments: Any) -> Any:
    """Run ``op`` on the backend chosen for ``like``, a map [..., C], autocast or not."""
    device, dtype, size = like.device, like.dtype, size_of(like)
    key = op, device, dtype, size, requested_backends(), VARIANTS[op].of(*arguments)
    name = _chosen.get(key)
    if name is None:
        name = explain(op, device, dtype, arguments, size).backend
        if not _capturing(device):  # nothing can be tried then
            _chosen[key] = name
    run = IMPLEMENTATIONS[op][name].run
    if not torch.is_autocast_enabled(like.device.type):
        return run(*arguments)
    with torch.autocast(like.device.type, enabled=False):
        return run(*arguments)


def size_of(like: torch.Tensor) -> int:
    """Half the binary logarithm of a map's tokens: what is faster changes with it, slowly."""
    return (like.numel() // max(1, like.shape[-1])).bit_length() // 2


def forget() -> None:
    """Choose anew, op by op, as in a new process."""
    _chosen.clear()


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@functools.cache
def _parse(names: str, source: str) -> tuple[str, ...]:
    if names == "auto":
        return ()
    wanted = tuple(name.strip() for name in names.split(","))
    if not set(wanted) <= set(BACKENDS):
        raise ValueError(
            f"{source} must be auto, or one or more of {', '.join(BACKENDS)}, got {names!r}"
        )
    return wanted
