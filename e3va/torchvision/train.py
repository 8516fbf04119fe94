"""Train a torchvision Mask R-CNN over an E³VA backbone: ``python -m e3va.torchvision.train -h``."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import MaskRCNN
from tqdm import tqdm

from e3va.config import MIXING
from e3va.data.coco import CocoInstances, Target, flip
from e3va.files import atomic_path
from e3va.highway import HighwayStage
from e3va.measure import trainable_parameters
from e3va.methods import METHODS, build_backbone, options_of
from e3va.ops.taps import DEFAULT_TAPS, TAPPED, TAPS
from e3va.optim import Rates, parameter_groups
from e3va.precision import PRECISIONS, quantize_trunk
from e3va.seeding import reseed, seed_of
from e3va.torchvision.checkpoint import load_checkpoint, save_checkpoint
from e3va.torchvision.evaluation import evaluate
from e3va.torchvision.model import mask_rcnn
from e3va.trunks import trunk_config
from e3va.weights import load_trunk

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
HISTORY = "history.jsonl"


def train(
    model: MaskRCNN,
    train_data: CocoInstances,
    val_data: CocoInstances,
    output_dir: str | os.PathLike[str],
    *,
    iterations: int,
    batch_size: int,
    lr: float,
    highway_lr_factor: float = 1.0,
    highway_lr_ratio: float = 1.0,
    weight_decay: float = 0.05,
    warmup: int = 0,
    clip_norm: float = 1.0,
    horizontal_flip: bool = True,
    amp_dtype: torch.dtype | None = None,
    eval_period: int | None = None,
    checkpoint_period: int = 500,
    resume: bool = False,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Train with AdamW: linear warm-up, cosine decay to zero, clipped gradients.

    Every ``checkpoint_period`` iterations, and before and after each evaluation, ``checkpoint.pt``
    is written to ``output_dir``; ``history.jsonl`` there gets a line for each iteration
    (``iteration``, ``loss``, ``lr``, ``seconds``) and each evaluation (``iteration``, ``box_ap``,
    …). A checkpoint of an earlier run is kept as ``checkpoint.previous.pt``. Everything
    random in an iteration follows from the seed and its number, so that a resumed run repeats the
    uninterrupted one, to the last bit on a CPU.

    Args:
        model: the detector; moved to ``device``, left in training mode.
        train_data: what to train on. val_data: what to evaluate on; of the same classes.
        output_dir: where to write.
        iterations: optimizer steps in all. batch_size: images of each.
        lr: the highest learning rate; the highway's is ``highway_lr_factor`` times as high, and
            that of its V and c ``highway_lr_ratio`` times that (e3va.optim.parameter_groups).
        weight_decay: AdamW's, for weights alone.
        warmup: iterations until the learning rate is reached.
        clip_norm: the most that the norm of all gradients together may be.
        horizontal_flip: mirror half of the training images.
        amp_dtype: autocast to float16 (with loss scaling) or bfloat16; default: no autocast.
        eval_period: evaluate every so many iterations, and at the end; default: only there.
        checkpoint_period: iterations between checkpoints.
        resume: go on from ``output_dir``'s checkpoint if it has one; the settings must be alike.
        seed: of sampling, augmentation and the model's own randomness.
        workers: processes that load images; 0: load in this one.
        device: default: "cuda" where there is one, else "cpu".

    Returns:
        The last evaluation's metrics, ``trainable_params``, ``seconds_per_iter`` (median) and
        ``peak_bytes`` (GPU memory allocated in training; on a CPU, of the process, resident).

    Raises:
        ValueError: a setting is out of range, the data sets differ in their classes or are empty
            (that to evaluate on: without an instance to find),
            or the checkpoint is of another run.
        FloatingPointError: the loss is no longer finite.
    """
    _check_settings(iterations, batch_size, lr, warmup, eval_period, checkpoint_period)
    _check_data(train_data, val_data)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output = Path(output_dir)
    settings = {
        "iterations": iterations,
        "batch_size": batch_size,
        "lr": lr,
        "highway_lr_factor": highway_lr_factor,
        "highway_lr_ratio": highway_lr_ratio,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "clip_norm": clip_norm,
        "horizontal_flip": horizontal_flip,
        "amp_dtype": str(amp_dtype),
        "seed": seed,
        "images": len(train_data),
        "classes": train_data.classes,
        "storage": [m.storage for m in model.modules() if isinstance(m, HighwayStage)],
        "min_size": list(model.transform.min_size),
        "max_size": model.transform.max_size,
        "rois": model.roi_heads.fg_bg_sampler.batch_size_per_image,
    }

    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = parameter_groups(
        model,
        Rates(
            lr,
            weight_decay,
            highway_lr_factor=highway_lr_factor,
            highway_lr_ratio=highway_lr_ratio,
        ),
    )
    optimizer = torch.optim.AdamW(groups, lr=lr)
    highest = [group["lr"] for group in groups]
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    start, metrics, evaluated = 0, {}, 0
    if resume and (output / CHECKPOINT).is_file():
        state = load_checkpoint(output / CHECKPOINT, model)
        _check_same(settings, state["settings"], output / CHECKPOINT)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start, metrics, evaluated = state["iteration"], state["metrics"], state["evaluated"]
        logger.info("resuming from iteration %d of %s", start, output / CHECKPOINT)
    elif (output / CHECKPOINT).is_file():
        (output / CHECKPOINT).replace(output / PREVIOUS)
        logger.warning("an earlier run's checkpoint is now %s", output / PREVIOUS)
    history = _History(output / HISTORY, start)

    batches = DataLoader(
        _Batches(train_data, batch_size, horizontal_flip, seed),
        batch_size=None,
        sampler=range(start, iterations),
        num_workers=workers,
        generator=torch.Generator(),
    )

    def save(iteration: int) -> None:
        save_checkpoint(
            output / CHECKPOINT,
            model,
            iteration=iteration,
            metrics=metrics,
            evaluated=evaluated,
            settings=settings,
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
        )

    def score(iteration: int) -> None:
        nonlocal metrics, evaluated
        save(iteration)  # what was trained outlives a failed evaluation
        metrics = evaluate(model, val_data, device, amp_dtype=amp_dtype)
        evaluated = iteration
        history.add(iteration=iteration, **metrics)
        save(iteration)

    peak = 0
    _reset_peak_bytes(device)
    with tqdm(batches, initial=start, total=iterations, unit="it") as progress:
        for iteration, batch in enumerate(progress, start=start):
            began = time.perf_counter()
            reseed(seed, 1, iteration)
            factor = schedule(iteration, iterations, warmup)
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * factor
            images = [image.to(device) for image, _ in batch]
            targets = [{k: v.to(device) for k, v in target.items()} for _, target in batch]
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                loss = sum(model(images, targets).values())
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at iteration {iteration + 1}: lower lr ({lr}), "
                    f"lengthen warmup ({warmup}), or do without float16"
                )
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_norm)
            scaler.step(optimizer)
            scaler.update()
            peak = max(peak, peak_bytes(device))
            done = iteration + 1
            history.add(
                iteration=done,
                loss=loss.item(),
                lr=lr * factor,
                seconds=time.perf_counter() - began,
            )
            if eval_period and done % eval_period == 0:
                score(done)
                _reset_peak_bytes(device)
            elif done % checkpoint_period == 0:
                save(done)
            progress.set_postfix(
                loss=f"{loss.item():.3f}",
                mask_ap=f"{metrics['mask_ap']:.1f}" if metrics else "–",
                memory=f"{peak / 2**20:.0f} MiB",
            )
    if evaluated < iterations:
        score(iterations)
    return {
        **metrics,
        "trainable_params": trainable_parameters(model),
        "seconds_per_iter": statistics.median(history.seconds or [math.nan]),
        "peak_bytes": peak,
    }


