"""Every tuning method on every track of digits in scenes: accuracy and its cost, in one table.

    python -m bench.tracks [--tracks instances boxes semantic] [--methods …] [--json FILE]

Trains detectron2_configs/digits/*.yaml by each method with the same seed and schedule. Parameters
and bytes saved for backward are the backbone's; peak live bytes are a training step's; seconds per
iteration are medians of interleaved steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import e3va
from bench.environment import environment
from e3va.backbone import METHODS
from e3va.demo.digits import write_digits
from e3va.demo.engines import coco_overrides, detectron2_loss
from e3va.files import write_json
from e3va.measure import step_costs, step_seconds

CONFIGS = Path(e3va.__file__).parents[1] / "detectron2_configs/digits"
TIMED_STEPS = 10


class Track(NamedTuple):
    """A config, what makes it read the digits of a folder, and where its results have the number
    that counts."""

    config: str
    overrides: Callable[[Path], list[str]]
    task: str
    metric: str
    name: str


TRACKS = {
    "instances": Track(
        "mask_rcnn_e3va.yaml",
        lambda data: coco_overrides(data / "coco"),
        task="segm",
        metric="AP",
        name="mask AP",
    ),
    "boxes": Track(
        "retinanet_e3va.yaml",
        lambda data: ["DATASETS.VOC_TREE.ROOT", str(data / "voc")],
        task="bbox",
        metric="AP50",
        name="box AP50",
    ),
    "semantic": Track(
        "upernet_e3va.yaml",
        lambda data: ["DATASETS.SEMANTIC_MAPS.ROOT", str(data / "semantic")],
        task="sem_seg",
        metric="mIoU",
        name="mIoU",
    ),
}


class Trained(NamedTuple):
    score: float
    model: nn.Module
    loss: Callable[[], Tensor]


def train(track: Track, method: str, data: Path, iterations: int, output: Path) -> Trained:
    """One training, on the digits that ``data`` holds."""
    from detectron2.utils.env import seed_all_rng

    from e3va.detectron2 import Trainer, load_config, register_datasets

    overrides: list[Any] = ["MODEL.TUNING.METHOD", method, "OUTPUT_DIR", str(output), "SEED", 0]
    overrides += ["SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", 10 * iterations]
    overrides += track.overrides(data)
    cfg = load_config(str(CONFIGS / track.config), overrides)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    register_datasets(cfg)
    seed_all_rng(0)
    output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg)
    results = trainer.train()
    model = trainer.model.train()
    batch = next(iter(trainer.build_train_loader(cfg)))
    loss = partial(detectron2_loss, model, batch)
    return Trained(float(results[track.task][track.metric]), model, loss)


def measure(runs: dict[str, Trained]) -> dict[str, dict[str, float]]:
    """The score and the cost of each method."""
    results: dict[str, dict[str, float]] = {}
    for method, run in runs.items():
        backbone, seen = run.model.backbone, []
        backbone = getattr(backbone, "bottom_up", backbone)
        hook = backbone.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        run.loss()
        hook.remove()
        costs = step_costs(run.model, backbone, seen[0], run.loss)
        results[method] = {"score": run.score, **costs}
    seconds = step_seconds({method: run.loss for method, run in runs.items()}, TIMED_STEPS)
    for method, result in results.items():
        result["seconds_per_iter"] = seconds[method]
    return results


def table(name: str, results: dict[str, dict[str, float]]) -> str:
    rows = [f"{name:12}{'':8}{'trained':>10}{'saved':>10}{'peak live':>11}{'s/iter':>8}"]
    for method, r in results.items():
        rows.append(
            f"{method:12}{r['score']:8.1f}{r['trainable_params'] / 1e6:8.3f} M"
            f"{r['saved_bytes'] / 2**20:6.1f} MiB{r['peak_live_bytes'] / 2**20:7.1f} MiB"
            f"{r['seconds_per_iter']:8.3f}"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tracks", nargs="+", choices=TRACKS, default=list(TRACKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--iterations", type=int, default=400, help="of each (default 400)")
    parser.add_argument("--output", type=Path, default=Path("output/tracks"))
    parser.add_argument("--json", type=Path, help="write to this file, where other tracks stay")
    options = parser.parse_args(arguments)
    data = write_digits(options.output / "digits", seed=0)
    report: dict[str, Any] = {"tracks": {}}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    for name in options.tracks:
        track, runs = TRACKS[name], {}
        for method in options.methods:
            folder = options.output / name / method
            runs[method] = train(track, method, data, options.iterations, folder)
        results = measure(runs)
        report["tracks"][name] = {
            "metric": track.name,
            "iterations": options.iterations,
            "environment": environment(),
            "methods": results,
        }
        print(table(track.name, results), flush=True)
        if options.json:
            write_json(options.json, report)
    return report


if __name__ == "__main__":
    main()
