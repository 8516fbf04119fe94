"""What the frozen trunk's weights are stored in: its linear layers also in eight bits, through
torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from e3va.trunks import Trunk, family_of
from e3va.trunks.base import Frozen
from e3va.weights import trunk_hash

DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("int8", "fp8")
"""``int8``: weights by output channel, activations by token as they come, int8 GEMMs. ``fp8``
(e4m3): the same on GPUs from sm_89 on; elsewhere weights alone, with GEMMs in the trunk's dtype."""


def quantize_trunk(trunk: Trunk, precision: str) -> None:
    """Replace the weights of a trunk's attention and MLP layers by quantised ones, in place.

    The highway's arithmetic and everything that is trained stay as they were. Load the trunk's
    weights and move it to its device first.

    Args:
        trunk: the frozen trunk; its ``precision`` becomes ``precision``.
        precision: one of :data:`PRECISIONS`.

    Raises:
        ImportError: torchao is missing.
        TypeError: the trunk is trainable.
        ValueError: no such precision, or the trunk is quantised already.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not isinstance(trunk, Frozen):
        raise TypeError(f"only a frozen trunk can be quantised, got a {type(trunk).__name__}")
    if trunk.precision is not None:
        raise ValueError(f"the trunk is quantised already, to {trunk.precision}")
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise ImportError("a quantised trunk needs torchao: pip install torchao") from error
    weight = next(trunk.parameters())
    config: Any
    if precision == "int8":
        config = ao.Int8DynamicActivationInt8WeightConfig()
    elif weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (8, 9):
        config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    else:
        config = ao.Float8WeightOnlyConfig()

    # An adapter knows its trunk by the weights as they were.
    trunk.weight_hash.copy_(torch.tensor(list(bytes.fromhex(trunk_hash(trunk)))))

    is_quantizable = family_of(trunk.config).is_quantizable
    ao.quantize_(
        trunk, config, lambda module, name: isinstance(module, nn.Linear) and is_quantizable(name)
    )
    trunk.requires_grad_(False)
    trunk.precision = precision
