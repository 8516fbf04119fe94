"""The demo: Mask R-CNN on digits in scenes, tuned in full, frozen and by E³VA, side by side.

    python -m e3va.demo [--engine detectron2|torchvision] [--seed 0] [--iterations 400]

Writes report.json (the results, and where they were measured), predictions.png and curves.png to
output/demo.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e3va.demo import engines, plots
from e3va.demo.digits import write_digits
from e3va.demo.engines import Trained
from e3va.environment import environment
from e3va.files import write_json
from e3va.measure import step_costs, step_seconds
from e3va.runs.commands import default_engine

METHODS = ("full", "frozen", "e3va")
TIMED_STEPS = 10


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m e3va.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=ENGINES, default=default_engine())
    parser.add_argument("--seed", type=int, default=0, help="of data and training (default 0)")
    parser.add_argument("--iterations", type=int, default=400, help="per method (default 400)")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    options = parser.parse_args(arguments)

    where, begin = environment(), time.perf_counter()
    print(f"Mask R-CNN by {options.engine}, {options.iterations} iterations per method")
    data = write_digits(options.output / "digits", seed=options.seed)
    runs = {
        method: ENGINES[options.engine](
            method,
            data / "coco",
            options.output / options.engine / method,
            options.iterations,
            options.seed,
        )
        for method in METHODS
    }
    report = {
        "environment": where,
        "engine": options.engine,
        "seed": options.seed,
        "iterations": options.iterations,
        "methods": measure(runs),
    }
    report["seconds"] = round(time.perf_counter() - begin)
    write_json(options.output / "report.json", report)
    detections = {method: run.detections for method, run in runs.items()}
    plots.predictions(options.output / "predictions.png", data / "coco", detections)
    losses = {method: run.losses for method, run in runs.items()}
    plots.curves(options.output / "curves.png", losses, report["methods"])
    print(table(report["methods"]))
    print(f"{options.output}/report.json, predictions.png, curves.png")


ENGINES: dict[str, Callable[[str, Path, Path, int, int], Trained]] = {
    "detectron2": engines.train_detectron2,
    "torchvision": engines.train_torchvision,
}


def measure(runs: dict[str, Trained]) -> dict[str, dict[str, Any]]:
    """AP, and the cost of a step: bytes, and seconds as medians of interleaved steps."""
    results: dict[str, dict[str, Any]] = {
        method: {**run.metrics, **step_costs(run.model, run.backbone, run.images, run.loss)}
        for method, run in runs.items()
    }
    seconds = step_seconds({method: run.loss for method, run in runs.items()}, TIMED_STEPS)
    for method, result in results.items():
        result["seconds_per_iter"] = seconds[method].step
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results for reading; parameters and saved bytes are the backbone's."""
    rows = [
        f"{'':8}{'box AP':>8}{'mask AP':>9}{'AP50':>7}{'trained':>10}{'saved':>10}"
        f"{'peak live':>11}{'s/iter':>8}"
    ]
    for method, r in results.items():
        rows.append(
            f"{method:8}{r['box_ap']:8.1f}{r['mask_ap']:9.1f}{r['mask_ap50']:7.1f}"
            f"{r['trainable_params'] / 1e6:8.3f} M{r['saved_bytes'] / 2**20:6.1f} MiB"
            f"{r['peak_live_bytes'] / 2**20:7.1f} MiB{r['seconds_per_iter']:8.3f}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the demo trains anew when it is run again", file=sys.stderr)
        sys.exit(130)
