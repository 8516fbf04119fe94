"""The training loop of torchvision's detectors."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import MaskRCNN

from e3va.backbone import Backbone
from e3va.budget import advice
from e3va.budget.probe import probe
from e3va.data.coco import CocoInstances, Target, flip
from e3va.measure import trainable_parameters
from e3va.runs.folder import CONFIG, METRICS, History, check_settings, rank
from e3va.runs.interrupt import held_back, ignore_interrupts
from e3va.runs.progress import Bar, peak_bytes, reset_peak_bytes
from e3va.seeding import reseed, seed_of
from e3va.torchvision.budget import Setup
from e3va.torchvision.checkpoint import load_checkpoint, save_checkpoint
from e3va.torchvision.config import ModelConfig, TrainConfig, fixed_settings
from e3va.torchvision.evaluation import evaluate
from e3va.torchvision.run import CHECKPOINT, Run
from e3va.torchvision.step import (
    batch_loss,
    build_optimizer,
    clipped_step,
    load_optimizer,
    on_device,
)

logger = logging.getLogger(__name__)

FINAL = "model_final.pt"
BEST = "model_best.pt"

# What is drawn of a seed, see e3va.seeding.
_AUGMENTATION, _MODEL, _ORDER = range(3)


def train(
    model: nn.Module,
    train_data: CocoInstances,
    val_data: CocoInstances | None,
    output_dir: str | os.PathLike[str],
    config: TrainConfig,
    *,
    resume: bool = False,
) -> dict[str, float]:
    """Train by the config's optimizer: linear warm-up, cosine decay to zero, clipped gradients.

    ``config.yaml`` is written to ``output_dir`` at first: the settings, the classes' names and
    where the data are. Every ``checkpoint_period`` iterations, before and after each evaluation,
    and when Ctrl-C stops the training, after the iteration at hand, ``checkpoint.pt`` is;
    ``metrics.json`` gets a line for each iteration
    (``iteration``, ``loss``, ``lr``, ``seconds``) and each evaluation (``iteration``, ``box_ap``,
    …). ``model_best.pt`` is the best model (by AP of masks, else of boxes), ``model_final.pt`` the
    last one. Those of an earlier run are kept as ``config.previous.yaml`` and
    ``checkpoint.previous.pt``.

    Everything random in an iteration follows from the seed and its number, so that a resumed run
    repeats the uninterrupted one, to the last bit on a CPU. It may be resumed with more iterations
    than before: the learning rate then follows the longer schedule from there on, so that it jumps
    up, and the run is not the one that had been as long from the beginning.

    Args:
        model: one of torchvision's detectors; moved to the device, left in training mode.
        train_data: what to train on, with masks for a Mask R-CNN.
        val_data: what to evaluate on every ``eval_period`` iterations and at the end, of the same
            classes, with masks if they are to be scored; None: nothing is evaluated.
        output_dir: where to write.
        config: the settings.
        resume: go on from ``output_dir``'s checkpoint if it has one.

    Returns:
        The last evaluation's metrics, ``trainable_params``, ``seconds_per_iter`` (median) and
        ``peak_bytes`` (GPU memory allocated in training; on a CPU, of the process, resident).

    Raises:
        ValueError: the data sets differ in their classes, lack masks, or are empty (that to
            evaluate on: without an instance to find), or the checkpoint is of another run.
        FloatingPointError: the loss is no longer finite.
        ImportError: the optimizer needs a package that is missing.
    """
    _check_data(model, train_data, val_data)
    device, output = config.resolved_device(), Path(output_dir)
    settings = _settings(config, model, train_data)

    model.to(device).train()
    optimizer = build_optimizer(config, model)
    highest = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp_dtype == torch.float16)
    start, metrics, evaluated = 0, {}, 0
    if resume and (output / CHECKPOINT).is_file():
        state = load_checkpoint(output / CHECKPOINT, model)
        # A setting that a checkpoint does not know yet was as it is by default.
        model_defaults = ModelConfig(weights="") if config.model else None
        defaults = TrainConfig(iterations=1, model=model_defaults)
        before = fixed_settings(defaults) | state["settings"]
        check_settings(settings, before, output / CHECKPOINT)
        load_optimizer(optimizer, state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start, metrics, evaluated = state["iteration"], state["metrics"], state["evaluated"]
        logger.info("resuming from iteration %d of %s", start, output / CHECKPOINT)
        _check_schedule(config, start, state["iterations"])
    elif (output / CHECKPOINT).is_file():
        for name in (CHECKPOINT, CONFIG):
            if (output / name).is_file():
                (output / name).replace(_previous(output / name))
        logger.warning("an earlier run's checkpoint is now %s", _previous(output / CHECKPOINT))
    Run.of(config, train_data, val_data).write(output)
    history = History(output / METRICS, start)

    batches = DataLoader(
        _Batches(train_data, config.batch_size, config.horizontal_flip, config.seed),
        batch_size=None,
        sampler=range(start, config.iterations),
        num_workers=config.workers,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),
    )

    def save(iteration: int) -> None:
        save_checkpoint(
            output / CHECKPOINT,
            model,
            iteration=iteration,
            iterations=config.iterations,
            metrics=metrics,
            evaluated=evaluated,
            settings=settings,
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
        )

    def score(iteration: int) -> None:
        nonlocal metrics, evaluated
        save(iteration)  # what was trained outlives a failed evaluation
        if val_data is not None:
            found = evaluate(model, val_data, device, amp_dtype=config.amp_dtype)
            with held_back():
                metrics, evaluated = found, iteration
                if rank(metrics) > history.best():
                    save_checkpoint(output / BEST, model, iteration=iteration, metrics=metrics)
                history.add(iteration=iteration, **metrics)
                save(iteration)

    def is_due(iteration: int) -> bool:
        return config.eval_period is not None and iteration % config.eval_period == 0

    if is_due(start) and evaluated < start < config.iterations:
        score(start)  # it was interrupted
    if device.type == "cuda":
        try_largest(model, train_data, config, optimizer)
    peak, done = 0, start
    reset_peak_bytes(device)

    def step(iteration: int, batch: list[tuple[Tensor, Target]]) -> None:
        nonlocal peak
        began = time.perf_counter()
        reseed(config.seed, _MODEL, iteration)
        factor = schedule(iteration, config.iterations, config.warmup)
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * factor
        total = batch_loss(model, *on_device(batch, device), config.amp_dtype)
        loss = total.item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at iteration {iteration + 1}: lower lr ({config.lr}), "
                f"lengthen warmup ({config.warmup}), or do without float16"
            )
        clipped_step(total, optimizer, scaler, config.clip_norm)
        peak, lr = max(peak, peak_bytes(device)), config.lr * factor
        seconds = time.perf_counter() - began
        history.add(iteration=iteration + 1, loss=loss, lr=lr, seconds=seconds)
        bar.step(loss, lr, metrics, peak)

    optimizer.zero_grad()  # a model may come with gradients
    bar = Bar(start, config.iterations)
    try:
        for iteration, batch in enumerate(batches, start=start):
            with held_back():
                step(iteration, batch)
                done = iteration + 1
            if is_due(done):
                score(done)
                reset_peak_bytes(device)
            elif done % config.checkpoint_period == 0:
                save(done)
        if evaluated < done:
            score(done)
    except KeyboardInterrupt:
        save(done)
        raise
    finally:
        bar.close()
    save_checkpoint(output / FINAL, model, iteration=config.iterations, metrics=metrics)
    return {
        **metrics,
        "trainable_params": trainable_parameters(model),
        "seconds_per_iter": statistics.median(
            [entry["seconds"] for entry in history.entries if "seconds" in entry] or [math.nan]
        ),
        "peak_bytes": peak,
    }


def try_largest(
    model: Any, data: CocoInstances, config: TrainConfig, optimizer: torch.optim.Optimizer
) -> None:
    """Take the largest step of ``data`` once, see :func:`e3va.budget.probe.probe`: of the images
    with the most pixels and the most instances, at the largest of the sizes that are drawn.

    Raises:
        torch.OutOfMemoryError: it does not fit; says what to do.
    """
    device, transform = next(model.parameters()).device, model.transform
    side = max(transform.min_size)
    samples = [data[i] for i in data.largest(side, transform.max_size)]
    batch = [samples[i % len(samples)] for i in range(config.batch_size)]
    images, targets = on_device(batch, device)
    sizes, transform.min_size = transform.min_size, (side,)
    try:
        probe(model, lambda: batch_loss(model, images, targets, config.amp_dtype), optimizer)
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split())
        what = "lower batch_size or min_size, train by the method e3va, or in amp"
        if config.model:
            what = advice(*Setup.of_data(config, data), device)
        raise torch.OutOfMemoryError(
            f"a step of {config.batch_size} of the largest images does not fit in the memory "
            f"({reason}): {what}"
        ) from None
    finally:
        transform.min_size = sizes


def schedule(iteration: int, iterations: int, warmup: int) -> float:
    """The learning rate of an iteration (from 0) over the highest: linear warm-up, cosine decay."""
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / (iterations - warmup)))


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
        random = torch.Generator().manual_seed(seed_of(self._seed, _AUGMENTATION, iteration))
        batch = []
        for position in range(iteration * self._batch_size, (iteration + 1) * self._batch_size):
            epoch, i = divmod(position, len(self._data))
            image, target = self._data[int(self._order(epoch)[i])]
            if self._flip and torch.rand((), generator=random) < 0.5:
                image, target = flip(image, target)
            batch.append((image, target))
        return batch

    def _order(self, epoch: int) -> Tensor:
        random = torch.Generator().manual_seed(seed_of(self._seed, _ORDER, epoch))
        return torch.randperm(len(self._data), generator=random)


def _previous(path: Path) -> Path:
    """Where a file of an earlier run is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _check_data(
    model: nn.Module, train_data: CocoInstances, val_data: CocoInstances | None
) -> None:
    if not len(train_data):
        raise ValueError(f"{train_data.path} has no image to train on")
    masks = isinstance(model, MaskRCNN)
    if masks and not train_data.masks:
        raise ValueError(f"{train_data.path} was read without masks: a Mask R-CNN needs them")
    if val_data is None:
        logger.info("no validation data: nothing is evaluated")
        return
    if val_data.masks and not masks:
        raise ValueError(
            f"{val_data.path} was read with masks, but the detector predicts none: "
            "read it with masks=False"
        )
    if train_data.classes != val_data.classes:
        raise ValueError(
            f"{train_data.path} and {val_data.path} have different classes: "
            f"{train_data.classes} and {val_data.classes}"
        )
    if not val_data.instances:
        raise ValueError(f"{val_data.path} has no instance to find: nothing can be evaluated on it")


