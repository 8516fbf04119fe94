"""What fits on which card: a model, from steps that are traced on shapes.

    python -m bench.cards [--setup NAME …] [--methods …] [--cards 4GB …] [--json FILE]

The setups of bench.train_step, in bf16. For every card the most images of the standard size that a
step holds, and the largest image that one holds alone, of the same shape, in steps of 32 pixels.
Bytes are those of whole steps (e3va.measure.step_split) under e3va.budget.ShapesOnly, at one to
three images and at sizes around the one that is told; how many more fit follows the last two. Of a
card's memory tensors have what e3va.budget.cards leaves them.

Memory that nobody touches takes none, but glibc gives out what was touched before: with
MALLOC_MMAP_THRESHOLD_=262144 in its environment the process stays below 2 GB.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

from tqdm import tqdm

from bench.environment import environment, result_file
from bench.step import step
from bench.train_step import ALL_METHODS, SETUPS, Trainee
from e3va.budget import ShapesOnly, budget, card
from e3va.files import write_json
from e3va.measure import step_split

DETECTORS = (
    "coco/mask_rcnn_e3va_swin_b_1x",
    "coco/cascade_mask_rcnn_e3va_swin_l_1x",
    "voc/retinanet_e3va_swin_l",
)
CARDS = ("4GB", "6GB", "8GB", "11GB", "24GB")
METHODS = ("stock", "full", "frozen", "lora", "e3va")


class Traced:
    """A setup of bench.train_step, as :class:`e3va.budget.Setup` wants it: all images at once."""

    batch = 1

    def __init__(self, name: str, method: str) -> None:
        self.method = method
        self._shapes = ShapesOnly()
        self._trainee = Trainee(name, method, SETUPS[name], 1, self._shapes)
        self.split = functools.cache(self._split)  # cards ask for the same steps

    def _split(self, images: int, size: tuple[int, int]) -> dict[str, int]:
        trainee = self._trainee
        batch = trainee.sample(size, images)
        run = partial(step, trainee.model, batch, trainee.optimizer, early=self.method != "stock")
        with self._shapes:
            return step_split(trainee.model, run, trainee.optimizer)

    def changed(self, method: str) -> Traced:
        raise NotImplementedError

    def savings(self) -> Iterator[tuple[str, Traced]]:
        return iter(())


def fits(name: str, method: str, cards: list[str]) -> dict[str, dict[str, Any]]:
    """By card: "largest_batch", and "largest_size" (None: not even the smallest image fits)."""
    setup = Traced(name, method)
    found = {}
    for each in cards:
        told = budget(setup, 1, SETUPS[name], card(each))
        found[each] = {"largest_batch": told.largest_batch, "largest_size": told.largest_size}
    del setup
    gc.collect()  # models have cycles
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", nargs="+", choices=SETUPS, default=list(DETECTORS))
    parser.add_argument("--methods", nargs="+", choices=ALL_METHODS, default=list(METHODS))
    parser.add_argument("--cards", nargs="+", metavar="CARD", default=list(CARDS))
    parser.add_argument(
        "--json", type=result_file, help="write the results to this file, as they come"
    )
    options = parser.parse_args(arguments)
    try:
        usable = {name: card(name).usable for name in options.cards}
    except ValueError as error:
        parser.error(str(error))
    setups: dict[str, dict[str, Any]] = {}
    report = {"environment": environment(), "usable_bytes": usable, "setups": setups}
    pairs = [(name, method) for name in options.setup for method in options.methods]
    for name, method in tqdm(pairs, unit="detector", disable=None):
        setups.setdefault(name, {})[method] = fits(name, method, options.cards)
        if options.json:
            write_json(options.json, report)
    return report


if __name__ == "__main__":
    main()
