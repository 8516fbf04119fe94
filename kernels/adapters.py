"""``adapters`` and ``adapters_backward`` in Triton: the hidden half of a stage's K adapters.

A program owns a few rows of the map, flattened. It reads u_k there and around, mixes, and goes
through the hidden width m a slice at a time, so that nothing of width m is ever written but
gradients of parameters. A state orders the adapters: each is a launch of its own, whose end makes
the next one's u, for all its neighbours to read. Without a state one launch serves all K.

Backward runs from the last adapter to the first, in K + 1 launches with a state: what the
neighbours of a row contribute to its gradient, and with it to D's, is gathered when all of them are
done, together with the work on the adapter before. There z, a and the slope of GELU are made once,
for all gradients; sums over rows are products of matrices, dD the diagonal of one, which tensor
cores make in fewer instructions than warps need to exchange what they hold.

Deterministic: a tile of rows is a part of the tokens, which one program sums in order; the parts
are added by one reduction. No atomics.

Bytes moved in 16 bits, where what is read around a row comes from cache: forward t and u read, u
and S written (8KNα), the state (8KNα); backward dS, u twice and the gradient of mixed read, S, that
gradient and dt written (14KNα), the gradient of the state (8KNα). In codes u is one byte, beside
the forward's own, which then are two adapters' alone. The sums of a part, 4(2α + 1)m, are written
and read, a few adapters' at a time: they stay in a cache that holds ``ROOM``, and weigh 8(2α + 1)m
per ``rows`` tokens where there is none.
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
    sum_of_rows,
)
from e3va.kernels.fold import fold, fold_backward
from e3va.kernels.storage import encode, magnitude, scales

ROOM = 12 << 20  # bytes for the sums of parts: of as many adapters as that holds


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


def backward_tiles(dtype: torch.dtype, architecture: int, rank: int, side: int) -> Tiles:
    """Those of ``adapters_backward_kernel``; nothing spills. Parts are larger, and fewer, where
    their sums outgrow the cache (sm_86)."""
    if dtype == torch.float32:
        if rank > 32:
            return Tiles(16, 16, 4)
        if architecture >= 86:
            return Tiles(128, 16, 8)
        return Tiles(32, 16, 4) if side > 5 and architecture < 80 else Tiles(64, 16, 8)
    if architecture < 80:
        return Tiles(16, 16, 8) if rank > 32 else Tiles(64, 32, 4)
    if rank > 32:
        return Tiles(32, 32, 8)
    if architecture == 86:
        return Tiles(128, 64, 8)
    return Tiles(64, 32, 4) if side > 5 else Tiles(64, 64, 4)


def adapters(
    t: Tensor,  # [K, N, r]
    carry: Tensor | None,  # [N, r]
    D: Tensor | None,  # [K, r, side, side]
    gamma: Tensor | None,  # [K, r]
    g: Tensor,  # [K, branches, d, d]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    g_up: Tensor,  # [K, branches, d, d]
    size: tuple[int, int],
    storage: str = "full",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = t.contiguous()
    (K, tokens, rank), state, coded = t.shape, gamma is not None, storage != "full"
    S = t.new_empty(tokens, K * rank)
    after = t.new_empty((tokens, rank) if state else 0)
    # Where codes are kept, u is read by one adapter, while the next one's is written.
    slots = 2 if state and coded else K
    u = t.new_empty((slots, tokens, rank) if state else 0)
    codes = t.new_empty(t.shape if coded else 0, dtype=torch.int8)
    scale = t.new_empty(t.shape[:2] if coded else 0, dtype=torch.float32)
    results = S, after, codes if coded else u, scale
    if not tokens:
        return results
    heard = S
    if gamma is not None:
        heard = _state(carry, t[0])
        if carry is None:  # the first adapter hears nothing
            u[0].copy_(t[0])
        else:
            torch.addcmul(t[0], gamma[0].to(heard), heard, out=u[0])
    tile = forward_tiles(t.dtype, architecture_of(t.device), rank)
    grid = triton.cdiv(tokens, tile.rows), 1 if state else K
    D_in, Q_in, U_in = fold(D, g, Q, U, g_up, t.dtype)
    for k in range(K // grid[1]):
        adapters_kernel[grid](
            t,
            u if state else t,
            heard,
            D_in,
            _given(gamma, S),
            Q_in,
            b.contiguous(),
            U_in,
            S,
            after,
            codes.view(torch.uint8),
            scale,
            tokens,
            *size,
            k,
            **_sizes(Q, D, tile),
            STATE=state,
            CODED=coded,
            SLOTS=slots,
        )
    return results


def adapters_backward(
    dS: Tensor,  # [N, K·r]
    dcarry: Tensor | None,  # [N, r]
    u: Tensor,  # [K, N, r]
    scale: Tensor | None,  # [K, N], of u in int8
    D: Tensor | None,  # [K, r, side, side]
    gamma: Tensor | None,  # [K, r]
    g: Tensor,  # [K, branches, d, d]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    g_up: Tensor,  # [K, branches, d, d]
    size: tuple[int, int],
) -> tuple[Tensor, ...]:
    dS, u = dS.contiguous(), u.contiguous()
    (K, rank, hidden), tokens = Q.shape, len(dS)
    state, side = gamma is not None, 0 if D is None else D.shape[-1]
    tile = backward_tiles(dS.dtype, architecture_of(dS.device), rank, side)
    parts = triton.cdiv(tokens, tile.rows)
    weights = hidden * (2 * rank + 1)
    group = max(1, min(K, ROOM // (4 * max(1, parts) * weights)))
    S, dt = torch.empty_like(dS), dS.new_empty(K, tokens, rank)
    dmixed = dt if D is None else torch.empty_like(dt)  # the same where nothing is mixed
    dbefore = dS.new_empty((tokens, rank) if state else 0)
    sums = dS.new_empty(group, parts, weights, dtype=torch.float32)
    totals = sums.new_empty(K, weights)
    mixing_sums = sums.new_empty(parts, K, side * side, rank)
    D_in, Q_in, U_in = fold(D, g, Q, U, g_up, dS.dtype)
    arguments = (
        dS,
        u,
        _given(scale, S),
        _state(dcarry, dt[0]) if state else S,
        D_in,
        _given(gamma, S),
        Q_in,
        b.contiguous(),
        U_in,
        S,
        dmixed,
        dt,
        dbefore,
        mixing_sums,
    )

    def launch(sums: Tensor, first: int, count: int, *, gather: bool, own: bool = True) -> None:
        if tokens:
            adapters_backward_kernel[parts, count](
                *arguments,
                sums,
                tokens,
                *size,
                first,
                **_sizes(Q, D, tile),
                STATE=state,
                CODED=scale is not None,
                NEXT=gather,
                OWN=own,
            )

    for first in reversed(range(0, K, group)):
        end = min(K, first + group)
        if state:
            for k in reversed(range(first, end)):
                launch(sums[k - first], k, 1, gather=k + 1 < K)
        else:
            launch(sums, first, end - first, gather=False)
        torch.sum(sums[: end - first], 1, out=totals[first:end])
    if state or side:
        launch(sums, -1, 1 if state else K, gather=True, own=False)
    mixing_totals = totals if D is None else mixing_sums.sum(0)
    return S, dt, dbefore, *fold_backward(totals, mixing_totals, D, g, Q, U, g_up)


def _state(begin: Tensor | None, like: Tensor) -> Tensor:
    """A copy of [N, r] in float32, or zeros: kernels change it."""
    if begin is None:
        return torch.zeros_like(like, dtype=torch.float32)
    return begin.to(torch.float32, copy=True).contiguous()


def _given(values: Tensor | None, absent: Tensor) -> Tensor:
    """What is absent is neither read nor written."""
    return absent if values is None else values.contiguous()


def _sizes(Q: Tensor, D: Tensor | None, tile: Tiles) -> dict[str, Any]:
    K, rank, hidden = Q.shape
    return {
        "ADAPTERS": K,
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
def _mix(
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
    total = _load(values_ptr, scale_ptr, at, rows, own_in, row_in, OF_U, DTYPE).to(tl.float32)
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
                    DTYPE,
                )
                total += D[None, :] * around.to(tl.float32)
                if BACKWARD:
                    _store_products(dD_ptr + n * RANK, around, u, RANK, RANK_TILE)
    return total


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


@triton.jit
def _store_sums(sums_ptr, x, column_in, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ x over rows, [rows, columns] → [columns]: xᵀ·1, where there are tensor cores."""
    columns = tl.arange(0, COLUMNS)
    if x.dtype == tl.float32:
        tl.store(sums_ptr + columns, sum_of_rows(x), mask=column_in)
    else:
        copies = tl.arange(0, 16)[None, :]  # the least that is multiplied
        sums = dot(
            tl.trans(x),
            tl.full((ROWS, 16), 1.0, tl.float32).to(x.dtype),
            tl.zeros((COLUMNS, 16), tl.float32),
        )
        first = column_in[:, None] & (copies == 0)
        tl.store(sums_ptr + columns[:, None] + copies, sums, mask=first)


