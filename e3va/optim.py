"""What the optimizer is given: which parameters decay and which do not."""

from __future__ import annotations

from typing import Any

from torch import nn

# Biases and tables that have more than one dimension: those of the stacked adapters and of Swin.
NO_DECAY_NAMES = frozenset({"b", "relative_position_bias_table"})


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as groups for a torch optimizer: weights decay; norms, biases and
    position-bias tables do not.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keep = parameter.ndim <= 1 or name.rpartition(".")[2] in NO_DECAY_NAMES
            (no_decay if keep else decay).append(parameter)
    if not decay and not no_decay:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
