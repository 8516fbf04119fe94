"""The demo's training on Detectron2 and on torchvision, behind one small interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from e3va.methods import options_of
from e3va.runs.folder import METRICS, read_metrics

WEIGHTS = Path(__file__).parent / "swin_digits.safetensors"
BATCH_SIZE = 4
LEARNING_RATE = 1e-3
HIGHWAY_LR_FACTOR = 3
HIGHWAY_LR_RATIO = 10
HIGHWAY: dict[str, Any] = {"kernel_dim": 16, "hidden_ratio": 1.0}
"""Wider than the paper's, for a trunk much narrower."""


@dataclass
class Trained:
    """What a training leaves behind, whichever engine ran it.

    Attributes:
        model: the detector, in training mode.
        backbone: its bottom-up part.
        images: a training batch, normalised and padded, [B, 3, H, W].
        loss: the loss of that same batch.
        metrics: "box_ap", "mask_ap", "mask_ap50" on the validation scenes, 0 to 100.
        detections: the validation detections, as COCO results.
        losses: (iteration, loss) along the training.
    """

    model: nn.Module
    backbone: nn.Module
    images: Tensor
    loss: Callable[[], Tensor]
    metrics: dict[str, float]
    detections: list[dict[str, Any]]
    losses: list[tuple[int, float]]


def train_detectron2(
    method: str,
    coco: Path,
    output: Path,
    iterations: int,
    seed: int,
    overrides: Sequence[Any] = (),
) -> Trained:
    """Mask R-CNN by Detectron2, from detectron2_configs/digits/mask_rcnn_e3va.yaml.

    Args:
        method: "full", "frozen" or "e3va".
        coco: COCO tree of the digits.
        output: folder for logs, checkpoints and detections.
        overrides: of the config, KEY, VALUE, ….
    """
    from detectron2.engine import HookBase
    from detectron2.utils.env import seed_all_rng

    from e3va.detectron2 import Trainer, load_config, register_coco_json
    from e3va.detectron2.config import CONFIGS

    config = CONFIGS / "digits/mask_rcnn_e3va.yaml"
    overrides = [*overrides, "MODEL.TUNING.METHOD", method, "OUTPUT_DIR", str(output)]
    overrides += ["SOLVER.MAX_ITER", iterations, "SOLVER.IMS_PER_BATCH", BATCH_SIZE]
    overrides += ["SOLVER.BASE_LR", LEARNING_RATE, "SEED", seed]
    overrides += ["SOLVER.HIGHWAY_LR_FACTOR", float(HIGHWAY_LR_FACTOR)]
    overrides += ["SOLVER.HIGHWAY_LR_RATIO", float(HIGHWAY_LR_RATIO)]
    overrides += ["SOLVER.CHECKPOINT_PERIOD", 10 * iterations]
    cfg = load_config(str(config), [*overrides, *coco_overrides(coco)])
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    register_coco_json(cfg)
    seed_all_rng(seed)
    output.mkdir(parents=True, exist_ok=True)
    losses: list[tuple[int, float]] = []

    class Progress(HookBase):
        def before_train(self) -> None:
            self.bar = tqdm(total=iterations, desc=method, unit="it")

        def after_step(self) -> None:
            loss = self.trainer.storage.history("total_loss").latest()
            losses.append((self.trainer.iter, loss))
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self.bar.update()
            if self.trainer.iter + 1 == iterations:  # before the evaluation that ends the training
                self.bar.close()

    trainer = Trainer(cfg)
    trainer.register_hooks([Progress()])
    results = trainer.train()
    model = trainer.model
    batch = next(iter(trainer.build_train_loader(cfg)))
    return Trained(
        model=model.train(),
        backbone=model.backbone.bottom_up,
        images=model.preprocess_image(batch).tensor,
        loss=partial(detectron2_loss, model, batch),
        metrics={
            "box_ap": results["bbox"]["AP"],
            "mask_ap": results["segm"]["AP"],
            "mask_ap50": results["segm"]["AP50"],
        },
        detections=json.loads((output / "inference/coco_instances_results.json").read_text()),
        losses=losses,
    )


def coco_overrides(coco: Path, test: str = "val") -> list[str]:
    """Of a config, for the COCO tree of the digits, tested on a split: KEY, VALUE, …."""
    overrides = []
    for split, name in (("TRAIN", "train"), ("TEST", test)):
        key = f"DATASETS.COCO_JSON.{split}"
        overrides += [f"{key}_JSON", str(coco / f"annotations/instances_{name}.json")]
        overrides += [f"{key}_IMAGES", str(coco / f"images/{name}")]
    return overrides


def detectron2_loss(model: Any, batch: list[dict[str, Any]]) -> Tensor:
    """The sum of the losses of a Detectron2 model in training."""
    from detectron2.utils.events import EventStorage

    with EventStorage():
        return sum(model(batch).values(), torch.zeros((), device=model.device))


def train_torchvision(method: str, coco: Path, output: Path, iterations: int, seed: int) -> Trained:
    """As :func:`train_detectron2`, by torchvision, with heads of the same widths."""
    from e3va.data.coco import CocoInstances
    from e3va.torchvision import ModelConfig, TrainConfig, build_model, detect
    from e3va.torchvision.engine import SMALL_HEADS
    from e3va.torchvision.step import batch_loss, on_device
    from e3va.torchvision.train import train

    train_data, val_data = (
        CocoInstances(coco / f"annotations/instances_{split}.json", coco / f"images/{split}")
        for split in ("train", "val")
    )
    built = ModelConfig(
        weights=str(WEIGHTS),
        variant="swin_digits",
        method=method,
        options={name: HIGHWAY[name] for name in options_of(method) if name in HIGHWAY},
        out_channels=64,
        min_size=(train_data.image(0).shape[-2],),
        anchor_sizes=(8, 16, 32, 64, 128),
        detector_options={**SMALL_HEADS, "mask_channels": (64, 64)},
    )
    config = TrainConfig(
        iterations=iterations,
        batch_size=BATCH_SIZE,
        lr=LEARNING_RATE,
        highway_lr_factor=HIGHWAY_LR_FACTOR,
        highway_lr_ratio=HIGHWAY_LR_RATIO,
        warmup=min(30, iterations // 2),
        horizontal_flip=False,
        seed=seed,
        model=built,
    )
    device = config.resolved_device()
    torch.manual_seed(seed)
    model: Any = build_model(built, len(train_data.classes) + 1, device)
    metrics = train(model, train_data, val_data, output, config)
    images, targets = on_device([train_data[i] for i in range(BATCH_SIZE)], device)
    history = read_metrics(output / METRICS)
    return Trained(
        model=model,
        backbone=model.backbone.body,
        images=model.transform(images)[0].tensors,
        loss=lambda: batch_loss(model, images, targets, None),
        metrics={key: metrics[key] for key in ("box_ap", "mask_ap", "mask_ap50")},
        detections=detect(model, val_data, device),
        losses=[(line["iteration"], line["loss"]) for line in history if "loss" in line],
    )
