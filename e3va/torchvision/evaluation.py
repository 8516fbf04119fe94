"""COCO's average precision of a torchvision detector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from e3va.data.coco import CocoInstances, average_precision


def evaluate(
    model: nn.Module,
    data: CocoInstances,
    device: torch.device | str,
    *,
    amp_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Find the instances in every image of ``data`` and score them; arguments as :func:`detect`.

    Returns:
        ``box_ap``, ``box_ap50`` and, where ``data`` has masks, ``mask_ap``, ``mask_ap50``, on the
        scale 0–100.

    Raises:
        ValueError: ``data`` has masks, and the detector predicts none; or has nothing to find.
    """
    return average_precision(data, detect(model, data, device, amp_dtype=amp_dtype))


@torch.no_grad()
def detect(
    model: nn.Module,
    data: CocoInstances,
    device: torch.device | str,
    *,
    amp_dtype: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """Find the instances in every image of ``data``.

    The model is left in the mode, training or evaluation, that it was in.

    Args:
        model: the detector, on ``device``.
        data: the images.
        device: where to compute.
        amp_dtype: autocast to this dtype (default: no autocast).

    Returns:
        Detections in COCO's result format, as JSON can hold them; with masks where ``data`` has
        them.

    Raises:
        ValueError: ``data`` has masks, and the detector predicts none.
    """
    device = torch.device(device)
    results = []
    with _eval_mode(model):
        for index in range(len(data)):
            image = data.image(index).to(device)
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                found = model([image])[0]
            if "masks" in found:
                found["masks"] = found["masks"][:, 0] > 0.5
            results += data.results(index, **found)
    return results


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
