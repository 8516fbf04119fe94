"""What a training step costs in memory, counted exactly and on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from e3va.checkpoint import find_trunk
from e3va.measure.live import CappedBytes, LiveBytes, SavedBytes, bytes_of, tensors_in
from e3va.measure.parts import SPLIT, PartsBytes, bottom_up


def trainable_parameters(module: nn.Module) -> int:
    """Number of values that require a gradient."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def peak_live_bytes(module: nn.Module, step: Callable[[], Tensor]) -> int:
    """Most bytes alive at once in a training step: ``step()`` gives the loss, whose backward runs.

    Gradients of parameters exist beforehand, as from the second step on, and are not counted.
    """
    make_gradients(module)
    with LiveBytes() as memory:
        step().backward()
    return memory.peak


def step_split(
    model: nn.Module, step: Callable[[], Any], optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """The bytes of a training step at their peak by what they are of, with the keys :data:`SPLIT`;
    their sum is :func:`whole_step_bytes`.

    - "trunk_weights", "other_weights": parameters and buffers of the trunk, and all others.
    - "gradients": of what is trained, as many as there are at once.
    - "optimizer": its state, such as Adam's moments.
    - "backbone_saved": what the backbone's forward leaves behind, for its backward (of E³VA: the
      kept taps, u, the maps) or as its maps alone (of a frozen one).
    - "backbone_transient": what else the backbone makes, in forward and backward.
    - "neck": the FPN. "proposals": the RPN, or RetinaNet's head. "heads": the RoI heads, or that of
      semantic segmentation; with their losses.
    - "loss_and_data": images, targets and what no part makes, such as RetinaNet's losses.

    Gradients that there are beforehand stay, as between the parts of an accumulated step. See
    :class:`PartsBytes`.

    Args:
        model: a detector of Detectron2 or torchvision, or a semantic segmentor of Detectron2.
        step: forward, backward and, if it is a whole one, the optimizer's step.
        optimizer: of the model. Where it has no state yet it is made, as from the second step on.
    """
    if not optimizer.state:
        make_state(model, optimizer)
    trunk = find_trunk(model)[1] or bottom_up(model)
    trunk_weights = bytes_of((*trunk.parameters(), *trunk.buffers()))
    fixed = {
        "trunk_weights": trunk_weights,
        "other_weights": bytes_of((*model.parameters(), *model.buffers())) - trunk_weights,
        "gradients": bytes_of([p.grad for p in model.parameters() if p.grad is not None]),
        "optimizer": bytes_of(_state(optimizer)),
    }
    with PartsBytes.of(model) as memory:
        step()
    made = memory.at_peak()
    return {part: fixed.get(part, 0) + made[part] for part in SPLIT}


def make_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state, as there is from the second step of a training on, by a step of
    zero gradients. Leaves none."""
    make_gradients(model)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    optimizer.zero_grad()


def make_gradients(module: nn.Module) -> None:
    """Zeros, where a parameter that is trained has no gradient yet."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that stay between two training steps: parameters, buffers, the optimizer's state."""
    return bytes_of((*model.parameters(), *model.buffers(), *_state(optimizer)))


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return list(tensors_in(v for values in optimizer.state.values() for v in values.values()))


def whole_step_bytes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], Any],
    limit: int | None = None,
) -> int:
    """Most bytes alive at once in a training step, everything included: weights, the optimizer's
    state, gradients while they exist, activations.

    Args:
        step: forward, backward and the optimizer's step; begins and ends without gradients.
        limit: of these bytes, see :class:`CappedBytes` (default: none).
    """
    if not optimizer.state:  # as from the second step on
        make_state(model, optimizer)
    optimizer.zero_grad()
    before = resident_bytes(model, optimizer)
    memory = LiveBytes() if limit is None else CappedBytes(limit - before)
    with memory:
        step()
    return before + memory.peak


def saved_bytes(module: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that ``run`` makes autograd save beyond the parameters and buffers of ``module``."""
    with SavedBytes([module]) as saved:
        result = run()
    del result
    return saved.total


def step_costs(
    module: nn.Module, backbone: nn.Module, images: Any, step: Callable[[], Tensor]
) -> dict[str, int]:
    """What a training step of ``module`` costs: "trainable_params" and "saved_bytes" of its
    ``backbone``, which takes ``images``, and "peak_live_bytes" of all, ``step()`` giving the
    loss."""
    return {
        "trainable_params": trainable_parameters(backbone),
        "saved_bytes": saved_bytes(backbone, lambda: backbone(images)),
        "peak_live_bytes": peak_live_bytes(module, step),
    }
