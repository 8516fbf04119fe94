"""``highway_backward`` in Triton: the backward of a stage's K adapters from one gradient.

Four products with the stage's gradient and taps are the vendor's GEMMs (dS = G·Vᵀ, dV = Sᵀ·G,
dP_k = x_kᵀ·dt_k, dc). What lies between them happens on chip, in two kernels that both recompute
z = t·Q + b and a = GELU(z), so that nothing of the hidden width m is ever written but gradients of
parameters: ``rows_kernel`` sums over m (S and dt), ``weights_kernel`` over tokens (dQ, db, dU).

Deterministic: the tokens are cut into SPLITS parts, whatever the GPU; each part is summed in order
by one program, and the parts are added by one reduction. No atomics.

Bytes moved beside the GEMMs: t, dS read and S, dt written (8KNα in 16 bits); t and dS again per
slice of m.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.common import architecture_of, dot, gelu, gelu_slope, padded_rank

SPLITS = 64


class Tiles(NamedTuple):
    """Sizes of what a program holds, and its warps."""

    rows: int
    hidden: int
    num_warps: int


def tiles(dtype: torch.dtype, architecture: int, rank: int) -> Tiles:
    """The largest tiles that do not spill, see ``python -m bench.registers``."""
    if dtype == torch.float32:
        return Tiles(16, 32, 8 if architecture >= 100 else 4)
    if architecture < 80:
        return Tiles(16, 32, 8)
    return Tiles(32, 32 if rank > 32 or architecture == 100 else 64, 4)


def highway_backward(
    G: Tensor,  # [N, C]
    x: Sequence[Tensor],  # K × [N, C]
    t: Sequence[Tensor],  # K × [N, r]
    P: Tensor,  # [K, C, r]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    V: Tensor,  # [K, r, C]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    taps, rank, hidden = Q.shape
    tokens, channels = G.shape
    narrow = [weight.to(G.dtype).contiguous() for weight in (Q, b, U)]
    t_all = torch.stack(list(t))  # [K, N, r]
    dS = G @ V.flatten(0, 1).to(G).t()  # [N, K·r]
    S, dt = torch.empty_like(dS), torch.empty_like(t_all)
    shapes = ((rank, hidden), (hidden,), (hidden, rank))
    dQ, db, dU = (
        torch.zeros(SPLITS, taps, *shape, dtype=torch.float32, device=G.device) for shape in shapes
    )
    if tokens:
        tile = tiles(G.dtype, architecture_of(G.device), rank)
        sizes = {
            "TAPS": taps,
            "RANK": rank,
            "HIDDEN": hidden,
            "RANK_TILE": padded_rank(rank),
            "ROWS": tile.rows,
            "HIDDEN_TILE": tile.hidden,
            "num_warps": tile.num_warps,
        }
        rows_kernel[(triton.cdiv(tokens, tile.rows), taps)](
            t_all, dS, *narrow, S, dt, tokens, **sizes
        )
        weights_kernel[(SPLITS, triton.cdiv(hidden, tile.hidden), taps)](
            t_all,
            dS,
            *narrow,
            dQ,
            db,
            dU,
            tokens,
            triton.cdiv(triton.cdiv(tokens, SPLITS), tile.rows) * tile.rows,
            **sizes,
        )
    dP = torch.stack([(x_k.t() @ dt_k).to(P.dtype) for x_k, dt_k in zip(x, dt, strict=True)])
    dV = (S.t() @ G).view(taps, rank, channels)
    dc = G.sum(0, dtype=torch.float32)
    return (
        dP,
        dQ.sum(0).to(Q.dtype),
        db.sum(0).to(b.dtype),
        dU.sum(0).to(U.dtype),
        dV.to(V.dtype),
        dc.to(V.dtype),
    )


@triton.jit
def _load_slice(
    Q_ptr,
    b_ptr,
    U_ptr,
    start,
    tap,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK_TILE: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    """A slice of m: Q [r, slice], b [slice], Uᵀ [r, slice]; zero outside."""
    ranks = tl.arange(0, RANK_TILE)
    hidden = start + tl.arange(0, HIDDEN_TILE)
    inside = (ranks < RANK)[:, None] & (hidden < HIDDEN)[None, :]
    weights = tap * RANK * HIDDEN
    Q = tl.load(Q_ptr + weights + ranks[:, None] * HIDDEN + hidden[None, :], mask=inside, other=0.0)
    U = tl.load(U_ptr + weights + hidden[None, :] * RANK + ranks[:, None], mask=inside, other=0.0)
    b = tl.load(b_ptr + tap * HIDDEN + hidden, mask=hidden < HIDDEN, other=0.0)
    return Q, b.to(tl.float32), U


@triton.jit
def rows_kernel(
    t_ptr,  # [K, N, r]
    dS_ptr,  # [N, K·r]
    Q_ptr,
    b_ptr,
    U_ptr,
    S_ptr,  # [N, K·r]
    dt_ptr,  # [K, N, r]
    tokens,
    TAPS: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    dtype: tl.constexpr = t_ptr.dtype.element_ty
    tap = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK_TILE)
    inside = (rows < tokens)[:, None] & (ranks < RANK)[None, :]
    at_t = (tap * tokens + rows)[:, None] * RANK + ranks[None, :]
    at_S = rows[:, None] * (TAPS * RANK) + tap * RANK + ranks[None, :]
    t = tl.load(t_ptr + at_t, mask=inside, other=0.0)
    dS = tl.load(dS_ptr + at_S, mask=inside, other=0.0)
    S = tl.zeros((ROWS, RANK_TILE), tl.float32)
    dt = tl.zeros((ROWS, RANK_TILE), tl.float32)
    zero = tl.zeros((ROWS, HIDDEN_TILE), tl.float32)
    for start in range(0, HIDDEN, HIDDEN_TILE):
        Q, b, U = _load_slice(Q_ptr, b_ptr, U_ptr, start, tap, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE)
        z = dot(t, Q, zero) + b[None, :]
        S = dot(gelu(z).to(dtype), tl.trans(U), S)
        dz = dot(dS, U, zero) * gelu_slope(z)
        dt = dot(dz.to(dtype), tl.trans(Q), dt)
    tl.store(S_ptr + at_S, S.to(dtype), mask=inside)
    tl.store(dt_ptr + at_t, dt.to(dtype), mask=inside)


@triton.jit
def weights_kernel(
    t_ptr,  # [K, N, r]
    dS_ptr,  # [N, K·r]
    Q_ptr,
    b_ptr,
    U_ptr,
    dQ_ptr,  # [SPLITS, K, r, m]
    db_ptr,  # [SPLITS, K, m]
    dU_ptr,  # [SPLITS, K, m, r]
    tokens,
    split_rows,
    TAPS: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    dtype: tl.constexpr = t_ptr.dtype.element_ty
    tap = tl.program_id(2)
    slice_start = tl.program_id(1) * HIDDEN_TILE
    first = tl.program_id(0).to(tl.int64) * split_rows
    ranks = tl.arange(0, RANK_TILE)
    Q, b, U = _load_slice(
        Q_ptr, b_ptr, U_ptr, slice_start, tap, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE
    )
    dQ = tl.zeros((RANK_TILE, HIDDEN_TILE), tl.float32)
    dU = tl.zeros((RANK_TILE, HIDDEN_TILE), tl.float32)
    db = tl.zeros((HIDDEN_TILE,), tl.float32)
    zero = tl.zeros((ROWS, HIDDEN_TILE), tl.float32)
    for step in range(0, split_rows, ROWS):
        rows = first + step + tl.arange(0, ROWS)
        inside = (rows < tokens)[:, None] & (ranks < RANK)[None, :]
        at_t = (tap * tokens + rows)[:, None] * RANK + ranks[None, :]
        at_S = rows[:, None] * (TAPS * RANK) + tap * RANK + ranks[None, :]
        t = tl.load(t_ptr + at_t, mask=inside, other=0.0)
        dS = tl.load(dS_ptr + at_S, mask=inside, other=0.0)
        z = dot(t, Q, zero) + b[None, :]
        # Rows past the end have dS = 0, and with it dz = 0: they add nothing.
        dz = dot(dS, U, zero) * gelu_slope(z)
        dU = dot(tl.trans(dS), gelu(z).to(dtype), dU)
        dQ = dot(tl.trans(t), dz.to(dtype), dQ)
        db += tl.sum(dz, 0)
    hidden = slice_start + tl.arange(0, HIDDEN_TILE)
    hidden_in = hidden < HIDDEN
    inside = (ranks < RANK)[:, None] & hidden_in[None, :]
    part = tl.program_id(0) * TAPS + tap
    tl.store(
        dQ_ptr + part * RANK * HIDDEN + ranks[:, None] * HIDDEN + hidden[None, :], dQ, mask=inside
    )
    tl.store(
        dU_ptr + part * RANK * HIDDEN + hidden[None, :] * RANK + ranks[:, None], dU, mask=inside
    )
    tl.store(db_ptr + part * HIDDEN + hidden, db, mask=hidden_in)
