"""Independent oracles: from the paper, one adapter at a time, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from e3va.trunks.base import residual


class _Recorder:
    def __init__(self):
        self.stages, self.taps = [], []

    def epilogue(self, stage):
        def keep(x, y, norm, taps=self.taps):
            taps.append(x)
            return residual(x, y, norm)

        return keep

    def arrive(self, stage, y_in, y_out, transition):
        self.stages.append((y_in, y_out, self.taps.copy()))
        self.taps.clear()


def stages_of(trunk, image):
    """Each stage's input, output and taps, of a frozen trunk."""
    recorder = _Recorder()
    trunk.drive(image, recorder)
    return recorder.stages


def mixed(u: Tensor, D: Tensor) -> Tensor:
    """u + D ⋆ u of a map [B, H, W, α] that ends with zeros, one shift of the map at a time."""
    H, W, reach = *u.shape[1:3], D.shape[-1] // 2
    padded = F.pad(u, (0, 0, reach, reach, reach, reach))
    for i in range(D.shape[-1]):
        for j in range(D.shape[-1]):
            u = u + D[:, i, j] * padded[:, i : i + H, j : j + W]
    return u


def adapters(
    taps: list[Tensor], P, g, Q, b, U, g_up, D=None, gamma=None, carry: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """What each adapter of a stage says, s_k [B, H, W, α], and the state after it."""
    Q = [torch.block_diag(*g_k) @ Q_k for g_k, Q_k in zip(g, Q, strict=True)]
    U = [U_k @ torch.block_diag(*g_k) for U_k, g_k in zip(U, g_up, strict=True)]
    said, state = [], taps[0].new_zeros(*taps[0].shape[:-1], P.shape[-1])
    if carry is not None:
        state = state + carry
    for k, tap in enumerate(taps):
        u = tap @ P[k]
        if gamma is not None:
            u = u + gamma[k] * state
        if D is not None:
            u = mixed(u, D[k])
        said.append(F.gelu(u @ Q[k] + b[k]) @ U[k])
        state = state + said[k]
    return said, state


def highway(
    h_in: Tensor,
    x: list[Tensor],
    P,
    g,
    Q,
    b,
    U,
    g_up,
    V,
    c: Tensor,
    D=None,
    gamma=None,
    carry=None,
    taps=(),
) -> tuple[Tensor, Tensor]:
    """h_out = h_in + Σ_k (x_k + s_k·V_k) + c, and the state after the stage. ``taps``: what the
    adapters read, if not x."""
    said, state = adapters(taps or x, P, g, Q, b, U, g_up, D, gamma, carry)
    h = h_in + c
    for x_k, s_k, V_k in zip(x, said, V, strict=True):
        h = h + x_k + s_k @ V_k
    return h, state


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
