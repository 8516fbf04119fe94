"""Is a kernel right on this GPU, and faster than PyTorch? It is run there and compared.

Right means: on small maps that no tile divides it is as close to float64 as PyTorch in the same
dtype is, or within some roundings of it. Faster is told at the shape at hand, for all maps of about
its size; see :mod:`e3va.ops.verdicts`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from e3va.ops.backends.registry import IMPLEMENTATIONS, PREFERENCE
from e3va.ops.variants import Draw, Variant, compared, examples

MAPS = ((2, 13, 21), (1, 1, 1))
"""(B, H, W) of the maps that show whether a kernel is right."""

STAGE = (1, 50, 84)
"""That of a stage of 16 pixels a token, of an image 800×1344."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative error (norm over norm) allowed against float64: some 4 units of the dtype's rounding."""

WORST = 8.0
"""How many times that a single value may be off, relative to itself and to the typical one."""

MARGIN = 0.95
"""The part of the reference's time that a kernel must stay below: less is noise."""

RUNS = 9


class Verdict(NamedTuple):
    """Of one trial.

    Attributes:
        error: the largest relative error (norm over norm) of a result against float64; None: it
            gave none, or no number.
        right: whether every result is as it should be.
        seconds: of a run at the shape at hand; None: it was not timed.
        reference_seconds: of the reference's; None: it was not timed, or ran out of memory.
        failure: what was raised; None: nothing.
    """

    error: float | None = None
    right: bool = False
    seconds: float | None = None
    reference_seconds: float | None = None
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Right, and the faster one by more than noise."""
        if not self.right or self.seconds is None:
            return False
        return self.reference_seconds is None or self.seconds < MARGIN * self.reference_seconds

    @property
    def lasting(self) -> bool:
        """Whether another process would find the same: not where memory or a tool was missing."""
        if self.failure:
            return False
        return not self.right or None not in (self.seconds, self.reference_seconds)

    def describe(self) -> str:
        """The verdict in words."""
        error = "no number" if self.error is None else f"{self.error:.1e}"
        if self.failure:
            return self.failure
        if not self.right:
            return f"its results are wrong here, by {error}"
        if self.seconds is None:
            return f"right, to {error}"
        if self.reference_seconds is None:
            return f"right, to {error}, where the reference runs out of memory"
        ratio = self.reference_seconds / self.seconds
        return f"right, to {error}, and {ratio:.2g} times as fast as the reference"


def check(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, variant: Variant
) -> Verdict:
    """Whether ``backend`` computes a variant of an op rightly here; it is not timed.

    Raises:
        Exception: whatever the backend raises.
    """
    run, reference = (IMPLEMENTATIONS[op][name].run for name in (backend, "reference"))
    largest, right = 0.0, True
    for size in MAPS:
        arguments = variant.arguments(Draw(dtype), *size)
        here = tree_map_only(Tensor, lambda value: value.to(device), arguments)
        exact = tree_map_only(Tensor, Tensor.cpu, reference(*tree_map_only(Tensor, _double, here)))
        ours = _errors(variant, arguments, run(*here), exact)
        theirs = _errors(variant, arguments, reference(*here), exact)
        for (norm, worst), (norm_too, worst_too) in zip(ours, theirs, strict=True):
            largest = max(largest, norm) if math.isfinite(norm) else math.inf
            allowed = TOLERANCE[dtype]
            # Not "greater": NaN is wrong, too.
            right &= norm <= max(allowed, 2 * norm_too)
            right &= worst <= max(WORST * allowed, 2 * worst_too)
    return Verdict(error=largest if math.isfinite(largest) else None, right=right)


class Trial(NamedTuple):
    """One of :func:`selftest`."""

    op: str
    backend: str
    dtype: str
    variant: Variant
    verdict: Verdict


def selftest(device: torch.device) -> Iterator[Trial]:
    """Try every kernel that ``device`` can run, in every dtype, on examples of what backbones
    need; on a GPU they are timed, too. Nothing is kept, and nothing that was kept is looked at."""
    for dtype in TOLERANCE:
        for op, variant in examples():
            for backend in PREFERENCE[op]:
                implementation = IMPLEMENTATIONS[op][backend]
                if backend == "reference" or implementation.obstacle(device, dtype, variant):
                    continue
                with current(device):
                    found = try_kernel(op, backend, device, dtype, variant)
                yield Trial(op, backend, str(dtype).removeprefix("torch."), variant, found)


@torch.no_grad()
def try_kernel(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    variant: Variant,
    timed: tuple[Any, ...] | None = None,
) -> Verdict:
    """``timed``: arguments to measure it with, if it is right; default: on a GPU those of a stage,
    elsewhere it is not measured."""
    with torch.autocast(device.type, enabled=False):
        try:
            found = check(op, backend, device, dtype, variant)
            if not found.right:
                return found
            if timed is None and device.type == "cuda":
                timed = variant.arguments(Draw(dtype), *STAGE)
                timed = tree_map_only(Tensor, lambda value: value.to(device), timed)
            if timed is None:
                return found
            ours, theirs = _times(op, backend, device, timed)
            return found._replace(seconds=ours, reference_seconds=theirs)
        except torch.AcceleratorError:
            raise  # the GPU computes nothing any more, by whichever backend
        except Exception as error:  # whatever a kernel dies of, PyTorch's own may be used
            return Verdict(failure=f"it fails here with {type(error).__name__}: {error}")


def _errors(
    variant: Variant, arguments: tuple[Any, ...], found: Any, exact: Any
) -> list[tuple[float, float]]:
    """Of each result: the relative error, and the worst of a single value."""
    errors = []
    for value, expected in compared(variant, arguments, found, exact):
        value, expected = value.double(), expected.double()
        if value.shape != expected.shape:
            errors.append((float("inf"), float("inf")))
        elif value.numel():
            off = (value - expected).abs()
            typical = expected.square().mean().sqrt().clamp_min(1e-30)
            worst = (off / (expected.abs() + typical)).max()
            errors.append(((off.square().mean().sqrt() / typical).item(), worst.item()))
    return errors


def _times(
    op: str, backend: str, device: torch.device, arguments: tuple[Any, ...]
) -> tuple[float | None, float | None]:
    """Median seconds of ours and of the reference, interleaved; None: it ran out of memory."""
    runs = {name: IMPLEMENTATIONS[op][name].run for name in (backend, "reference")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(RUNS + 2):
        for name, run in list(runs.items()):
            once = None
            try:
                once = _seconds(run, device, arguments)
            except torch.OutOfMemoryError:
                if name == backend:
                    raise
            if once is None:  # out of its except, whose traceback holds what it had made
                del runs[name], seconds[name]
                torch.cuda.empty_cache()
            elif i > 1:  # the first ones compile and choose
                seconds[name].append(once)
    ours, theirs = (
        statistics.median(seconds[name]) if name in seconds else None
        for name in (backend, "reference")
    )
    return ours, theirs


def _seconds(run: Callable[..., Any], device: torch.device, arguments: tuple[Any, ...]) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run(*arguments)
        return time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run(*arguments)
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def fields(variant: Variant) -> str:
    """As "channels=96, norm=None, …"."""
    return ", ".join(f"{key}={value}" for key, value in variant._asdict().items())


def current(device: torch.device) -> AbstractContextManager[None]:
    """With the device's own stream and events."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _double(value: Tensor) -> Tensor:
    # Codes are no numbers.
    return value.double() if value.is_floating_point() and value.element_size() > 1 else value
