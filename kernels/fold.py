"""The adapters' weights in Triton as the kernels of their rows read them: inner kernels multiplied
into Q and U, D by neighbour; and the gradients of these as those of the parameters.

A program of the forward takes a slice of m of one adapter. One of the backward takes a row of every
branch's kernels, whose gradients it sums over m in order, and every d-th slice. Kernels are small,
and a branch has its own: no tensor core is of use. All sums are in float32.

Bytes moved: parameters and their gradients once, 8Kαm (forward: and half of that in 16 bits);
neighbouring columns come from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.common import padded_rank, sum_of_rows

HIDDEN_TILE = 32
NUM_WARPS = 4


def fold(
    D: Tensor | None,  # [K, r, side, side]
    g: Tensor,  # [K, branches, d, d]
    Q: Tensor,  # [K, r, m]
    U: Tensor,  # [K, m, r]
    g_up: Tensor,  # [K, branches, d, d]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """D [K, side², r], and in ``dtype`` g·Q [K, r, m] and U·g_up [K, m, r]."""
    parameters, constants = _arguments(D, g, Q, U, g_up)
    by_neighbour = parameters[0].new_empty(len(Q), constants["SIDE"] ** 2, Q.shape[1])
    folded = by_neighbour, *(v.new_empty(v.shape, dtype=dtype) for v in (Q, U))
    fold_kernel[triton.cdiv(Q.shape[2], HIDDEN_TILE), len(Q)](*parameters, *folded, **constants)
    return folded


def fold_backward(
    totals: Tensor,  # [K, m·r + m·r + m], gradients: (g·Q)ᵀ, U·g_up, b
    mixing_totals: Tensor,  # [K, side², r], of D
    D: Tensor | None,
    g: Tensor,
    Q: Tensor,
    U: Tensor,
    g_up: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of D, empty where there is none, g, Q, b, U and g_up, in float32."""
    parameters, constants = _arguments(D, g, Q, U, g_up)
    dD = totals.new_empty(0 if D is None else D.shape)
    dg, dQ, dU, dg_up = (totals.new_empty(v.shape) for v in (g, Q, U, g_up))
    db = totals.new_empty(len(Q), Q.shape[2])
    gradients = dD, dg, dQ, db, dU, dg_up
    fold_backward_kernel[len(Q), g.shape[-1]](
        totals, mixing_totals, *parameters[1:], *gradients, **constants
    )
    return gradients


def _arguments(D: Tensor | None, *weights: Tensor) -> tuple[list[Tensor], dict[str, int]]:
    g, Q, *_ = weights
    rank, hidden = Q.shape[1:]
    constants = {
        "SIDE": 0 if D is None else D.shape[-1],
        "RANK": rank,
        "HIDDEN": hidden,
        "DIM": g.shape[-1],
        "RANK_TILE": padded_rank(rank),
        "HIDDEN_TILE": HIDDEN_TILE,
        "num_warps": NUM_WARPS,
    }
    # What is absent is not read.
    return [v.contiguous() for v in (Q if D is None else D, *weights)], constants


