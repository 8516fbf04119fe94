"""What the optimizer is given: which parameters decay, and which learn faster."""

from __future__ import annotations

from typing import Any

from torch import nn

from e3va.highway import NO_DECAY, OUTPUTS, PARAMETERS, HighwayStage

# Some of them have more than one dimension: those of the stacked adapters, and Swin's tables.
NO_DECAY_NAMES = frozenset({*NO_DECAY, "relative_position_bias_table"})


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    highway_lr_factor: float = 1.0,
    highway_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """The trainable parameters as groups for a torch optimizer.

    Weights decay; norms, biases and position-bias tables do not. The highway learns
    ``highway_lr_factor`` times as fast as the rest, and its V and c, which begin at zero,
    ``highway_lr_ratio`` times as fast as that, as LoRA's B should (LoRA+, arXiv 2402.12354).

    Raises:
        ValueError: the model has no trainable parameter.
    """
    factors = {
        id(getattr(stage, name)): highway_lr_factor * (highway_lr_ratio if name in OUTPUTS else 1)
        for stage in model.modules()
        if isinstance(stage, HighwayStage)
        for name in PARAMETERS
        if getattr(stage, name) is not None
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keep = parameter.ndim <= 1 or name.rpartition(".")[2] in NO_DECAY_NAMES
            key = (
                lr * factors.get(id(parameter), 1.0),
                0.0 if keep else weight_decay,
            )
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
