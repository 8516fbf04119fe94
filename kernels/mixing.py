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
        # Four neighbours fill the rows that four warps multiply.
        TENSOR_CORES: tl.constexpr = BACKWARD and tl.float32 != DTYPE
        GROUP: tl.constexpr = 4 if TENSOR_CORES and RANK_TILE == 16 else 1
        if BACKWARD:
            u = _load(u_ptr, scale_ptr, at, rows, own_in, row_in, CODED, DTYPE)
        place = rows.to(tl.int32)  # tokens fit into 32 bits: division is faster there
        column = place % width
        line = place // width % height
        for i in tl.range(SIDE, num_stages=1):
            down = i - SIDE // 2
            line_in = row_in & (line + down >= 0) & (line + down < height)
            for j in tl.static_range((SIDE + GROUP - 1) // GROUP * GROUP):
                right = j - SIDE // 2
                n = i * SIDE + j
                if BACKWARD:
                    n = SIDE * SIDE - 1 - n
                if j < SIDE:
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
                else:
                    around = tl.zeros_like(around)
                if BACKWARD:
                    if GROUP == 1:
                        x = around
                    elif j % 2 == 0:
                        even = around
                    elif j % 4 == 1:
                        pair = _beside(even, around)
                    else:
                        x = _beside(pair, _beside(even, around))
                    if j % GROUP == GROUP - 1:
                        _store_products(dD_ptr + n * RANK, x, u, GROUP, j, RANK, SIDE, RANK_TILE)
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
def _beside(x, y):
    """[rows, columns] twice → [rows, 2·columns]."""
    both = tl.permute(tl.join(x, y), (0, 2, 1))
    return tl.reshape(both, (x.shape[0], 2 * x.shape[1]))


@triton.jit
def _store_products(
    sums_ptr,
    x,  # [rows, GROUP·r]: of neighbours from the left to the right, LAST of a line the last
    u,  # [rows, r]
    GROUP: tl.constexpr,
    LAST: tl.constexpr,
    RANK: tl.constexpr,
    SIDE: tl.constexpr,
    RANK_TILE: tl.constexpr,
):
    """Σ x ⊙ u over rows, of each neighbour, the last one first: diagonals of xᵀ·u, where there are
    tensor cores."""
    ranks = tl.arange(0, RANK_TILE)
    if x.dtype == tl.float32:
        tl.store(sums_ptr + ranks, sum_of_rows(x * u), mask=ranks < RANK)
    else:
        columns = tl.arange(0, GROUP * RANK_TILE)
        rank, before = columns % RANK_TILE, GROUP - 1 - columns // RANK_TILE
        products = dot(tl.trans(x), u, tl.zeros((GROUP * RANK_TILE, RANK_TILE), tl.float32))
        diagonal = rank[:, None] == ranks[None, :]
        sums = tl.sum(tl.where(diagonal, products, 0.0), 1)
        inside = (rank < RANK) & (LAST - before < SIDE)
        tl.store(sums_ptr + before * RANK + rank, sums, mask=inside)
