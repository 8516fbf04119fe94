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


def splits_of(tokens: int, programs: int) -> int:
    """Parts of the tokens, each of them the work of ``programs``."""
    return min(SPLITS, triton.cdiv(tokens, LEAST_ROWS), triton.cdiv(PROGRAMS, programs))


def part_rows(tokens: int, splits: int, rows: int) -> int:
    """Tokens of each of ``splits`` parts: whole tiles of ``rows``."""
    return triton.cdiv(triton.cdiv(tokens, splits), rows) * rows


@triton.jit
def dot(a, b, sum):
    """sum + a·b, in full precision for float32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def gelu(z):
    """GELU of z, float32, and its slope, within 1e-6. erf is Abramowitz and Stegun's 7.1.26: it has
    no branches, unlike tl.erf, and shares exp(-z²/2) with the slope."""
    size = tl.abs(z)
    bell = tl.exp(-0.5 * z * z)
    t = 1.0 / (1.0 + 0.2316418882 * size)  # 0.3275911·|z|/√2
    # Half of their coefficients: what lies beyond |z| of the normal distribution.
    sum = 0.5307027145 * t - 0.7265760135
    sum = sum * t + 0.7107068705
    sum = sum * t - 0.142248368
    sum = sum * t + 0.127414796
    tail = sum * t * bell
    slope = tl.where(z < 0.0, tail, 1.0 - tail) + 0.3989422804014327 * z * bell
    return tl.maximum(z, 0.0) - size * tail, slope
