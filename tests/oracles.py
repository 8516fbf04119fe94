"""Independent oracles: from the paper, one adapter at a time, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def adapter(x: Tensor, P: Tensor, Q: Tensor, b: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """A(x) = GELU(x·P·Q + b)·U·V."""
    return F.gelu(x @ P @ Q + b) @ U @ V


def highway(h_in: Tensor, x: list[Tensor], P, Q, b, U, V, c: Tensor) -> Tensor:
    """h_out = h_in + Σ_k (x_k + A_k(x_k)) + c."""
    h = h_in + c
    for k, x_k in enumerate(x):
        h = h + x_k + adapter(x_k, P[k], Q[k], b[k], U[k], V[k])
    return h


def lorand_projection(A: Tensor, g: Tensor, B: Tensor) -> Tensor:
    """Σ_i A_i·g_i·B_i, A [C, branches·d], g [branches, d, d], B [branches·d, m]."""
    d = g.shape[-1]
    parts = zip(A.split(d, dim=1), g, B.split(d, dim=0), strict=True)
    return sum(A_i @ g_i @ B_i for A_i, g_i, B_i in parts)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


UGLY_MAPS = [
    (1, 1, 1),  # one token
    (2, 3, 7),  # primes
    (1, 31, 33),  # 1023: almost a power of two
    (0, 5, 4),  # an empty batch
]
"""(B, H, W) of stages that no tile divides."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative error (norm over norm) allowed against float64: some 4 units of the dtype's rounding."""
