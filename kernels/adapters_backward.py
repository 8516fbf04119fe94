"""``adapters_backward`` in Triton, as :mod:`e3va.kernels.adapters` is.

Runs from the last adapter to the first, in K + 1 launches with a state: what the neighbours of a
row contribute to its gradient, and with it to D's, is gathered when all of them are done, together
with the work on the adapter before. There z, a and the slope of GELU are made once, for all
gradients; sums over rows are products of matrices, dD the diagonal of one, which tensor cores make
in fewer instructions than warps need to exchange what they hold.

Deterministic: a tile of rows is a part of the tokens, which one program sums in order; the parts
are added by one reduction. No atomics.

Bytes moved in 16 bits, where what is read around a row comes from cache: dS, u twice and the
gradient of mixed read, S, that gradient and dt written (14KNα), the gradient of the state (8KNα).
In codes u is one byte. The sums of a part, 4(2α + 1)m, are written and read, a few adapters' at a
time: they stay in a cache that holds ``ROOM``, and weigh 8(2α + 1)m per ``rows`` tokens where there
is none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.adapters import Tiles, given, load_slice, sizes, state_from
from e3va.kernels.common import architecture_of, dot, gelu_and_slope, sum_of_rows
from e3va.kernels.fold import fold, fold_backward
from e3va.kernels.mixing import mix

ROOM = 12 << 20  # bytes for the sums of parts: of as many adapters as that holds


def backward_tiles(dtype: torch.dtype, architecture: int, rank: int, side: int) -> Tiles:
    """Those of ``adapters_backward_kernel``; nothing spills. Parts are larger, and fewer, where
    their sums outgrow the cache (sm_86)."""
    if dtype == torch.float32:
        if rank > 32:
            return Tiles(16, 16, 4)
        if architecture >= 86:
            return Tiles(128, 16, 8) if side else Tiles(64, 16, 8)
        return Tiles(32, 16, 4) if side > 5 and architecture < 80 else Tiles(64, 16, 8)
    if architecture < 80:
        if rank > 32:
            return Tiles(16, 16, 8)
        return Tiles(32 if side > 5 else 64, 32, 4)
    if rank > 32:
        return Tiles(32, 32, 8)
    if architecture == 86:
        return Tiles(128, 64, 8)
    return Tiles(64, 64, 4)


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
        given(scale, S),
        state_from(dcarry, dt[0]) if state else S,
        D_in,
        given(gamma, S),
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
                **sizes(Q, D, tile),
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
        du = mix(
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
        mixed = mix(
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
            Q, b, U = load_slice(Q_ptr, b_ptr, U_ptr, start, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE)
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


@triton.jit
def _store_sums(sums_ptr, x, column_in, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ x over rows, [rows, columns] → [columns]: xᵀ·1, where there are tensor cores."""
    columns = tl.arange(0, COLUMNS)
    if x.dtype == tl.float32:
        tl.store(sums_ptr + columns, sum_of_rows(x), mask=column_in)
    else:
        copies: tl.constexpr = 16  # the least that is multiplied
        sums = dot(
            tl.trans(x),
            tl.full((ROWS, copies), 1.0, tl.float32).to(x.dtype),
            tl.zeros((COLUMNS, copies), tl.float32),
        )
        tl.store(sums_ptr + columns, tl.max(sums, 1), mask=column_in)
