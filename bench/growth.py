"""How the memory of a training step grows with the image, the batch and the network.

    python -m bench.growth [--axes …] [--methods …] [--json FILE] [--plot FILE]

Live bytes at the peak of one whole step of Mask R-CNN on a Swin-T (``total_bytes`` of bench.step),
counted without the arithmetic (e3va.budget.ShapesOnly). Along each axis one thing changes;
the others are those of the config, the image 800×1344 and the batch one image. Depth is that of the
third stage, which Swin-T and Swin-S differ in alone; the rank is LoRA's, and the highway's α.
"""

from __future__ import annotations

import argparse
import gc
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from bench.environment import environment, picture_file, result_file
from bench.step import MIB, step
from bench.train_step import ALL_METHODS, COCO, Trainee
from e3va.budget import ShapesOnly
from e3va.figures import pyplot, save
from e3va.files import write_json
from e3va.measure import whole_step_bytes

CONFIG = "coco/mask_rcnn_e3va_swin_t_1x"
METHODS = ("full", "stock", "lora", "e3va")


class Point(NamedTuple):
    """Where on an axis, and the step that is measured there."""

    value: int
    size: tuple[int, int] = COCO
    images: int = 1
    overrides: tuple[Any, ...] = ()


AXES = {
    "side of the image": [Point(side, (side, side)) for side in (512, 768, 1024, 1280, 1536)],
    "images": [Point(images, images=images) for images in (1, 2, 4, 8)],
    "blocks of stage 3": [
        Point(6, overrides=("MODEL.TRUNK.VARIANT", "swin_t")),
        Point(18, overrides=("MODEL.TRUNK.VARIANT", "swin_s")),
    ],
    "rank": [
        Point(
            rank,
            overrides=("MODEL.TUNING.LORA.RANK", rank, "MODEL.HIGHWAY.KERNEL_DIM", rank // 2),
        )
        for rank in (4, 8, 16, 32, 64)
    ],
    "side of the window": [
        Point(side, overrides=("MODEL.TRUNK.WINDOW_SIZE", side)) for side in (7, 12)
    ],
}
"""The axes, by name."""


def step_bytes(method: str, point: Point) -> int:
    """Live bytes of a whole step at their peak."""
    shapes = ShapesOnly()
    trainee = Trainee(CONFIG, method, point.size, point.images, shapes, point.overrides)
    run = partial(step, trainee.model, trainee.batch, trainee.optimizer, early=method != "stock")
    with shapes:
        found = whole_step_bytes(trainee.model, trainee.optimizer, run)
    del trainee, run
    gc.collect()  # models have cycles
    return found


def plot(path: Path, axes: dict[str, dict[str, list[list[int]]]]) -> None:
    """A panel for each axis, a line for each method."""
    figure, panels = pyplot().subplots(1, len(axes), figsize=(3.2 * len(axes), 3.4), squeeze=False)
    for panel, (axis, methods) in zip(panels.flat, axes.items(), strict=True):
        for method, points in methods.items():
            values, totals = zip(*points, strict=True)
            panel.plot(values, [t / MIB for t in totals], marker="o", markersize=3, label=method)
        panel.set(xlabel=axis, ylim=(0, None))
    panels[0, 0].set_ylabel("MiB of a step")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--methods", nargs="+", choices=ALL_METHODS, default=list(METHODS))
    parser.add_argument(
        "--json", type=result_file, help="write the results to this file, as they come"
    )
    parser.add_argument("--plot", type=picture_file, help="draw them to this file")
    options = parser.parse_args(arguments)
    axes: dict[str, dict[str, list[list[int]]]] = {}
    report = {"environment": environment(), "config": CONFIG, "axes": axes}
    points = [(a, m, point) for a in options.axes for m in options.methods for point in AXES[a]]
    for axis, method, point in tqdm(points, unit="step", disable=None):
        line = axes.setdefault(axis, {}).setdefault(method, [])
        line.append([point.value, step_bytes(method, point)])
        if options.json:
            write_json(options.json, report)
    for axis, methods in axes.items():
        for method, line in methods.items():
            found = ", ".join(f"{value}: {total / MIB:.0f} MiB" for value, total in line)
            print(f"{axis}, {method}: {found}")
    if options.plot:
        plot(options.plot, axes)
    return report


if __name__ == "__main__":
    main()
