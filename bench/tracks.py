"""Every tuning method on every track of digits in scenes, over several seeds: accuracy and cost.

    python -m bench.tracks [--tracks instances boxes semantic] [--methods …] [--seeds 0 1 2]
        [--json FILE]

Trains detectron2_configs/digits/*.yaml by each method, all with one schedule. A method's learning
rate is the best of a grid, multiples of the config's, by its mean score on the tuning scenes: the
first seed trains at all rates, the others at the one that is best so far, until the best one has
them all. What is reported is scored on the validation scenes; a training that diverges scores 0.
Tracks on real images, which $E3VA_DATA holds, have no tuning split and take the config's rate. With
--json results are kept as they come, and a run that was stopped is continued.

Parameters and bytes saved for backward are the backbone's; peak live bytes are a training step's;
seconds per iteration are medians of interleaved steps.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.environment import environment, kept, result_file
from e3va.demo.digits import write_digits
from e3va.demo.engines import coco_overrides, detectron2_loss
from e3va.files import write_json
from e3va.measure import bottom_up, step_costs, step_seconds
from e3va.methods import METHODS

CONFIGS = Path(__file__).parents[1] / "detectron2_configs"
RATES = (0.5, 1.0, 2.0)
TIMED_STEPS = 10


class Track(NamedTuple):
    """A config, what makes it read the digits of a folder and test on a split ("val", "tune"),
    where its results have the number that counts, and iterations after which full fine-tuning gains
    no more."""

    config: str
    overrides: Callable[[Path, str], list[str]] | None
    task: str
    metric: str
    name: str
    iterations: int


TRACKS = {
    "instances": Track(
        "digits/mask_rcnn_e3va.yaml",
        lambda data, split: coco_overrides(data / "coco", split),
        task="segm",
        metric="AP",
        name="mask AP",
        iterations=1000,
    ),
    "boxes": Track(
        "digits/retinanet_e3va.yaml",
        lambda data, split: [
            *("DATASETS.VOC_TREE.ROOT", str(data / "voc")),
            *("DATASETS.VOC_TREE.TEST_SPLIT", split),
        ],
        task="bbox",
        metric="AP50",
        name="box AP50",
        iterations=2500,
    ),
    "semantic": Track(
        "digits/upernet_e3va.yaml",
        lambda data, split: [
            *("DATASETS.SEMANTIC_MAPS.ROOT", str(data / "semantic")),
            *("DATASETS.SEMANTIC_MAPS.TEST_SPLIT", {"val": "validation", "tune": "tuning"}[split]),
        ],
        task="sem_seg",
        metric="mIoU",
        name="mIoU",
        iterations=1000,
    ),
    "nuclei": Track("real/nuclei_mask_rcnn_e3va.yaml", None, "segm", "AP", "mask AP", 800),
    "indoor": Track("real/indoor_semseg_upernet_e3va.yaml", None, "sem_seg", "mIoU", "mIoU", 800),
}
DIGITS = [name for name, track in TRACKS.items() if track.overrides]


class Setting(NamedTuple):
    """What all runs of a track share."""

    track: Track
    data: Path
    iterations: int
    output: Path


def load(setting: Setting, method: str, split: str = "val", overrides: tuple[Any, ...] = ()) -> Any:
    """The registered config of a method, tested on a split."""
    from e3va.detectron2 import load_config, register_datasets

    track = setting.track
    settings = ["MODEL.TUNING.METHOD", method, "SOLVER.MAX_ITER", setting.iterations]
    settings += ["SOLVER.CHECKPOINT_PERIOD", 10 * setting.iterations]
    settings += ["OUTPUT_DIR", str(setting.output / method), *overrides]
    settings += track.overrides(setting.data, split) if track.overrides else []
    cfg = load_config(str(CONFIGS / track.config), settings)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    register_datasets(cfg)
    return cfg


def train(setting: Setting, method: str, seed: int, rate: float) -> dict[str, float]:
    """One training at ``rate`` times the config's learning rate: its score, and that on the tuning
    scenes where there are any; 0 where the loss becomes infinite or NaN."""
    from detectron2.utils.env import seed_all_rng

    from e3va.detectron2 import Trainer

    track = setting.track
    cfg = load(setting, method, overrides=("SEED", seed))
    cfg.SOLVER.BASE_LR *= rate
    seed_all_rng(seed)
    (setting.output / method).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg)
    try:
        results = trainer.train()
    except FloatingPointError:
        return {"seed": seed, "rate": rate, "score": 0.0, "tune": 0.0}
    run = {"seed": seed, "rate": rate, "score": float(results[track.task][track.metric])}
    if track.overrides:
        results = Trainer.test(load(setting, method, "tune"), trainer.model)
        run["tune"] = float(results[track.task][track.metric])
    return run


def measure(setting: Setting, methods: list[str]) -> dict[str, dict[str, float]]:
    """What a step of each method costs."""
    from detectron2.utils.env import seed_all_rng

    from e3va.detectron2 import Trainer

    costs: dict[str, dict[str, float]] = {}
    losses = {}
    for method in methods:
        cfg = load(setting, method)
        seed_all_rng(0)
        model = Trainer.build_model(cfg).train()
        batch = next(iter(Trainer.build_train_loader(cfg)))
        losses[method] = partial(detectron2_loss, model, batch)
        backbone, seen = bottom_up(model), []
        hook = backbone.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        losses[method]()
        hook.remove()
        costs[method] = {**step_costs(model, backbone, seen[0], losses[method])}
    for method, seconds in step_seconds(losses, TIMED_STEPS).items():
        costs[method]["seconds_per_iter"] = seconds.step
    return costs


def best_rate(runs: list[dict[str, Any]], rates: list[float]) -> float:
    """That of ``rates`` with the best mean on the tuning scenes; the first of those that are
    equal."""
    tuned = {rate: [run.get("tune", 0.0) for run in runs if run["rate"] == rate] for rate in rates}
    return max(
        (rate for rate in rates if tuned[rate]), key=lambda rate: statistics.mean(tuned[rate])
    )


def next_run(
    runs: list[dict[str, Any]], seeds: list[int], rates: list[float]
) -> tuple[int, float] | None:
    """Seed and rate of the training to come; None: there are all."""
    done = {(run["seed"], run["rate"]) for run in runs}
    wanted = [(seeds[0], rate) for rate in rates]
    if done.issuperset(wanted):
        best = best_rate([run for run in runs if run["seed"] in seeds], rates)
        wanted = [(seed, best) for seed in seeds]
    return next((pair for pair in wanted if pair not in done), None)


def summarise(entry: dict[str, Any], seeds: list[int], rates: list[float]) -> None:
    """The method's best rate of ``rates``, and its scores there, from its runs so far."""
    runs = [run for run in entry["runs"] if run["seed"] in seeds]
    best = best_rate(runs, rates)
    found = {run["seed"]: run["score"] for run in runs if run["rate"] == best}
    scores = [found[seed] for seed in seeds if seed in found]
    entry |= {"rate": best, "scores": scores, "mean": statistics.mean(scores)}
    entry["std"] = statistics.stdev(scores) if len(scores) > 1 else None


