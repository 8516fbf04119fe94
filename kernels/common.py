"""What the kernels share."""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

SPLITS = 64  # parts of the tokens at most
LEAST_ROWS = 128  # of a part: fewer are not worth sums of their own
PROGRAMS = 512  # fill a GPU: more parts than these take would cost memory alone

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


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


def splits_of(tokens: int, programs: int) -> int:
    """Parts of the tokens, each of them the work of ``programs``."""
    return min(SPLITS, triton.cdiv(tokens, LEAST_ROWS), triton.cdiv(PROGRAMS, programs))


def part_rows(tokens: int, splits: int, rows: int) -> int:
    """Tokens of each of ``splits`` parts: whole tiles of ``rows``."""
    return triton.cdiv(triton.cdiv(tokens, splits), rows) * rows


@triton.jit
def dot(a, b, sum):
    """sum + a·b, in full precision for float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def sum_of_rows(x):
    """Σ x over rows, [rows, columns] → [columns], float32.

    All threads that get a sum get the same: x, if it is a product, is rounded as it is added to
    zero. Without that a thread that holds one row contracts its own product with the sum of
    another's, and which thread's result is stored is undefined.
    """
    return tl.sum(x + 0.0, 0)


@triton.jit
def _tail(size):
    """The part of a normal distribution beyond ``size`` ≥ 0, within 7e-7: 2 to the power of a
    polynomial that was fitted to its logarithm, the largest error made least, and falls for ever.
    Unlike erf it has no branches and no division."""
    power = -0.0005029639318465948 * size + 0.00730130198506861
    power = power * size - 0.052389319006619334
    power = power * size - 0.4593673053118835
    power = power * size - 1.1510703266217972
    return tl.exp2(power * size - 1.0)


@triton.jit
def gelu(z):
    """GELU of z, float32 and finite, within 1e-6."""
    size = tl.abs(z)
    return tl.maximum(z, 0.0) - size * _tail(size)


@triton.jit
def gelu_and_slope(z):
    """GELU of z, float32 and finite, and its derivative, each within 1e-6."""
    tail = _tail(tl.abs(z))
    below = tl.where(z < 0.0, tail, 1.0 - tail)
    bell = tl.exp2(-0.7213475204444817 * (z * z) - 1.3257480647361593)  # exp(-z²/2) / √(2π)
    return z * below, below + z * bell
