"""The demo: Mask R-CNN on digits in scenes, tuned in full, frozen and by E³VA, side by side.

    python -m e3va.demo [--engine detectron2|torchvision] [--seed 0] [--iterations 400]

Writes report.json, predictions.png and curves.png to output/demo.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from e3va.demo import engines, plots
from e3va.demo.digits import write_digits
from e3va.demo.engines import Trained
from e3va.files import atomic_path
from e3va.measure import peak_live_bytes, saved_bytes, trainable_parameters

METHODS = ("full", "frozen", "e3va")
TIMED_STEPS = 10


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m e3va.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=ENGINES, default=engines.default_engine())
    parser.add_argument("--seed", type=int, default=0, help="of data and training (default 0)")
    parser.add_argument("--iterations", type=int, default=400, help="per method (default 400)")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    options = parser.parse_args(arguments)

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
        "engine": options.engine,
        "seed": options.seed,
        "iterations": options.iterations,
        "methods": measure(runs),
    }
    with atomic_path(options.output / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n")
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
    results: dict[str, dict[str, Any]] = {}
    for method, run in runs.items():
        results[method] = {
            **run.metrics,
            "trainable_params": trainable_parameters(run.backbone),
            "saved_bytes": saved_bytes(run.backbone, partial(run.backbone, run.images)),
            "peak_live_bytes": peak_live_bytes(run.model, run.loss),
        }
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(TIMED_STEPS):
        for method, run in runs.items():
            start = time.perf_counter()
            run.loss().backward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[method].append(time.perf_counter() - start)
    for method in runs:
        results[method]["seconds_per_iter"] = statistics.median(seconds[method])
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
    main()
