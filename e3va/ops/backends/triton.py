"""The Triton backend: ``kernels/``, installed as e3va.kernels, imported when a GPU first asks."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from e3va.ops.backends.registry import register
from e3va.ops.variants import Variant

LARGEST_RANK = 128
"""What fits into every GPU's shared memory."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where Triton kernels run for tensors of ``device`` and ``dtype``, else the reason."""
    if device.type != "cuda":
        return f"Triton kernels run on GPUs, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there are no Triton kernels for {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU has no bfloat16 arithmetic, which begins with sm_80"
    return None


def cannot(device: torch.device, variant: Variant) -> str | None:
    """None where they compute a variant of an op, else the reason."""
    rank = getattr(variant, "rank", 0)
    if rank > LARGEST_RANK:
        return f"its Triton kernel has ranks up to {LARGEST_RANK}, not of {rank}"
    return None


def _run(module: str, op: str, *arguments: Any) -> Any:
    kernel = getattr(importlib.import_module(f"e3va.kernels.{module}"), op)
    like = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(like):
        return kernel(*arguments)


for _op, _module in {
    "adapters": "adapters",
    "adapters_backward": "adapters_backward",
    "tap_gradient": "tap_gradient",
    "stage_exit_backward": "stage_exit",
    "sublayer_epilogue": "sublayer_epilogue",
}.items():
    register(_op, "triton", why_not, cannot)(functools.partial(_run, _module, _op))
