"""The optimizer: which parameters decay, which learn faster, and what its state takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from e3va.highway import NO_DECAY, OUTPUTS, PARAMETERS, HighwayStage
from e3va.trunks import FAMILIES

NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)

READY = 2**22
"""Bytes of gradients with which :func:`stepping` steps: few steps, and yet a bound."""

IN_EIGHT_BITS = 4096
"""Values from which on a parameter has its moments in eight bits, see :func:`adamw8bit`."""


class Rates(NamedTuple):
    """Learning rate and weight decay of the parameters, and where they differ.

    Attributes:
        lr: of all but what follows.
        weight_decay: of weights.
        norm_decay: of norms (default 0).
        bias_decay: of biases, and of the highway's gamma, b and c (default 0).
        bias_lr_factor: learning rate of biases over ``lr`` (default 1).
        highway_lr_factor: of the highway over ``lr`` (default 1).
        highway_lr_ratio: of its V and c, which begin at zero, over that of the rest of it, as of
            LoRA's B (LoRA+, arXiv 2402.12354; default 1).
    """

    lr: float
    weight_decay: float
    norm_decay: float = 0.0
    bias_decay: float = 0.0
    bias_lr_factor: float = 1.0
    highway_lr_factor: float = 1.0
    highway_lr_ratio: float = 1.0


def parameter_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """The trainable parameters as groups for a torch optimizer, one for each pair of learning rate
    and weight decay.

    The tables of a trunk that are neither norms nor biases and must be spared, such as those of
    relative positions, do not decay.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module, name, parameter in _trainable(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            groups.setdefault(_rates_of(module, name, rates), []).append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def adamw8bit() -> type[torch.optim.Optimizer]:
    """AdamW whose two moments take a byte each and a scale for 256 values, through bitsandbytes
    (T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861). Parameters
    of fewer than :data:`IN_EIGHT_BITS` values keep theirs in float32.

    Raises:
        ImportError: bitsandbytes is missing, or cannot be loaded.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise ImportError(
            "an optimizer in eight bits needs bitsandbytes: pip install bitsandbytes"
        ) from error
    except Exception as error:  # it looks for its own libraries, and those for a GPU's
        raise ImportError(f"bitsandbytes cannot be loaded: {error}") from error
    return AdamW8bit


def has_adamw8bit() -> bool:
    """Whether there is one."""
    try:
        adamw8bit()
    except ImportError:
        return False
    return True


def state_bytes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """What ``optimizer`` keeps for ``parameter`` from its first step on, scales left out."""
    if isinstance(optimizer, torch.optim.SGD):
        return parameter.nbytes
    if "bitsandbytes" in sys.modules and isinstance(optimizer, adamw8bit()):
        return 2 * (parameter.numel() if parameter.numel() >= IN_EIGHT_BITS else parameter.nbytes)
    return 2 * parameter.nbytes


def _trainable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield module, name, parameter


def _rates_of(module: nn.Module, name: str, rates: Rates) -> tuple[float, float]:
    lr, decay = rates.lr, rates.weight_decay
    if isinstance(module, HighwayStage) and name in PARAMETERS:
        lr *= rates.highway_lr_factor * (rates.highway_lr_ratio if name in OUTPUTS else 1)
        return lr, rates.bias_decay if name in NO_DECAY else decay
    if isinstance(module, NORMS):
        decay = rates.norm_decay
    elif name == "bias":
        lr, decay = lr * rates.bias_lr_factor, rates.bias_decay
    elif any(name in family.no_decay for family in FAMILIES.values()):
        decay = 0.0
    return lr, decay


@contextmanager
def stepping(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Step ``optimizer`` while the backward inside runs: gradients are used and freed as they are
    ready, some MiB at a time, where they would otherwise all wait for its end.

    Parameters and state become what one step after the backward makes of them, to the last bit, if
    the optimizer treats every parameter by itself. Not for gradients that something has to see
    together, or changed before: a norm over all, a loss scale, an exchange between processes.
    """
    ready = 0

    def step(parameter: Tensor) -> None:
        nonlocal ready
        assert parameter.grad is not None
        ready += parameter.grad.nbytes
        if ready >= READY:
            finish()

    def finish() -> None:
        nonlocal ready
        optimizer.step()
        optimizer.zero_grad()
        ready = 0

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    hooks = [p.register_post_accumulate_grad_hook(step) for p in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    finish()


def take_step(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, early: bool = False
) -> None:
    """A whole training step: ``loss()``, its backward and the optimizer's step, along the backward
    if ``early`` (see :func:`stepping`; default: after it). Leaves no gradients."""
    total = loss()
    with stepping(optimizer) if early else nullcontext():
        total.backward()
    if not early:
        optimizer.step()
        optimizer.zero_grad()
