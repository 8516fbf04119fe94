"""Whether a training step fits, how much would, and what to switch on where it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from e3va.budget.cards import Card, memory_of
from e3va.figures import pyplot, save
from e3va.methods import METHODS

MIB = 2**20
MOST, WIDEST = 256, 2
"""Images of a step, and times the size asked for, beyond which nobody looks."""

LONGEST = 2**14
"""Pixels of a side of an image that is traced, at the most."""

TRIES = 4
"""Sizes that are traced to find the largest."""

STEP = 32
"""Pixels that sizes are multiples of, as the coarsest map wants them."""

Size = tuple[int, int]

logger = logging.getLogger(__name__)


class Setup(Protocol):
    """What a shell knows how to build and to trace.

    Attributes:
        method: how the backbone is tuned.
        images: how many are computed at once where nobody says.
        batch: images of an optimizer step, as it is configured, that may be computed in parts;
            None: all images are computed at once.
    """

    method: str
    images: int
    batch: int | None

    def split(self, images: int, size: Size) -> dict[str, int]:
        """The bytes of a step of as many images of that size at once, see
        :func:`e3va.measure.step_split`. Of fewer than ``batch`` it is the last of the parts that
        such a step is taken in, which holds the gradients of the others."""

    def changed(self, method: str) -> Setup:
        """The same, tuned otherwise."""

    def savings(self) -> Iterator[tuple[str, Setup]]:
        """What makes a step smaller, each in words and as it would be."""

    def fewer(self, images: int, most: int) -> tuple[str, int]:
        """How instead of ``images`` at the most ``most`` are computed at once: in words, and how
        many then are."""


S = TypeVar("S", bound=Setup)


@dataclass(frozen=True)
class Budget:
    """What a step needs.

    Attributes:
        method: how the backbone is tuned. images: those computed at once. size: theirs.
        total_bytes: at the peak of a step, with weights, gradients and the optimizer's state.
        split: the same by what they are of, see :data:`e3va.measure.SPLIT`.
        card, card_bytes, usable_bytes, fits: what it has to fit in; None without a card.
        largest_batch: images that fit at once, traced at one and at two more than ``images``, and
            taken to grow so: the first step has its peak where larger ones may not have theirs.
        largest_size: height and width of the same shape that fit, traced; at most :data:`WIDEST`
            times ``size``; None: nothing that was tried fits.
        accumulate: the least SOLVER.ACCUMULATE by which the configured batch fits; None: no one,
            or there is no such setting.
        advice: what makes it smaller, where it does not fit: words, and the bytes then.
    """

    method: str
    images: int
    size: Size
    total_bytes: int
    split: Mapping[str, int]
    card: str | None = None
    card_bytes: int | None = None
    usable_bytes: int | None = None
    fits: bool | None = None
    largest_batch: int | None = None
    largest_size: Size | None = None
    accumulate: int | None = None
    advice: tuple[tuple[str, int], ...] = ()

    def describe(self) -> str:
        """For reading."""
        height, width = self.size
        lines = [
            f"{self.method}, {self.images} × {height}×{width}: {_mib(self.total_bytes)} at the peak"
        ]
        lines += [f"  {name.replace('_', ' '):20}{_mib(n):>12}" for name, n in self.split.items()]
        if self.usable_bytes is None:
            return "\n".join([*lines, "name a --card to see what fits"])
        verdict = "fits in" if self.fits else "does not fit in"
        lines.append(f"{verdict} the {_mib(self.usable_bytes)} that {self.card} has for tensors")
        lines.append(f"largest batch at this size: {self.largest_batch}")
        side = "×".join(map(str, self.largest_size)) if self.largest_size else "none"
        lines.append(f"largest image at this batch: {side}")
        if self.accumulate is not None and self.accumulate > 1:
            lines.append(f"the configured batch: by SOLVER.ACCUMULATE {self.accumulate}")
        for words, total in self.advice:
            fits = "fits" if total <= self.usable_bytes else "too large still"
            lines.append(f"  {words}: {_mib(total)}, {fits}")
        return "\n".join(lines)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "advice": [{"change": w, "total_bytes": n} for w, n in self.advice]}


def budget(setup: Setup, images: int, size: Size, card: Card | None = None) -> Budget:
    """What a step of ``setup`` needs, and whether it fits on ``card``.

    Args:
        images: computed at once. size: height and width of each, padded as in training.

    Raises:
        ValueError: these are more, or larger, than anybody asks for.
    """
    if images > MOST or max(size) > LONGEST:
        raise ValueError(
            f"at most {MOST} images of {LONGEST} pixels a side are planned, got {images} of "
            f"{size[0]}×{size[1]}"
        )
    split = setup.split(images, size)
    total = sum(split.values())
    needed = Budget(method=setup.method, images=images, size=size, total_bytes=total, split=split)
    if card is None:
        return needed
    usable = card.usable
    most = _largest_batch(setup, images, size, usable, total)
    fits = total <= usable
    largest = _largest_size(setup, images, size, usable, total)
    changes: list[tuple[str, int]] = []
    if not fits:
        changes = [(words, sum(s.split(images, size).values())) for words, s in setup.savings()]
        changes = [(words, saved) for words, saved in changes if saved < total]
        if images > 1 and most:
            words, number = setup.fewer(images, most)
            changes.append((words, sum(setup.split(number, size).values())))
        if largest:
            words = f"images of {largest[0]}×{largest[1]}"
            changes.append((words, sum(setup.split(images, largest).values())))
    return replace(
        needed,
        card=card.name,
        card_bytes=card.memory,
        usable_bytes=usable,
        fits=fits,
        largest_batch=most,
        largest_size=largest,
        accumulate=_accumulate(setup.batch, most) if setup.batch else None,
        advice=tuple(changes),
    )


def warn(told: Callable[[], tuple[Setup, int, Size]], device: torch.device) -> None:
    """Say before a training on ``device`` that its largest step is not going to fit, and what to
    do.

    Args:
        told: gives the setup, how many images are computed at once, and their size. Where it fails,
            or the step cannot be traced, training goes on: a plan is not to be in the way.
    """
    try:
        setup, images, size = told()
        card = memory_of(device)
        needed = sum(setup.split(images, size).values())
        if needed > card.usable:
            logger.warning(
                "a step of %d images of %d×%d takes about %s, and %s has %s for it: %s",
                *(images, *size, _mib(needed), card.name, _mib(card.usable)),
                advice(setup, images, size, device),
            )
    except Exception as error:
        logger.info("The memory of a step is not known: %r", error)


def advice(setup: Setup, images: int, size: Size, device: torch.device) -> str:
    """What to do on ``device`` where a step does not fit, in a line."""
    try:
        found = budget(setup, images, size, memory_of(device))
        changes = [f"{words} ({_mib(total)})" for words, total in found.advice]
    except (RuntimeError, ValueError, ImportError) as error:  # it is an error's message anyway
        logger.debug("nothing is advised: %s", error)
        changes = []
    if not changes:
        fewer = [setup.fewer(images, images // 2)[0]] if images > 1 else []
        changes = [*fewer, "smaller images"]
    return "try " + ", or ".join(changes)


def savings_by(
    changes: Mapping[str, str], changed: Callable[[Mapping[str, str]], S]
) -> Iterator[tuple[str, S]]:
    """A setup by each of ``changes`` of its settings, and by all of them, for
    :meth:`Setup.savings`."""
    for name, value in changes.items():
        yield f"{name} {value}", changed({name: value})
    if len(changes) > 1:
        yield "all of these", changed(changes)


def _largest_batch(setup: Setup, images: int, size: Size, usable: int, total: int) -> int:
    if total > usable and images == 1:
        return 0
    more, most = (sum(setup.split(images + n, size).values()) for n in (1, 2))
    each = max(1, most - more)
    return max(0, min(MOST, images + 2 + (usable - most) // each))


def _largest_size(setup: Setup, images: int, size: Size, usable: int, total: int) -> Size | None:
    """By the pixels, which bytes grow about as; what is told was traced."""
    short = min(size)
    known = {short: total}
    side = max(STEP, short // 2 // STEP * STEP)
    for _ in range(TRIES):
        if side in known:
            break
        known[side] = sum(setup.split(images, _shaped(size, side)).values())
        # Along the line through the two that are nearest to filling the card.
        a, b = sorted(known, key=lambda s: abs(known[s] - usable))[:2]
        each = (known[a] - known[b]) / (a**2 - b**2)
        pixels = a**2 + (usable - known[a]) / each if each > 0 else 0.0
        side = max(STEP, min(int(max(0.0, pixels) ** 0.5), WIDEST * short) // STEP * STEP)
    fitting = [s for s, needed in known.items() if needed <= usable]
    return _shaped(size, max(fitting)) if fitting else None


def _shaped(size: Size, short: int) -> Size:
    """The size of the same shape of a shorter side."""
    long = max(STEP, round(max(size) * short / min(size) / STEP) * STEP)
    return (short, long) if size[0] <= size[1] else (long, short)


def _accumulate(batch: int, most: int) -> int | None:
    return next((n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most), None)


def compare(setup: Setup, images: int, size: Size, card: Card | None, path: Path) -> list[str]:
    """Draw every method's bytes as a bar, against the line of the card, into the PNG ``path``.

    Returns:
        The methods that could not be traced, and why.

    Raises:
        ImportError: matplotlib is missing.
    """
    plt = pyplot()
    splits, missing = {}, []
    for method in METHODS:
        try:
            splits[method] = setup.changed(method).split(images, size)
        except ImportError as error:
            missing.append(f"{method}: {error}")
    order = sorted(splits, key=lambda method: sum(splits[method].values()), reverse=True)
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(order) + 1.6))
    left = dict.fromkeys(order, 0.0)
    colours = plt.get_cmap("tab20")
    for index, part in enumerate(next(iter(splits.values()))):
        sizes = [splits[method][part] / MIB for method in order]
        starts = [left[method] for method in order]
        axes.barh(order, sizes, left=starts, label=part.replace("_", " "), color=colours(index))
        left = {m: left[m] + size for m, size in zip(order, sizes, strict=True)}
    if card is not None:
        axes.axvline(card.usable / MIB, color="black", linestyle="--", label=f"fits in {card.name}")
    axes.set(xlabel="MiB at the peak of a step", title=f"{images} × {size[0]}×{size[1]}")
    axes.legend(fontsize=7, loc="upper right")  # beside the short bars
    figure.tight_layout()
    save(figure, path)
    return missing


def _mib(number: int) -> str:
    return f"{number / MIB:.0f} MiB"