@triton.jit
def _slice(
    start,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK_TILE: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    """(hidden [slice, 1], ranks [1, r], whether they are there) of a slice of m."""
    hidden = start + tl.arange(0, HIDDEN_TILE)[:, None]
    ranks = tl.arange(0, RANK_TILE)[None, :]
    return hidden, ranks, (hidden < HIDDEN) & (ranks < RANK)


@triton.jit
def _load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _transpose(
    from_ptr, to_ptr, adapter, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr
):
    """That of ``adapter`` of [K, rows, columns] as [K, columns, rows]."""
    SIZE: tl.constexpr = ROWS * COLUMNS
    for start in range(0, SIZE, TILE):
        at = start + tl.arange(0, TILE)
        values = tl.load(from_ptr + adapter * SIZE + at, mask=at < SIZE, other=0.0)
        to = at % COLUMNS * ROWS + at // COLUMNS
        tl.store(to_ptr + adapter * SIZE + to, values, mask=at < SIZE)


@triton.jit
def fold_kernel(
    D_ptr,  # [K, r, side²]
    g_ptr,  # [K, branches, d, d]
    Q_ptr,  # [K, r, m]
    U_ptr,  # [K, m, r]
    g_up_ptr,  # [K, branches, d, d]
    D_out_ptr,  # [K, side², r]
    Q_out_ptr,  # [K, r, m]
    U_out_ptr,  # [K, m, r]
    SIDE: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    DIM: tl.constexpr,
    RANK_TILE: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    dtype: tl.constexpr = Q_out_ptr.dtype.element_ty
    adapter = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * HIDDEN_TILE
    hidden, ranks, inside = _slice(start, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE)
    first = ranks // DIM * DIM  # of the branch
    Q = tl.zeros((HIDDEN_TILE, RANK_TILE), tl.float32)
    U = Q
    g_ptr += adapter * (RANK * DIM)
    g_up_ptr += adapter * (RANK * DIM)
    Q_ptr += adapter * (RANK * HIDDEN)
    U_ptr += adapter * (RANK * HIDDEN)
    for n in range(DIM):
        g = _load(g_ptr, ranks * DIM + n, ranks < RANK)
        Q += g * _load(Q_ptr, (first + n) * HIDDEN + hidden, inside)
        g_up = _load(g_up_ptr, first * DIM + n * DIM + ranks % DIM, ranks < RANK)
        U += g_up * _load(U_ptr, hidden * RANK + first + n, inside)
    at = adapter * (RANK * HIDDEN)
    tl.store(Q_out_ptr + at + ranks * HIDDEN + hidden, Q.to(dtype), mask=inside)
    tl.store(U_out_ptr + at + hidden * RANK + ranks, U.to(dtype), mask=inside)
    if SIDE and tl.program_id(0) == 0:
        _transpose(D_ptr, D_out_ptr, adapter, RANK, SIDE * SIDE, 128)


@triton.jit
def fold_backward_kernel(
    totals_ptr,  # [K, m·r + m·r + m]: dQᵀ, dU, db, of what was folded
    mixing_totals_ptr,  # [K, side², r]
    g_ptr,  # [K, branches, d, d]
    Q_ptr,  # [K, r, m]
    U_ptr,  # [K, m, r]
    g_up_ptr,  # [K, branches, d, d]
    dD_ptr,  # [K, r, side²]
    dg_ptr,  # [K, branches, d, d]
    dQ_ptr,  # [K, r, m]
    db_ptr,  # [K, m]
    dU_ptr,  # [K, m, r]
    dg_up_ptr,  # [K, branches, d, d]
    SIDE: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    DIM: tl.constexpr,
    RANK_TILE: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    adapter = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    at_kernels = adapter * (RANK * DIM)
    at_weights = adapter * (RANK * HIDDEN)
    totals_ptr += adapter * (HIDDEN * (2 * RANK + 1))
    dU_in_ptr = totals_ptr + HIDDEN * RANK
    dg = tl.zeros((HIDDEN_TILE, RANK_TILE), tl.float32)
    dg_up = dg
    for start in range(0, HIDDEN, HIDDEN_TILE):
        hidden, ranks, inside = _slice(start, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE)
        beside = hidden * RANK + ranks // DIM * DIM + row
        Q = _load(Q_ptr, at_weights + ranks * HIDDEN + hidden, inside)
        dg += _load(totals_ptr, beside, inside) * Q
        U = _load(U_ptr, at_weights + beside, inside)
        dg_up += _load(dU_in_ptr, hidden * RANK + ranks, inside) * U
    columns = tl.arange(0, RANK_TILE)
    at_row = at_kernels + columns // DIM * (DIM * DIM) + row * DIM + columns % DIM
    tl.store(dg_ptr + at_row, sum_of_rows(dg), mask=columns < RANK)
    tl.store(dg_up_ptr + at_row, sum_of_rows(dg_up), mask=columns < RANK)
    if SIDE and row == 0:
        _transpose(mixing_totals_ptr, dD_ptr, adapter, SIDE * SIDE, RANK, 128)
    for start in range(row * HIDDEN_TILE, HIDDEN, DIM * HIDDEN_TILE):
        hidden, ranks, inside = _slice(start, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE)
        first = ranks // DIM * DIM
        dQ = tl.zeros((HIDDEN_TILE, RANK_TILE), tl.float32)
        dU = dQ
        for n in range(DIM):
            beside = hidden * RANK + first + n
            at = at_kernels + first * DIM + n * DIM + ranks % DIM
            dQ += _load(g_ptr, at, ranks < RANK) * _load(totals_ptr, beside, inside)
            at = at_kernels + ranks * DIM + n
            dU += _load(g_up_ptr, at, ranks < RANK) * _load(dU_in_ptr, beside, inside)
        tl.store(dQ_ptr + at_weights + ranks * HIDDEN + hidden, dQ, mask=inside)
        tl.store(dU_ptr + at_weights + hidden * RANK + ranks, dU, mask=inside)
        own = start + tl.arange(0, HIDDEN_TILE)
        db = tl.load(totals_ptr + 2 * HIDDEN * RANK + own, mask=own < HIDDEN, other=0.0)
        tl.store(db_ptr + adapter * HIDDEN + own, db, mask=own < HIDDEN)
