"""Training steps of the tracks' detectors by every tuning method: live bytes, split, and time.

    python -m bench.train_step [--setup NAME …] [--methods …] [--batch N] [--size H W]
        [--shapes] [--repeats N] [--json FILE] [--plot FILE]

A setup is named after its config under detectron2_configs. Memory is counted one method at a time,
as bench.step does; then the methods train some steps in turn, forward, backward and optimizer timed
apart. All are in memory then, six over a Swin-L at 800×1344 more than 24 GB. A CPU without bf16
takes hours for the arithmetic; --shapes counts without (e3va.budget.ShapesOnly).

With --json results are kept as they come, and a run that was stopped is continued: what is there is
not measured again.

Weights are random. UPerNet has group norms, as where a GPU holds one image: a batch norm cannot
train on one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.environment import environment, kept, picture_file, result_file
from bench.step import DEVICE, MIB, build, config_of, loss, measure
from e3va.budget import ShapesOnly
from e3va.figures import pyplot, save
from e3va.files import write_json
from e3va.measure import SPLIT, make_state, step_seconds
from e3va.methods import METHODS

CONFIGS = Path(__file__).parents[1] / "detectron2_configs"
COCO, VOC, ADE20K = (800, 1344), (600, 1000), (512, 512)
SETUPS = {
    "coco/mask_rcnn_e3va_swin_t_1x": COCO,
    "coco/mask_rcnn_e3va_swin_b_1x": COCO,
    "coco/mask_rcnn_e3va_swin_l_1x": COCO,
    "coco/cascade_mask_rcnn_e3va_swin_b_1x": COCO,
    "coco/cascade_mask_rcnn_e3va_swin_l_1x": COCO,
    "voc/retinanet_e3va_swin_l": VOC,
    "ade20k/upernet_e3va_swin_l": ADE20K,
}
"""Height and width of the images of each."""

BENCHMARKS = (
    "coco/cascade_mask_rcnn_e3va_swin_b_1x",
    "voc/retinanet_e3va_swin_l",
    "ade20k/upernet_e3va_swin_l",
)
"""What the paper (arXiv 2306.09729) measures. Its 62.2 % of memory is the mean of the first two."""

PUBLISHED = {"total_bytes": 62.2, "seconds_per_step": 26.2}
"""Percent that E³VA saves there against full fine-tuning, of memory and of time."""

ALL_METHODS = ("stock", *METHODS)


def overrides(name: str) -> list[str]:
    norm = ["MODEL.SEM_SEG_HEAD.NORM", "GN"] if "upernet" in name else []
    return ["MODEL.TRUNK.WEIGHTS", "", *norm]


class Trainee:
    """A detector, its optimizer and a batch; for steps within ``shapes`` where that is given.

    Args:
        name: of the config. method: "stock", or one of the tuning methods.
        size: height and width of the ``images`` of the batch.
        more: overrides of the config, KEY, VALUE, ….
    """

    def __init__(
        self,
        name: str,
        method: str,
        size: tuple[int, int],
        images: int,
        shapes: ShapesOnly | None = None,
        more: Sequence[Any] = (),
    ) -> None:
        from e3va.detectron2.solver import build_optimizer

        config, settings = str(CONFIGS / f"{name}.yaml"), [*overrides(name), *more]
        self._cfg = config_of(config, method, settings)
        self.model = build(config, method, settings, shapes)
        self.optimizer = build_optimizer(self._cfg, self.model)
        if shapes:
            shapes.never_look_in(self.optimizer)
            with shapes, shapes.unseen():
                make_state(self.model, self.optimizer)
        self.batch = self.sample(size, images)
        self.loss = partial(loss, self.model, self.batch, DEVICE)

    def sample(self, size: tuple[int, int], images: int) -> list[dict[str, Any]]:
        """A batch of other images."""
        from e3va.detectron2.budget import sample_batch

        return sample_batch(self._cfg, *size) * images


def saving(methods: dict[str, dict[str, Any]], key: str) -> float | None:
    """Percent that E³VA saves of what full fine-tuning takes; None if it is not known of both."""
    e3va, full = (methods.get(method, {}).get(key) for method in ("e3va", "full"))
    return 100 * (1 - e3va / full) if e3va and full else None


def average_saving(
    setups: dict[str, dict[str, Any]], key: str, names: Iterable[str] = BENCHMARKS
) -> float | None:
    """The mean of the savings on ``names``, as the paper's; None if one of them is not known."""
    savings = [saving(setups.get(name, {}), key) for name in names]
    known = [value for value in savings if value is not None]
    return statistics.mean(known) if known and len(known) == len(savings) else None


def average(setups: dict[str, dict[str, Any]], key: str) -> str:
    """The average savings of ``key`` in words, beside the paper's."""
    what = {"total_bytes": "Memory", "seconds_per_step": "Time"}[key]
    means = [average_saving(setups, key, BENCHMARKS[:n]) for n in (2, 3)]
    two, three = ("not measured" if m is None else f"{m:.1f} %" for m in means)
    return (
        f"{what} that e3va saves against full in the paper's three setups: {two} on average over "
        f"Cascade Swin-B and RetinaNet, {three} with UPerNet; the paper says {PUBLISHED[key]} %"
    )