def _settings(config: TrainConfig, model: nn.Module, data: CocoInstances) -> dict[str, Any]:
    """All that a resumed run must share with the checkpoint's, as JSON can hold it: the config's
    and, as the model may be built otherwise, what of it shows in no weight."""
    transform: Any = model.transform
    methods = [m.method for m in model.modules() if isinstance(m, Backbone) and m.method]
    settings = {
        **fixed_settings(config),
        "model": type(model).__name__,
        "method": [method.name for method in methods],
        "options": [dataclasses.asdict(method) for method in methods],
        "min_size": transform.min_size,
        "max_size": transform.max_size,
        "images": len(data),
        "classes": data.classes,
    }
    return json.loads(json.dumps(settings))


def _check_schedule(config: TrainConfig, start: int, before: int) -> None:
    """A run may become longer, but not shorter."""
    if config.iterations < before:
        raise ValueError(
            f"the run is {before} iterations long, not {config.iterations}: it can become longer, "
            "not shorter"
        )
    if config.iterations > before:
        was, now = (
            config.lr * schedule(start, length, config.warmup)
            for length in (before, config.iterations)
        )
        logger.warning(
            "the run is now %d iterations long instead of %d: the learning rate goes on at %.3g "
            "instead of %.3g and decays to zero at the new end",
            config.iterations,
            before,
            now,
            was,
        )
