"""A step of the training of torchvision's detectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from e3va.data.coco import Target
from e3va.optim import Rates, adamw8bit, parameter_groups
from e3va.torchvision.config import TrainConfig


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``config`` describes, over the parameters that require a gradient.

    Raises:
        ImportError: it needs a package that is missing.
    """
    rates = Rates(
        config.lr,
        config.weight_decay,
        highway_lr_factor=config.highway_lr_factor,
        highway_lr_ratio=config.highway_lr_ratio,
    )
    groups = parameter_groups(model, rates)
    if config.optimizer == "adamw8bit":
        kind: Any = adamw8bit()
        return kind(groups, lr=config.lr)
    # Fused it makes nothing of a weight's size.
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from the ``state`` of an optimizer of the same parameters; one of before, when AdamW
    was not fused, included."""
    for group in state["param_groups"]:
        if "fused" in group:  # torch's, and not bitsandbytes'
            group["fused"] = True
    optimizer.load_state_dict(state)


def clipped_step(
    loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float
) -> None:
    """The backward of ``loss`` and the optimizer's step, by gradients whose norm is ``clip_norm``
    at the most. Leaves none."""
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(trained, clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def on_device(
    batch: Sequence[tuple[Tensor, Target]], device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    """The images and the targets of a batch."""
    images = [image.to(device) for image, _ in batch]
    return images, [{k: v.to(device) for k, v in target.items()} for _, target in batch]


def batch_loss(
    model: Any, images: list[Tensor], targets: list[Target], amp_dtype: torch.dtype | None
) -> Tensor:
    """The sum of the losses of a model in training, in autocast to a dtype if there is one."""
    with torch.autocast(images[0].device.type, amp_dtype, enabled=amp_dtype is not None):
        return sum(model(images, targets).values())
