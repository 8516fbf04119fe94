"""The Triton backend: ``kernels/``, installed as e3va.kernels, imported when a GPU first asks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
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


@register("sublayer_epilogue", "triton", why_not, cannot)
def sublayer_epilogue(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from e3va.kernels.sublayer_epilogue import sublayer_epilogue

    with torch.cuda.device_of(x):
        return sublayer_epilogue(x, *arguments)


@register("adapters", "triton", why_not, cannot)
def adapters(t: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from e3va.kernels.adapters import adapters

    with torch.cuda.device_of(t):
        return adapters(t, *arguments)


@register("adapters_backward", "triton", why_not, cannot)
def adapters_backward(dS: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from e3va.kernels.adapters_backward import adapters_backward

    with torch.cuda.device_of(dS):
        return adapters_backward(dS, *arguments)


@register("tap_gradient", "triton", why_not, cannot)
def tap_gradient(
    taps: Sequence[Tensor] | Tensor, scale: Tensor | None, storage: str, dt: Tensor, channels: int
) -> Tensor:
    from e3va.kernels.tap_gradient import tap_gradient

    with torch.cuda.device_of(dt):
        return tap_gradient(taps, scale, storage, dt, channels)


@register("stage_exit_backward", "triton", why_not)
def stage_exit_backward(dp: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from e3va.kernels.stage_exit import stage_exit_backward

    with torch.cuda.device_of(dp):
        return stage_exit_backward(dp, *arguments)
