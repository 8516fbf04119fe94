"""``adapters`` and ``adapters_backward`` in Triton: the hidden half of a stage's K adapters.

A program owns a few rows of the map, flattened. It reads u_k there and around, mixes, and goes
through the hidden width m a slice at a time, so that nothing of width m is ever written but
gradients of parameters. A state orders the adapters: each is a launch of its own, whose end makes
the next one's u, for all its neighbours to read. Without a state one launch serves all K.

Backward runs from the last adapter to the first, in K + 1 launches of ``rows_kernel``: what the
neighbours of a row contribute to its gradient is gathered when all of them are done, together with
the work on the adapter before. Left to the end are the sums over tokens, of all K adapters at once:
``weights_kernel`` makes z and a again for dQ, db and dU, ``mixing_kernel`` sums dD.

Deterministic: the tokens are cut into parts, as many as their shape says, whatever the GPU; each
part is summed in order by one program, and the parts are added by one reduction. No atomics.

Bytes moved in 16 bits, where what is read around a row comes from cache: forward t and u read, u
and S written (8KNα), the state (8KNα); backward dS, u and the gradient of mixed read, S, ds, mixed,
its gradient and dt written (16KNα), that of the state (8KNα); then u and the gradient of
mixed for each neighbour, mixed and ds for each slice of m.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.common import (
    architecture_of,
    dot,
    gelu,
    gelu_and_slope,
    padded_rank,
    part_rows,
    splits_of,
)

MIXING_ROWS = 64  # of mixing_kernel
MIXING_PART = 1024  # tokens that a program of it sums


class Tiles(NamedTuple):
    """Sizes of what a program holds, and its warps."""

    rows: int
    hidden: int
    num_warps: int


def forward_tiles(dtype: torch.dtype, architecture: int, rank: int) -> Tiles:
    """The fastest tiles on an H100 that spill nowhere, see ``python -m bench.registers``. Tensor
    cores multiply 16 rows: with fewer for each warp, warps would do the same work."""
    if dtype == torch.float32 or architecture < 80:
        return Tiles(16, 32, 4)
    return Tiles(32, 32, 4) if rank > 32 else Tiles(16, 64, 1)


def rows_tiles(dtype: torch.dtype, architecture: int, rank: int) -> Tiles:
    """Those of ``rows_kernel``."""
    if architecture < 80 and rank > 32:
        return Tiles(16, 16, 8)
    if dtype == torch.float32:
        if architecture >= 90:
            return Tiles(16, 32, 8)
        if architecture >= 80:
            return Tiles(32, 16, 8 if rank > 32 else 4)
        return Tiles(16, 16, 8)
    if architecture < 80:
        return Tiles(16, 32, 8)
    if rank > 32:
        return Tiles(32, 32, 4)
    return Tiles(64, 32 if architecture >= 100 else 64, 4)


def weights_tiles(dtype: torch.dtype, architecture: int, rank: int) -> Tiles:
    """Those of ``weights_kernel``."""
    if dtype == torch.float32:
        return Tiles(16, 32, 8 if architecture >= 100 else 4)
    if architecture < 80:
        return Tiles(16, 32, 8)
    return Tiles(32, 32 if rank > 32 or architecture == 100 else 64, 4)


def adapters(
    t: Tensor,  # [K, N, r]
    carry: Tensor | None,  # [N, r]
    D: Tensor | None,  # [K, r, side, side]
    gamma: Tensor | None,  # [K, r]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    t = t.contiguous()
    K, tokens, rank = t.shape
    S = t.new_empty(tokens, K * rank)
    u = t.new_empty(0 if gamma is None else (K + 1, tokens, rank))
    if not tokens:
        return S, u
    state = S
    if gamma is not None:
        state = _state(carry, t[0])
        # Without a carry the first adapter hears nothing.
        u[0] = t[0] if carry is None else t[0] + gamma[0].float() * state
    tile = forward_tiles(t.dtype, architecture_of(t.device), rank)
    grid = triton.cdiv(tokens, tile.rows), K if gamma is None else 1
    weights = _by_neighbour(D, S), _given(gamma, S), *_narrow(Q, b, U, t.dtype)
    for k in range(K // grid[1]):
        adapters_kernel[grid](
            t,
            t if gamma is None else u,
            state,
            *weights,
            S,
            tokens,
            *size,
            k,
            **_sizes(Q, D, tile),
            STATE=gamma is not None,
        )
    return S, u


def adapters_backward(
    dS: Tensor,  # [N, K·r]
    dcarry: Tensor | None,  # [N, r]
    u: Tensor,  # [K, N, r]
    D: Tensor | None,  # [K, r, side, side]
    gamma: Tensor | None,  # [K, r]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    size: tuple[int, int],
) -> tuple[Tensor, ...]:
    dS, u = dS.contiguous(), u.contiguous()
    (K, rank, hidden), tokens = Q.shape, len(dS)
    architecture = architecture_of(dS.device)
    S, dt = torch.empty_like(dS), torch.empty_like(u)
    dbefore = dS.new_empty(0 if gamma is None else (tokens, rank))
    # Where nothing is mixed, or added to the gradient, the tensors coincide.
    mixed, dmixed = (u, dt) if D is None else (torch.empty_like(dt) for _ in range(2))
    ds = dS if gamma is None else torch.empty_like(dS)

    tile = rows_tiles(dS.dtype, architecture, rank)
    programs = triton.cdiv(tokens, tile.rows)
    narrow = _narrow(Q, b, U, dS.dtype)
    if tokens:
        dstate = S if gamma is None else _state(dcarry, u[0])
        arguments = (
            dS,
            u,
            dstate,
            _by_neighbour(D, S),
            _given(gamma, S),
            *narrow,
            S,
            ds,
            mixed,
            dmixed,
            dt,
            dbefore,
            tokens,
            *size,
        )
        sizes = {**_sizes(Q, D, tile), "STATE": gamma is not None}
        if gamma is not None:
            for k in range(K - 1, -2, -1):
                rows_kernel[programs, 1](*arguments, k, **sizes, NEXT=k + 1 < K, OWN=k >= 0)
        else:
            rows_kernel[programs, K](*arguments, 0, **sizes, NEXT=False, OWN=True)
            if D is not None:
                rows_kernel[programs, K](*arguments, -1, **sizes, NEXT=True, OWN=False)
        del arguments

    tile = weights_tiles(dS.dtype, architecture, rank)
    slices = triton.cdiv(hidden, tile.hidden)
    splits = splits_of(tokens, slices * K)
    dQ, db, dU = (_sums(splits, w, dS) for w in (Q, b, U))
    if tokens:
        sizes = _sizes(Q, None, tile)
        del sizes["SIDE"]
        weights_kernel[splits, slices, K](
            mixed, ds, *narrow, dQ, db, dU, tokens, part_rows(tokens, splits, tile.rows), **sizes
        )
    del mixed, ds
    dD = dS.new_empty(0, dtype=torch.float32)
    if D is not None:
        side = D.shape[-1]
        splits = triton.cdiv(tokens, MIXING_PART)
        dD = _sums(splits, D, dS)
        if tokens:
            mixing_kernel[splits, side * side, K](
                u,
                dmixed,
                dD,
                tokens,
                *size,
                MIXING_PART,
                TAPS=K,
                RANK=rank,
                SIDE=side,
                RANK_TILE=padded_rank(rank),
                ROWS=MIXING_ROWS,
            )
        dD = dD.sum(0)
    return S, dt, dbefore, dD, dQ.sum(0), db.sum(0), dU.sum(0)


def _state(begin: Tensor | None, like: Tensor) -> Tensor:
    """A copy of [N, r] in float32, or zeros: kernels change it."""
    if begin is None:
        return torch.zeros_like(like, dtype=torch.float32)
    return begin.to(torch.float32, copy=True).contiguous()


def _by_neighbour(D: Tensor | None, absent: Tensor) -> Tensor:
    """[K, r, side, side] → [K, side², r]."""
    return absent if D is None else D.flatten(2).transpose(1, 2).contiguous()


def _given(values: Tensor | None, absent: Tensor) -> Tensor:
    """What is absent is neither read nor written."""
    return absent if values is None else values.contiguous()


def _narrow(Q: Tensor, b: Tensor, U: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What is multiplied gets the dtype of the rows."""
    return Q.to(dtype).contiguous(), b.contiguous(), U.to(dtype).contiguous()