def table(name: str, methods: dict[str, dict[str, Any]]) -> str:
    rows = [f"{name:12}{'mean':>6}{'std':>6}{'rate':>6}{'trained':>10}{'saved':>10}"]
    rows[0] += f"{'peak live':>12}{'s/iter':>8}  seeds"
    for method, r in methods.items():
        spread = "" if r["std"] is None else f"{r['std']:.1f}"
        row = f"{method:12}{r['mean']:6.1f}{spread:>6}{r['rate']:6.2g}"
        if "saved_bytes" in r:
            row += (
                f"{r['trainable_params'] / 1e6:8.3f} M{r['saved_bytes'] / 2**20:6.1f} MiB"
                f"{r['peak_live_bytes'] / 2**20:8.1f} MiB{r['seconds_per_iter']:8.3f}"
            )
        rows.append(row + "  " + " ".join(f"{score:.1f}" for score in r["scores"]))
    return "\n".join(rows)


def run_track(
    setting: Setting, options: argparse.Namespace, result: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Every method on a track; ``result`` grows, and ``keep`` is called when it has."""
    methods = result["methods"]
    rates = options.rates if setting.track.overrides else [1.0]
    for method in options.methods:
        entry = methods.setdefault(method, {"runs": []})
        while pair := next_run(entry["runs"], options.seeds, rates):
            run = {**train(setting, method, *pair), "environment": environment()}
            shown = {key: value for key, value in run.items() if key != "environment"}
            print(f"{setting.track.name} {method} {shown}", flush=True)
            entry["runs"].append(run)
            summarise(entry, options.seeds, rates)
            keep()
        summarise(entry, options.seeds, rates)
    for method, costs in measure(setting, list(methods)).items():
        methods[method] |= costs
    keep()


def _rate(word: str) -> float:
    rate = float(word)
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is no multiple of a learning rate")
    return rate


def _count(word: str) -> int:
    count = int(word)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{word} is less than 1")
    return count


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tracks", nargs="+", choices=TRACKS, default=DIGITS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--rates", nargs="+", type=_rate, default=list(RATES), help="of the config's (0.5 1 2)"
    )
    parser.add_argument("--iterations", type=_count, help="of each run (default: the track's)")
    parser.add_argument("--output", type=Path, default=Path("output/tracks"))
    parser.add_argument(
        "--json", type=result_file, help="keep the results in this file, and go on from it"
    )
    options = parser.parse_args(arguments)
    options.seeds = list(dict.fromkeys(options.seeds))
    report = kept(options.json, "tracks") or {"tracks": {}}

    def keep() -> None:
        if options.json:
            write_json(options.json, report)

    data = write_digits(options.output / "digits", seed=0)
    for name in options.tracks:
        track = TRACKS[name]
        iterations = options.iterations or track.iterations
        result = report["tracks"].setdefault(
            name, {"metric": track.name, "iterations": iterations, "methods": {}}
        )
        if result["iterations"] != iterations:
            sys.exit(
                f"{options.json} holds runs of {result['iterations']} iterations of {name}, not "
                f"{iterations}: name another file with --json"
            )
        result["environment"] = environment()
        run_track(Setting(track, data, iterations, options.output / name), options, result, keep)
        print(table(track.name, result["methods"]), flush=True)
    return report


if __name__ == "__main__":
    main()
