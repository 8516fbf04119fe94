"""An adapter's depth-wise convolution over the map, and its backward, at the rows of a program."""

from __future__ import annotations

import triton
import triton.language as tl

from e3va.kernels.common import dot, sum_of_rows


@triton.jit
def mix(
    values_ptr,  # [N, r]
    D_ptr,  # [side², r]
    u_ptr,  # [N, r], or None
    scale_ptr,  # [N], of u, or of the values where they are u
    dD_ptr,  # [side², r], or None
    rows,
    tokens,
    height,
    width,
    DTYPE: tl.constexpr,
    CODED: tl.constexpr,
    BACKWARD: tl.constexpr,
    RANK: tl.constexpr,
    SIDE: tl.constexpr,
    RANK_TILE: tl.constexpr,
):
    """values + D ⋆ values at the rows, in float32. BACKWARD: the values are a gradient, D is as the
    neighbours see it, and what the rows add to its gradient is stored."""
    ranks = tl.arange(0, RANK_TILE)
    row_in = rows < tokens
    rank_in = ranks < RANK
    at = rows[:, None] * RANK + ranks[None, :]
    own_in = row_in[:, None] & rank_in[None, :]
    OF_U: tl.constexpr = CODED and not BACKWARD
    total = _load(values_ptr, scale_ptr, at, rows, own_in, row_in, OF_U, tl.float32).to(tl.float32)
    if SIDE:
        if BACKWARD:
            u = _load(u_ptr, scale_ptr, at, rows, own_in, row_in, CODED, DTYPE)
        place = rows.to(tl.int32)  # tokens fit into 32 bits: division is faster there
        column = place % width
        line = place // width % height
        for i in tl.range(SIDE, num_stages=1):
            down = i - SIDE // 2
            line_in = row_in & (line + down >= 0) & (line + down < height)
            for j in tl.static_range(SIDE):
                right = j - SIDE // 2
                n = i * SIDE + j
                if BACKWARD:
                    n = SIDE * SIDE - 1 - n
                inside = line_in & (column + right >= 0) & (column + right < width)
                D = tl.load(D_ptr + n * RANK + ranks, mask=rank_in, other=0.0).to(tl.float32)
                off = down * width + right
                around = _load(
                    values_ptr,
                    scale_ptr,
                    at + off * RANK,
                    rows + off,
                    inside[:, None] & rank_in[None, :],
                    inside,
                    OF_U,
                    tl.float32,
                )
                total += D[None, :] * around.to(tl.float32)
                if BACKWARD:
                    _store_products(dD_ptr + n * RANK, around, u, RANK, RANK_TILE)
    return total


@triton.jit
def _load(
    values_ptr, scale_ptr, at, rows, inside, row_in, CODED: tl.constexpr, DTYPE: tl.constexpr
):
    """Rows of [N, r], zero outside; CODED: those that are in int8, in DTYPE."""
    values = tl.load(values_ptr + at, mask=inside, other=0.0)
    if CODED:
        scale = tl.load(scale_ptr + rows, mask=row_in, other=0.0)
        values = (values.to(tl.float32) * scale[:, None]).to(DTYPE)
    return values


@triton.jit
def _store_products(sums_ptr, x, y, RANK: tl.constexpr, RANK_TILE: tl.constexpr):
    """Σ x ⊙ y over rows, [rows, r] → [r]: the diagonal of xᵀ·y, where there are tensor cores."""
    ranks = tl.arange(0, RANK_TILE)
    if x.dtype == tl.float32:
        tl.store(sums_ptr + ranks, sum_of_rows(x * y), mask=ranks < RANK)
    else:
        product = dot(tl.trans(x), y, tl.zeros((RANK_TILE, RANK_TILE), tl.float32))
        diagonal = (ranks[:, None] == ranks[None, :]) & (ranks < RANK)[None, :]
        tl.store(sums_ptr + ranks[None, :] + 0 * ranks[:, None], product, mask=diagonal)
