"""A model and a schedule that fit the data, each choice with its reason."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3va.data.folder import Data
from e3va.data.images import image_size
from e3va.data.maps import Maps
from e3va.trunks import FAMILIES, source_of, trunk_config

DETECTORS = {
    "boxes": ("faster_rcnn", "retinanet"),
    "masks": ("mask_rcnn",),
    "semantic": ("upernet",),
}
"""Detectors of each task; the first is the default."""

DEFAULT_TRUNK = "swin_t"
SMALL_TRUNKS = ("swin_digits",)
"""Trunks so small that narrow heads and a higher learning rate fit them."""

SIDES = (160, 800)
"""The least and the most that the shorter side of images is brought to, in pixels."""

EPOCHS = 30
ITERATIONS = (500, 90_000)
"""The least and the most that a schedule is, without being told."""


@dataclass(frozen=True)
class Plan:
    """What is trained, on what, for how long.

    Attributes:
        task: "boxes", "masks" or "semantic".
        detector: one of :data:`DETECTORS`.
        variant: of the trunk, see :func:`e3va.trunk_config`; weights: where its pretrained ones
            come from.
        method: how the backbone is tuned.
        iterations: optimizer steps. batch_size: images of each.
        lr: the highest learning rate; warmup: iterations until it is reached.
        min_size: what the shorter side of images is brought to; max_size: limit of the longer one.
        anchor_sizes: sides of the anchors on each level, one more than the trunk has stages, in
            pixels of such images; none for semantic maps.
        eval_period: iterations between evaluations. checkpoint_period: between checkpoints.
        flip: mirror half of the training images.
        seed: of all that is random.
    """

    task: str
    detector: str
    variant: str
    weights: str
    method: str
    iterations: int
    batch_size: int
    lr: float
    warmup: int
    min_size: int
    max_size: int
    anchor_sizes: tuple[int, ...]
    eval_period: int
    checkpoint_period: int
    flip: bool
    seed: int

    @property
    def is_small(self) -> bool:
        return self.variant in SMALL_TRUNKS

    def describe(self) -> str:
        """The choices, a line each."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v != ()}
        width = max(map(len, fields)) + 2
        return "\n".join(f"  {name:{width}}{_text(value)}" for name, value in fields.items())


def make_plan(
    data: Data,
    *,
    model: str | None = None,
    weights: str | None = None,
    method: str = "e3va",
    iterations: int | None = None,
    seed: int = 0,
) -> Plan:
    """A plan for ``data``.

    Args:
        data: the data.
        model: a trunk ("swin_b"), or a detector and a trunk ("retinanet_swin_b"); default:
            :data:`DEFAULT_TRUNK` under the task's first detector.
        weights: of the trunk, a file, a URL or timm:NAME (default: where they are published).
        method: how the backbone is tuned.
        iterations: optimizer steps (default: :data:`EPOCHS` epochs, within :data:`ITERATIONS`).
        seed: of all that is random.

    Raises:
        ValueError: no such model, it is for another task, or it has no weights.
    """
    detector, variant = model_of(model or DEFAULT_TRUNK, data.task)
    weights = weights or source_of(variant)
    if weights is None:
        raise ValueError(f"{variant} has no published weights: name them by --weights")
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if Path(weights).expanduser().is_file():  # found from any working directory
        weights = str(Path(weights).expanduser().absolute())
    train = data.splits["train"]
    items = train.pairs if isinstance(train, Maps) else train.images
    min_size, max_size = _sizes(train)
    small = variant in SMALL_TRUNKS
    batch_size = min(4 if small else 2, len(items))
    if iterations is None:
        least, most = ITERATIONS
        iterations = min(max(least, math.ceil(EPOCHS * len(items) / batch_size)), most)
    lr = 1e-3 if small else 6e-5 if data.task == "semantic" else 1e-4
    return Plan(
        task=data.task,
        detector=detector,
        variant=variant,
        weights=weights,
        method=method,
        iterations=iterations,
        batch_size=batch_size,
        lr=lr,
        warmup=min(500, iterations // 10),
        min_size=min_size,
        max_size=max_size,
        anchor_sizes=_anchors(train, min_size, max_size, len(trunk_config(variant).dims) + 1),
        eval_period=max(500, math.ceil(iterations / 5)),
        checkpoint_period=min(500, math.ceil(iterations / 10)),
        flip=not all(name.isdigit() for name in data.classes),  # a mirrored digit is none
        seed=seed,
    )


def model_of(name: str, task: str | None = None) -> tuple[str, str]:
    """The detector and the trunk that ``name`` means, for a task (default: any; a trunk alone is
    then under the detector of masks).

    Raises:
        ValueError: no such model, or it is for another task.
    """
    fitting = DETECTORS[task] if task else tuple(d for known in DETECTORS.values() for d in known)
    variants = [variant for family in FAMILIES.values() for variant in family.variants]
    for known in DETECTORS.values():
        for detector in known:
            if name.startswith(f"{detector}_"):
                if detector not in fitting:
                    raise ValueError(
                        f"the model {name!r} is not for {task}; for these are {', '.join(fitting)}"
                    )
                trunk_config(name.removeprefix(f"{detector}_"))
                return detector, name.removeprefix(f"{detector}_")
    if name not in variants:
        raise ValueError(
            f"unknown model {name!r}: a trunk ({', '.join(variants)}), or a detector and a trunk "
            f"(such as {fitting[-1]}_{DEFAULT_TRUNK})"
        )
    return DETECTORS[task or "masks"][0], name


def _sizes(split: Any) -> tuple[int, int]:
    """The shorter side that images are brought to, and the limit of the longer one."""
    if isinstance(split, Maps):
        step = max(1, len(split.pairs) // 100)
        sizes = [image_size(image) for image, _ in split.pairs[::step]]
    else:
        sizes = [(image["height"], image["width"]) for image in split.images]
    shorter = statistics.median(min(size) for size in sizes)
    ratio = statistics.quantiles([max(s) / min(s) for s in sizes] * 2, n=20)[-1]
    side = round(min(max(shorter, SIDES[0]), SIDES[1]))
    return side, max(side, min(math.ceil(side * ratio), math.ceil(side * 5 / 3)))


def _anchors(split: Any, min_size: int, max_size: int, levels: int) -> tuple[int, ...]:
    """Doubling sides, of which the smallest suits the small objects of the data."""
    if isinstance(split, Maps):
        return ()
    scale = {
        image["id"]: min(
            min_size / min(image["height"], image["width"]),
            max_size / max(image["height"], image["width"]),
        )
        for image in split.images
    }
    sides = sorted(
        math.sqrt(a["bbox"][2] * a["bbox"][3]) * scale[a["image_id"]]
        for a in split.annotations
        if not a["iscrowd"]
    )
    small = sides[len(sides) // 10] if sides else 32
    first = 2 ** min(5, max(3, round(math.log2(max(small, 1)))))
    return tuple(first * 2**level for level in range(levels))


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