@triton.jit(do_not_specialize=["tokens", "height", "width", "first"])
def adapters_kernel(
    t_ptr,  # [K, N, r]
    u_ptr,  # [slots, N, r], or t without a state
    state_ptr,  # [N, r]
    D_ptr,  # [K, side², r]
    gamma_ptr,  # [K, r]
    Q_ptr,  # [K, r, m]
    b_ptr,  # [K, m]
    U_ptr,  # [K, m, r]
    S_ptr,  # [N, K·r]
    after_ptr,  # [N, r]
    codes_ptr,  # [K, N, r]
    scale_ptr,  # [K, N]
    tokens,
    height,
    width,
    first,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIDE: tl.constexpr,
    STATE: tl.constexpr,
    CODED: tl.constexpr,  # u is kept in codes
    SLOTS: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    # 64 bits: the offsets of large maps do not fit into 32.
    adapter = (first + tl.program_id(1)).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK_TILE)
    rank_in = ranks < RANK
    inside = (rows < tokens)[:, None] & rank_in[None, :]
    at = rows[:, None] * RANK + ranks[None, :]
    read_ptr = u_ptr + adapter % SLOTS * tokens * RANK
    if CODED:
        u = tl.load(read_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inverse, scale = scales(tl.max(magnitude(u), 1), "int8")
        tl.store(scale_ptr + adapter * tokens + rows, scale, mask=rows < tokens)
        code = encode(u, inverse[:, None], 0, "int8")
        tl.store(codes_ptr + adapter * tokens * RANK + at, code.to(tl.uint8), mask=inside)
    mixed = _mix(
        read_ptr,
        D_ptr + adapter * (SIDE * SIDE * RANK),
        None,
        None,
        None,
        rows,
        tokens,
        height,
        width,
        dtype,
        False,
        False,
        RANK,
        SIDE,
        RANK_TILE,
    ).to(dtype)
    s = tl.zeros((ROWS, RANK_TILE), tl.float32)
    zero = tl.zeros((ROWS, HIDDEN_TILE), tl.float32)
    Q_ptr += adapter * (RANK * HIDDEN)
    b_ptr += adapter * HIDDEN
    U_ptr += adapter * (RANK * HIDDEN)
    for start in range(0, HIDDEN, HIDDEN_TILE):
        Q, b, U = _load_slice(Q_ptr, b_ptr, U_ptr, start, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE)
        a = gelu(dot(mixed, Q, zero) + b[None, :])
        s = dot(a.to(dtype), tl.trans(U), s)
    at_S = rows[:, None] * (ADAPTERS * RANK) + adapter * RANK + ranks[None, :]
    tl.store(S_ptr + at_S, s.to(dtype), mask=inside)
    if STATE:
        state = tl.load(state_ptr + at, mask=inside, other=0.0) + s
        next = adapter + 1
        more = inside & (next < ADAPTERS)
        tl.store(state_ptr + at, state, mask=more)
        tl.store(after_ptr + at, state.to(dtype), mask=inside & (next == ADAPTERS))
        heard = tl.load(
            gamma_ptr + next * RANK + ranks, mask=rank_in & (next < ADAPTERS), other=0.0
        )
        t = tl.load(t_ptr + next * tokens * RANK + at, mask=more, other=0.0)
        u = t.to(tl.float32) + heard.to(tl.float32)[None, :] * state
        tl.store(u_ptr + next % SLOTS * tokens * RANK + at, u.to(dtype), mask=more)


@triton.jit(do_not_specialize=["tokens", "height", "width", "first"])
def adapters_backward_kernel(
    dS_ptr,  # [N, K·r]
    u_ptr,  # [K, N, r]
    scale_ptr,  # [K, N], of u in codes
    dstate_ptr,  # [N, r]
    D_ptr,  # [K, side², r]
    gamma_ptr,  # [K, r]
    Q_ptr,  # [K, r, m]
    b_ptr,  # [K, m]
    U_ptr,  # [K, m, r]
    S_ptr,  # [N, K·r]
    dmixed_ptr,  # [K, N, r]: dt without mixing
    dt_ptr,  # [K, N, r]
    dbefore_ptr,  # [N, r]
    dD_ptr,  # [parts, K, side², r]
    sums_ptr,  # [adapters of the launch, parts, m·r + m·r + m]: dQᵀ, dU, db
    tokens,
    height,
    width,
    first,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIDE: tl.constexpr,
    STATE: tl.constexpr,
    CODED: tl.constexpr,  # u is in codes
    NEXT: tl.constexpr,  # gather the gradient of the adapter after this one
    OWN: tl.constexpr,  # there is this one
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    dtype: tl.constexpr = dS_ptr.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    adapter = (first + tl.program_id(1)).to(tl.int64)
    rows = part * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK_TILE)
    rank_in = ranks < RANK
    inside = (rows < tokens)[:, None] & rank_in[None, :]
    at = rows[:, None] * RANK + ranks[None, :]
    if STATE:
        dstate = tl.load(dstate_ptr + at, mask=inside, other=0.0)
    if NEXT:
        next = adapter + 1
        du = _mix(
            dmixed_ptr + next * tokens * RANK,
            D_ptr + next * (SIDE * SIDE * RANK),
            u_ptr + next * tokens * RANK,
            scale_ptr + next * tokens,
            dD_ptr + (part * ADAPTERS + next) * (SIDE * SIDE * RANK),
            rows,
            tokens,
            height,
            width,
            dtype,
            CODED,
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
    if STATE:
        if OWN:
            tl.store(dstate_ptr + at, dstate, mask=inside)
        else:
            tl.store(dbefore_ptr + at, dstate.to(dtype), mask=inside)
    if OWN:
        at_adapter = adapter * tokens * RANK + at
        at_S = rows[:, None] * (ADAPTERS * RANK) + adapter * RANK + ranks[None, :]
        mixed = _mix(
            u_ptr + adapter * tokens * RANK,
            D_ptr + adapter * (SIDE * SIDE * RANK),
            u_ptr,
            scale_ptr + adapter * tokens,
            u_ptr,
            rows,
            tokens,
            height,
            width,
            dtype,
            CODED,
            False,
            RANK,
            SIDE,
            RANK_TILE,
        ).to(dtype)
        ds = tl.load(dS_ptr + at_S, mask=inside, other=0.0)
        if STATE:
            ds = (ds.to(tl.float32) + dstate).to(dtype)
        s = tl.zeros((ROWS, RANK_TILE), tl.float32)
        dmixed = tl.zeros((ROWS, RANK_TILE), tl.float32)
        zero = tl.zeros((ROWS, HIDDEN_TILE), tl.float32)
        none = tl.zeros((HIDDEN_TILE, RANK_TILE), tl.float32)
        Q_ptr += adapter * (RANK * HIDDEN)
        b_ptr += adapter * HIDDEN
        U_ptr += adapter * (RANK * HIDDEN)
        dQ_ptr = sums_ptr + (tl.program_id(1) * tl.num_programs(0) + part) * (
            HIDDEN * (2 * RANK + 1)
        )
        dU_ptr = dQ_ptr + HIDDEN * RANK
        db_ptr = dU_ptr + HIDDEN * RANK
        for start in tl.range(0, HIDDEN, HIDDEN_TILE, num_stages=2):
            Q, b, U = _load_slice(Q_ptr, b_ptr, U_ptr, start, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE)
            a, slope = gelu_and_slope(dot(mixed, Q, zero) + b[None, :])
            a = a.to(dtype)
            s = dot(a, tl.trans(U), s)
            # Rows past the end have ds = 0, and with it dz = 0: they add nothing.
            dz = (dot(ds, U, zero) * slope).to(dtype)
            dmixed = dot(dz, tl.trans(Q), dmixed)
            hidden = start + tl.arange(0, HIDDEN_TILE)
            hidden_in = hidden < HIDDEN
            slice = hidden[:, None] * RANK + ranks[None, :]
            slice_in = hidden_in[:, None] & rank_in[None, :]
            tl.store(dQ_ptr + slice, dot(tl.trans(dz), mixed, none), mask=slice_in)
            tl.store(dU_ptr + slice, dot(tl.trans(a), ds, none), mask=slice_in)
            _store_sums(db_ptr + start, dz, hidden_in, ROWS, HIDDEN_TILE)
        tl.store(S_ptr + at_S, s.to(dtype), mask=inside)
        tl.store(dmixed_ptr + at_adapter, dmixed.to(dtype), mask=inside)