def table(name: str, methods: dict[str, dict[str, Any]]) -> str:
    """Trained and saved are the backbone's; ratios are to full and to stock."""
    titles = f"{'':12}{'trained':>10}"
    titles += "".join(f"{title:>11}" for title in ("saved", "peak live", "whole step"))
    titles += (
        f"{'× full':>8}{'× stock':>8}{'forward':>9}{'backward':>9}{'optimizer':>10}{'step':>9}"
    )
    rows = [f"{name}\n{titles}{'× full':>8}{'× stock':>8}"]
    for method, r in methods.items():
        row = f"{method:12}{r['backbone_trainable_params'] / 1e6:8.3f} M"
        for key in ("saved_bytes", "peak_live_bytes", "total_bytes"):
            row += f"{r[key] / MIB:7.0f} MiB"
        row += _ratios(methods, r, "total_bytes")
        if r["seconds_per_step"] is not None:
            row += "".join(f"{r[f'{part}_seconds']:8.2f}s" for part in ("forward", "backward"))
            row += f"{r['optimizer_seconds']:9.2f}s{r['seconds_per_step']:8.2f}s"
            row += _ratios(methods, r, "seconds_per_step")
        rows.append(row)
    return "\n".join(rows)


def _ratios(methods: dict[str, dict[str, Any]], result: dict[str, Any], key: str) -> str:
    others = (methods.get(method, {}).get(key) for method in ("full", "stock"))
    return "".join(f"{result[key] / other:8.3f}" if other else f"{'':8}" for other in others)


def plot(path: Path, setups: dict[str, dict[str, Any]]) -> None:
    """The split of every setup as stacked bars."""
    height = 0.8 + sum(0.5 + 0.3 * len(methods) for methods in setups.values())
    figure, axes = pyplot().subplots(len(setups), 1, figsize=(9, height), squeeze=False)
    for axis, (name, methods) in zip(axes.flat, setups.items(), strict=True):
        left = [0.0] * len(methods)
        for key in SPLIT:
            widths = [result["split"][key] / MIB for result in methods.values()]
            axis.barh(list(methods), widths, left=left, label=key.replace("_", " "))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
    axis.set_xlabel("live MiB at the peak of a step")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, fontsize=7, loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()))
    save(figure, path)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--methods", nargs="+", choices=ALL_METHODS, default=list(ALL_METHODS))
    parser.add_argument("--batch", type=int, default=1, help="images of a step (default 1)")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="of the images (default: the setup's)"
    )
    parser.add_argument(
        "--shapes", action="store_true", help="count without the arithmetic, and time nothing"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; 0: none (default 3)")
    parser.add_argument(
        "--json", type=result_file, help="keep the results in this file, and go on from it"
    )
    parser.add_argument("--plot", type=picture_file, help="draw the bytes' split to this file")
    options = parser.parse_args(arguments)
    size = list(options.size) if options.size else None
    settings = {"batch": options.batch, "size": size, "shapes_only": options.shapes}
    report = _going_on(options.json, settings)

    def keep() -> None:
        if options.json:
            write_json(options.json, report)

    for name in options.setup:
        methods = report["setups"].setdefault(name, {})
        new = partial(Trainee, name, size=tuple(options.size or SETUPS[name]), images=options.batch)
        for method in tqdm(options.methods, desc=name, unit="method", disable=None):
            if method not in methods:
                shapes = ShapesOnly() if options.shapes else None
                trainee = new(method, shapes=shapes)
                with shapes or contextlib.nullcontext():
                    costs = measure(
                        trainee.model, trainee.batch, trainee.optimizer, stock=method == "stock"
                    )
                methods[method] = {**costs, "seconds_per_step": None, "environment": environment()}
                del trainee
                gc.collect()  # models have cycles
                keep()
        timed = [m for m in options.methods if methods[m]["seconds_per_step"] is None]
        if options.repeats and timed and not options.shapes:
            trainees = {method: new(method) for method in options.methods}
            losses = {method: trainee.loss for method, trainee in trainees.items()}
            optimizers = {method: trainee.optimizer for method, trainee in trainees.items()}
            for method, seconds in step_seconds(losses, options.repeats, optimizers).items():
                methods[method]["seconds_per_step"] = seconds.step
                for part in ("forward", "backward", "optimizer"):
                    methods[method][f"{part}_seconds"] = getattr(seconds, part)
            del trainees, losses, optimizers
            gc.collect()
            keep()
        print(table(name, methods), flush=True)
    for key in PUBLISHED:
        print(average(report["setups"], key))
    if options.plot:
        plot(options.plot, report["setups"])
    return report


def _going_on(file: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The report that ``file`` holds, or a new one, of steps with these ``settings``."""
    report = kept(file, "setups") or {**settings, "setups": {}}
    found = {key: report.get(key) for key in settings}
    if found != settings:
        sys.exit(f"{file} holds results of {found}, not {settings}: name another file with --json")
    return {"environment": environment(), **settings, "setups": report["setups"]}


if __name__ == "__main__":
    main()