def schedule(iteration: int, iterations: int, warmup: int) -> float:
    """The learning rate of an iteration (from 0) over the highest: linear warm-up, cosine decay."""
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / (iterations - warmup)))


def peak_bytes(device: torch.device) -> int:
    """The most GPU memory allocated since the last reset; on a CPU, resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak_bytes(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class _Batches(Dataset[list[tuple[Tensor, Target]]]):
    """Batch i of a run: a function of the seed and i alone, so that resuming needs no state."""

    def __init__(
        self, data: CocoInstances, batch_size: int, horizontal_flip: bool, seed: int
    ) -> None:
        self._data = data
        self._batch_size = batch_size
        self._flip = horizontal_flip
        self._seed = seed

    def __getitem__(self, iteration: int) -> list[tuple[Tensor, Target]]:
        random = torch.Generator().manual_seed(seed_of(self._seed, 0, iteration))
        batch = []
        for position in range(iteration * self._batch_size, (iteration + 1) * self._batch_size):
            epoch, i = divmod(position, len(self._data))
            image, target = self._data[int(self._order(epoch)[i])]
            if self._flip and torch.rand((), generator=random) < 0.5:
                image, target = flip(image, target)
            batch.append((image, target))
        return batch

    def _order(self, epoch: int) -> Tensor:
        random = torch.Generator().manual_seed(seed_of(self._seed, 2, epoch))
        return torch.randperm(len(self._data), generator=random)


class _History:
    """The lines of ``history.jsonl``, without those of an earlier run beyond ``start``."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if start and path.is_file() else []
        kept = [entry for entry in map(_entry, lines) if entry and entry["iteration"] <= start]
        self.seconds = [entry["seconds"] for entry in kept if "seconds" in entry]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def add(self, **entry: float) -> None:
        if "seconds" in entry:
            self.seconds.append(entry["seconds"])
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _entry(line: str) -> dict[str, float] | None:
    """A line of the history; None if its writing was interrupted."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _check_settings(
    iterations: int,
    batch_size: int,
    lr: float,
    warmup: int,
    eval_period: int | None,
    checkpoint_period: int,
) -> None:
    if iterations < 1 or batch_size < 1:
        raise ValueError(
            f"iterations and batch_size must be at least 1, got {iterations} and {batch_size}"
        )
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if not 0 <= warmup < iterations:
        raise ValueError(f"warmup must be in [0, iterations = {iterations}), got {warmup}")
    if eval_period is not None and eval_period < 1:
        raise ValueError(f"eval_period must be at least 1, or None, got {eval_period}")
    if checkpoint_period < 1:
        raise ValueError(f"checkpoint_period must be at least 1, got {checkpoint_period}")


def _check_data(train_data: CocoInstances, val_data: CocoInstances) -> None:
    if not len(train_data):
        raise ValueError(f"{train_data.path} has no image to train on")
    if train_data.classes != val_data.classes:
        raise ValueError(
            f"{train_data.path} and {val_data.path} have different classes: "
            f"{train_data.classes} and {val_data.classes}"
        )
    if not val_data.instances:
        raise ValueError(f"{val_data.path} has no instance to find: nothing can be evaluated on it")


def _check_same(settings: dict[str, Any], saved: dict[str, Any], path: Path) -> None:
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} is of a run with {name} {saved.get(name)}, not {value}: resume with the "
                "same settings, or start anew in another folder"
            )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m e3va.torchvision.train",
        description="Train torchvision's Mask R-CNN over a Swin on COCO JSON annotations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    for split in ("train", "val"):
        data.add_argument(f"--{split}-json", type=Path, required=True, help="COCO annotations")
        data.add_argument(f"--{split}-images", type=Path, required=True, help="folder of images")
    data.add_argument("--keep-empty", action="store_true", help="train on empty images too")
    data.add_argument("--workers", type=int, default=0, help="processes that load images")
    net = parser.add_argument_group("model")
    net.add_argument("--method", choices=METHODS, default="e3va", help="what is trained")
    net.add_argument("--variant", default="swin_b", help="swin_t, swin_s, swin_b, swin_l, …")
    net.add_argument("--window-size", type=int, default=7, help="of the trunk")
    net.add_argument("--kernel-dim", type=int, default=8, help="the adapters' rank is twice that")
    net.add_argument("--taps", choices=TAPS, default=DEFAULT_TAPS, help="as kept for backward")
    net.add_argument("--hidden-ratio", type=float, default=0.5, help="of their hidden width to C")
    net.add_argument(
        "--tap", choices=TAPPED, default="norm", help="what method e3va's adapters read"
    )
    net.add_argument("--mixing", type=int, choices=MIXING, default=3, help="side of their kernels")
    net.add_argument("--no-state", action="store_true", help="they do not hear those before them")
    net.add_argument("--weights", type=Path, required=True, help="the trunk's: file or timm:NAME")
    net.add_argument("--trunk-precision", choices=PRECISIONS, help="quantise the frozen trunk")
    net.add_argument("--min-size", type=int, nargs="+", default=[800], help="shorter image side")
    net.add_argument("--max-size", type=int, default=1333, help="limit of the longer side")
    net.add_argument("--anchor-sizes", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    net.add_argument("--out-channels", type=int, default=256, help="channels of the FPN")
    net.add_argument("--representation-size", type=int, default=1024, help="box head's width")
    net.add_argument("--mask-channels", type=int, nargs="+", default=[256] * 4)
    net.add_argument("--rois", type=int, default=512, help="that the heads train on, per image")
    run = parser.add_argument_group("training")
    run.add_argument("--output", type=Path, required=True, help="folder to write to")
    run.add_argument("--iterations", type=int, required=True)
    run.add_argument("--batch-size", type=int, default=2)
    run.add_argument("--lr", type=float, default=1e-4)
    run.add_argument("--highway-lr-factor", type=float, default=1.0, help="of the highway's rate")
    run.add_argument("--highway-lr-ratio", type=float, default=1.0, help="of its V's and c's to it")
    run.add_argument("--weight-decay", type=float, default=0.05)
    run.add_argument("--warmup", type=int, default=0, help="iterations of linear warm-up")
    run.add_argument("--eval-period", type=int, help="default: only at the end")
    run.add_argument("--checkpoint-period", type=int, default=500)
    run.add_argument("--no-flip", action="store_true", help="do not mirror training images")
    run.add_argument("--amp", choices=("bfloat16", "float16"), help="autocast to this dtype")
    run.add_argument("--device", help="default: cuda where there is one, else cpu")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--resume", action="store_true", help="go on from the output's checkpoint")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    args = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    train_data = CocoInstances(args.train_json, args.train_images, keep_empty=args.keep_empty)
    val_data = CocoInstances(args.val_json, args.val_images)
    torch.manual_seed(args.seed)
    given = {
        "kernel_dim": args.kernel_dim,
        "hidden_ratio": args.hidden_ratio,
        "tap": args.tap,
        "mixing": args.mixing,
        "state": not args.no_state,
        "storage": args.taps,
    }
    options = {name: given[name] for name in options_of(args.method) if name in given}
    backbone = build_backbone(
        args.method, trunk_config(args.variant, window_size=args.window_size), **options
    )
    load_trunk(backbone.trunk, args.weights)
    if args.trunk_precision:
        backbone.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        quantize_trunk(backbone.trunk, args.trunk_precision)
    model = mask_rcnn(
        backbone,
        len(train_data.classes) + 1,
        out_channels=args.out_channels,
        min_size=args.min_size,
        max_size=args.max_size,
        anchor_sizes=args.anchor_sizes,
        representation_size=args.representation_size,
        mask_channels=args.mask_channels,
        box_batch_size_per_image=args.rois,
    )
    result = train(
        model,
        train_data,
        val_data,
        args.output,
        iterations=args.iterations,
        batch_size=args.batch_size,
        lr=args.lr,
        highway_lr_factor=args.highway_lr_factor,
        highway_lr_ratio=args.highway_lr_ratio,
        weight_decay=args.weight_decay,
        warmup=args.warmup,
        horizontal_flip=not args.no_flip,
        amp_dtype=getattr(torch, args.amp) if args.amp else None,
        eval_period=args.eval_period,
        checkpoint_period=args.checkpoint_period,
        resume=args.resume,
        seed=args.seed,
        workers=args.workers,
        device=args.device,
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
