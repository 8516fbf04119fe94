"""What the kernels share."""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def padded_rank(rank: int) -> int:
    """Tensor cores multiply tiles of at least 16."""
    return max(16, triton.next_power_of_2(rank))


@functools.cache
def architecture_of(device: torch.device) -> int:
    """75 for sm_75, and so on."""
    if device.type != "cuda":  # Triton's interpreter
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def dot(a, b, sum):
    """sum + a·b, in full precision for float32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z):
    """The derivative of :func:`gelu`."""
    cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    return cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