def _sums(parts: int, parameter: Tensor | None, like: Tensor) -> Tensor:
    """Room for what ``parts`` parts of the tokens add to a parameter's gradient."""
    shape = (0,) if parameter is None else (parts, *parameter.shape)
    return like.new_empty(shape, dtype=torch.float32)


def _sizes(Q: Tensor, D: Tensor | None, tile: Tiles) -> dict[str, Any]:
    K, rank, hidden = Q.shape
    return {
        "TAPS": K,
        "RANK": rank,
        "HIDDEN": hidden,
        "SIDE": 0 if D is None else D.shape[-1],
        "RANK_TILE": padded_rank(rank),
        "ROWS": tile.rows,
        "HIDDEN_TILE": tile.hidden,
        "num_warps": tile.num_warps,
    }


@triton.jit
def _load_slice(
    Q_ptr,  # [r, m]
    b_ptr,  # [m]
    U_ptr,  # [m, r]
    start,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK_TILE: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    """A slice of m: Q [r, slice], b [slice], Uᵀ [r, slice]; zero outside."""
    ranks = tl.arange(0, RANK_TILE)
    hidden = start + tl.arange(0, HIDDEN_TILE)
    inside = (ranks < RANK)[:, None] & (hidden < HIDDEN)[None, :]
    Q = tl.load(Q_ptr + ranks[:, None] * HIDDEN + hidden[None, :], mask=inside, other=0.0)
    U = tl.load(U_ptr + hidden[None, :] * RANK + ranks[:, None], mask=inside, other=0.0)
    b = tl.load(b_ptr + hidden, mask=hidden < HIDDEN, other=0.0)
    return Q, b.to(tl.float32), U


@triton.jit
def _mix(
    values_ptr,  # [N, r]
    D_ptr,  # [side², r]
    rows,
    tokens,
    height,
    width,
    MIRRORED: tl.constexpr,
    RANK: tl.constexpr,
    SIDE: tl.constexpr,
    RANK_TILE: tl.constexpr,
):
    """values + D ⋆ values at the rows, in float32; MIRRORED: D as the neighbours see it."""
    ranks = tl.arange(0, RANK_TILE)
    row_in = rows < tokens
    rank_in = ranks < RANK
    at = rows[:, None] * RANK + ranks[None, :]
    total = tl.load(values_ptr + at, mask=row_in[:, None] & rank_in[None, :], other=0.0)
    total = total.to(tl.float32)
    if SIDE:
        place = rows.to(tl.int32)  # tokens fit into 32 bits: division is faster there
        column = place % width
        line = place // width % height
        for i in range(SIDE):
            down = i - SIDE // 2
            line_in = row_in & (line + down >= 0) & (line + down < height)
            for j in tl.static_range(SIDE):
                right = j - SIDE // 2
                n = i * SIDE + j
                if MIRRORED:
                    n = SIDE * SIDE - 1 - n
                inside = line_in & (column + right >= 0) & (column + right < width)
                D = tl.load(D_ptr + n * RANK + ranks, mask=rank_in, other=0.0).to(tl.float32)
                around = tl.load(
                    values_ptr + at + (down * width + right) * RANK,
                    mask=inside[:, None] & rank_in[None, :],
                    other=0.0,
                )
                total += D[None, :] * around.to(tl.float32)
    return total


@triton.jit(do_not_specialize=["tokens", "height", "width", "first"])
def adapters_kernel(
    t_ptr,  # [K, N, r]
    u_ptr,  # [K + 1, N, r], or t without a state
    state_ptr,  # [N, r]
    D_ptr,  # [K, side², r]
    gamma_ptr,  # [K, r]
    Q_ptr,  # [K, r, m]
    b_ptr,  # [K, m]
    U_ptr,  # [K, m, r]
    S_ptr,  # [N, K·r]
    tokens,
    height,
    width,
    first,
    TAPS: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIDE: tl.constexpr,
    STATE: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    # 64 bits: the offsets of large maps do not fit into 32.
    tap = (first + tl.program_id(1)).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK_TILE)
    rank_in = ranks < RANK
    inside = (rows < tokens)[:, None] & rank_in[None, :]
    mixed = _mix(
        u_ptr + tap * tokens * RANK,
        D_ptr + tap * (SIDE * SIDE * RANK),
        rows,
        tokens,
        height,
        width,
        False,
        RANK,
        SIDE,
        RANK_TILE,
    ).to(dtype)
    s = tl.zeros((ROWS, RANK_TILE), tl.float32)
    zero = tl.zeros((ROWS, HIDDEN_TILE), tl.float32)
    Q_ptr += tap * (RANK * HIDDEN)
    b_ptr += tap * HIDDEN
    U_ptr += tap * (RANK * HIDDEN)
    for start in range(0, HIDDEN, HIDDEN_TILE):
        Q, b, U = _load_slice(Q_ptr, b_ptr, U_ptr, start, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE)
        a = gelu(dot(mixed, Q, zero) + b[None, :])
        s = dot(a.to(dtype), tl.trans(U), s)
    at_S = rows[:, None] * (TAPS * RANK) + tap * RANK + ranks[None, :]
    tl.store(S_ptr + at_S, s.to(dtype), mask=inside)
    if STATE:
        at = rows[:, None] * RANK + ranks[None, :]
        state = tl.load(state_ptr + at, mask=inside, other=0.0) + s
        tl.store(state_ptr + at, state, mask=inside)
        # After the last adapter u is the state itself.
        more = tap + 1 < TAPS
        heard = tl.load(gamma_ptr + (tap + 1) * RANK + ranks, mask=rank_in & more, other=1.0)
        at += (tap + 1) * tokens * RANK
        t = tl.load(t_ptr + at, mask=inside & more, other=0.0)
        u = t.to(tl.float32) + heard.to(tl.float32)[None, :] * state
        tl.store(u_ptr + at, u.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens", "height", "width", "first"])
def rows_kernel(
    dS_ptr,  # [N, K·r]
    u_ptr,  # [K, N, r]
    dstate_ptr,  # [N, r]
    D_ptr,  # [K, side², r]
    gamma_ptr,  # [K, r]
    Q_ptr,  # [K, r, m]
    b_ptr,  # [K, m]
    U_ptr,  # [K, m, r]
    S_ptr,  # [N, K·r]
    ds_ptr,  # [N, K·r]: with a state
    mixed_ptr,  # [K, N, r]: with mixing
    dmixed_ptr,  # [K, N, r]: dt without mixing
    dt_ptr,  # [K, N, r]
    dbefore_ptr,  # [N, r]
    tokens,
    height,
    width,
    first,
    TAPS: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIDE: tl.constexpr,
    STATE: tl.constexpr,
    NEXT: tl.constexpr,  # gather the gradient of the adapter after this one
    OWN: tl.constexpr,  # there is this one
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    tap = (first + tl.program_id(1)).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK_TILE)
    rank_in = ranks < RANK
    inside = (rows < tokens)[:, None] & rank_in[None, :]
    at = rows[:, None] * RANK + ranks[None, :]
    if STATE:
        dstate = tl.load(dstate_ptr + at, mask=inside, other=0.0)
    if NEXT:
        next = tap + 1
        du = _mix(
            dmixed_ptr + next * tokens * RANK,
            D_ptr + next * (SIDE * SIDE * RANK),
            rows,
            tokens,
            height,
            width,
            True,
            RANK,
            SIDE,
            RANK_TILE,
        )
        if SIDE:
            tl.store(dt_ptr + next * tokens * RANK + at, du.to(dtype), mask=inside)
        if STATE:
            gamma = tl.load(gamma_ptr + next * RANK + ranks, mask=rank_in, other=0.0)
            dstate += gamma.to(tl.float32)[None, :] * du
    if OWN:
        at_tap = tap * tokens * RANK + at
        at_S = rows[:, None] * (TAPS * RANK) + tap * RANK + ranks[None, :]
        mixed = _mix(
            u_ptr + tap * tokens * RANK,
            D_ptr + tap * (SIDE * SIDE * RANK),
            rows,
            tokens,
            height,
            width,
            False,
            RANK,
            SIDE,
            RANK_TILE,
        ).to(dtype)
        if SIDE:
            tl.store(mixed_ptr + at_tap, mixed, mask=inside)
        ds = tl.load(dS_ptr + at_S, mask=inside, other=0.0)
        if STATE:
            ds = (ds.to(tl.float32) + dstate).to(dtype)
            tl.store(ds_ptr + at_S, ds, mask=inside)
        s = tl.zeros((ROWS, RANK_TILE), tl.float32)
        dmixed = tl.zeros((ROWS, RANK_TILE), tl.float32)
        zero = tl.zeros((ROWS, HIDDEN_TILE), tl.float32)
        Q_ptr += tap * (RANK * HIDDEN)
        b_ptr += tap * HIDDEN
        U_ptr += tap * (RANK * HIDDEN)
        for start in range(0, HIDDEN, HIDDEN_TILE):
            Q, b, U = _load_slice(Q_ptr, b_ptr, U_ptr, start, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE)
            a, slope = gelu_and_slope(dot(mixed, Q, zero) + b[None, :])
            s = dot(a.to(dtype), tl.trans(U), s)
            dz = dot(ds, U, zero) * slope
            dmixed = dot(dz.to(dtype), tl.trans(Q), dmixed)
        tl.store(S_ptr + at_S, s.to(dtype), mask=inside)
        tl.store(dmixed_ptr + at_tap, dmixed.to(dtype), mask=inside)
    if STATE:
        if OWN:
            tl.store(dstate_ptr + at, dstate, mask=inside)
        else:
            tl.store(dbefore_ptr + at, dstate.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens", "split_rows"])
def weights_kernel(
    mixed_ptr,  # [K, N, r]
    ds_ptr,  # [N, K·r]
    Q_ptr,  # [K, r, m]
    b_ptr,  # [K, m]
    U_ptr,  # [K, m, r]
    dQ_ptr,  # [splits, K, r, m]
    db_ptr,  # [splits, K, m]
    dU_ptr,  # [splits, K, m, r]
    tokens,
    split_rows,
    TAPS: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    dtype: tl.constexpr = mixed_ptr.dtype.element_ty
    tap = tl.program_id(2).to(tl.int64)
    slice_start = tl.program_id(1) * HIDDEN_TILE
    first_row = tl.program_id(0).to(tl.int64) * split_rows
    ranks = tl.arange(0, RANK_TILE)
    weights = tap * (RANK * HIDDEN)
    Q, b, U = _load_slice(
        Q_ptr + weights,
        b_ptr + tap * HIDDEN,
        U_ptr + weights,
        slice_start,
        RANK,
        HIDDEN,
        RANK_TILE,
        HIDDEN_TILE,
    )
    dQ = tl.zeros((RANK_TILE, HIDDEN_TILE), tl.float32)
    dU = tl.zeros((RANK_TILE, HIDDEN_TILE), tl.float32)
    db = tl.zeros((HIDDEN_TILE,), tl.float32)
    zero = tl.zeros((ROWS, HIDDEN_TILE), tl.float32)
    for step in range(0, split_rows, ROWS):
        rows = first_row + step + tl.arange(0, ROWS)
        inside = (rows < tokens)[:, None] & (ranks < RANK)[None, :]
        at = (tap * tokens + rows)[:, None] * RANK + ranks[None, :]
        at_S = rows[:, None] * (TAPS * RANK) + tap * RANK + ranks[None, :]
        mixed = tl.load(mixed_ptr + at, mask=inside, other=0.0)
        ds = tl.load(ds_ptr + at_S, mask=inside, other=0.0)
        a, slope = gelu_and_slope(dot(mixed, Q, zero) + b[None, :])
        # Rows past the end have ds = 0, and with it dz = 0: they add nothing.
        dz = dot(ds, U, zero) * slope
        dU = dot(tl.trans(ds), a.to(dtype), dU)
        dQ = dot(tl.trans(mixed), dz.to(dtype), dQ)
        db += tl.sum(dz, 0)
    hidden = slice_start + tl.arange(0, HIDDEN_TILE)
    hidden_in = hidden < HIDDEN
    inside = (ranks < RANK)[:, None] & hidden_in[None, :]
    part = tl.program_id(0) * TAPS + tap
    at = part * (RANK * HIDDEN)
    tl.store(dQ_ptr + at + ranks[:, None] * HIDDEN + hidden[None, :], dQ, mask=inside)
    tl.store(dU_ptr + at + hidden[None, :] * RANK + ranks[:, None], dU, mask=inside)
    tl.store(db_ptr + part * HIDDEN + hidden, db, mask=hidden_in)


@triton.jit(do_not_specialize=["tokens", "height", "width", "split_rows"])
def mixing_kernel(
    u_ptr,  # [K, N, r]
    dmixed_ptr,  # [K, N, r]
    dD_ptr,  # [splits, K, r, side²]
    tokens,
    height,
    width,
    split_rows,
    TAPS: tl.constexpr,
    RANK: tl.constexpr,
    SIDE: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    tap = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1)
    down = n // SIDE - SIDE // 2
    right = n % SIDE - SIDE // 2
    first_row = tl.program_id(0).to(tl.int64) * split_rows
    ranks = tl.arange(0, RANK_TILE)
    rank_in = ranks < RANK
    dD = tl.zeros((ROWS, RANK_TILE), tl.float32)
    for step in range(0, split_rows, ROWS):
        rows = first_row + step + tl.arange(0, ROWS)
        place = rows.to(tl.int32)
        column = place % width + right
        line = place // width % height + down
        inside = (rows < tokens) & (line >= 0) & (line < height) & (column >= 0) & (column < width)
        inside = inside[:, None] & rank_in[None, :]
        at = (tap * tokens + rows)[:, None] * RANK + ranks[None, :]
        dmixed = tl.load(dmixed_ptr + at, mask=inside, other=0.0)
        u = tl.load(u_ptr + at + (down * width + right) * RANK, mask=inside, other=0.0)
        dD += dmixed.to(tl.float32) * u.to(tl.float32)
    part = tl.program_id(0) * TAPS + tap
    at = (part * RANK + ranks) * (SIDE * SIDE) + n
    tl.store(dD_ptr + at, tl.sum(dD, 0), mask=rank_in)
