"""``adapters`` in Triton: the hidden half of a stage's K adapters.

A program owns a few rows of the map, flattened. It reads u_k there and around, mixes, and goes
through the hidden width m a slice at a time, so that nothing of width m is ever written but
gradients of parameters. A state orders the adapters: each is a launch of its own, whose end makes
the next one's u, for all its neighbours to read. Without a state one launch serves all K.

Bytes moved in 16 bits, where what is read around a row comes from cache: t and u read, u and S
written (8KNα), the state (8KNα). In codes u is one byte, beside the forward's own, which then are
two adapters' alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.common import architecture_of, dot, gelu, padded_rank
from e3va.kernels.fold import fold
from e3va.kernels.mixing import mix
from e3va.kernels.storage import encode, magnitude, scales


class Tiles(NamedTuple):
    """Sizes of what a program holds, and its warps."""

    rows: int
    hidden: int
    num_warps: int


def forward_tiles(dtype: torch.dtype, architecture: int, rank: int, side: int) -> Tiles:
    """The fastest tiles on an H100 that spill nowhere, see ``python -m bench.registers``. Tensor
    cores multiply 16 rows: with fewer for each warp, warps would do the same work."""
    if dtype == torch.float32 or architecture < 80:
        return Tiles(16, 32, 4)
    if rank > 32:
        return Tiles(32, 32, 4)
    return Tiles(16, 32, 1) if side > 5 else Tiles(16, 64, 1)


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
        heard = state_from(carry, t[0])
        if carry is None:  # the first adapter hears nothing
            u[0].copy_(t[0])
        else:
            torch.addcmul(t[0], gamma[0].to(heard), heard, out=u[0])
    side = 0 if D is None else D.shape[-1]
    tile = forward_tiles(t.dtype, architecture_of(t.device), rank, side)
    grid = triton.cdiv(tokens, tile.rows), 1 if state else K
    D_in, Q_in, U_in = fold(D, g, Q, U, g_up, t.dtype)
    for k in range(K // grid[1]):
        adapters_kernel[grid](
            t,
            u if state else t,
            heard,
            D_in,
            given(gamma, S),
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
            **sizes(Q, D, tile),
            STATE=state,
            CODED=coded,
            SLOTS=slots,
        )
    return results


def state_from(begin: Tensor | None, like: Tensor) -> Tensor:
    """A copy of [N, r] in float32, or zeros: kernels change it."""
    if begin is None:
        return torch.zeros_like(like, dtype=torch.float32)
    return begin.to(torch.float32, copy=True).contiguous()


def given(values: Tensor | None, absent: Tensor) -> Tensor:
    """What is absent is neither read nor written."""
    return absent if values is None else values.contiguous()


def sizes(Q: Tensor, D: Tensor | None, tile: Tiles) -> dict[str, Any]:
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
def load_slice(
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
    mixed = mix(
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
        Q, b, U = load_slice(Q_ptr, b_ptr, U_ptr, start, RANK, HIDDEN, RANK_TILE, HIDDEN_TILE)
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
