"""``highway_backward`` in Triton: the backward of a stage's K adapters from one gradient.

Products with the stage's gradient are the vendor's GEMMs (dS = G·Vᵀ, dV = Sᵀ·G, dc), and so is
dP_k = x_kᵀ·dt_k of taps kept in full; ``tap_gradient_kernel`` makes it from codes. What lies
between happens on chip, in two kernels that both recompute z = t·Q + b and a = GELU(z), so that
nothing of the hidden width m is ever written but gradients of parameters: ``rows_kernel`` sums over
m (S and dt), ``weights_kernel`` over tokens (dQ, db, dU).

Deterministic: the tokens are cut into parts, as many as their shape says, whatever the GPU; each
part is summed in order by one program, and the parts are added by one reduction. No atomics.

Bytes moved beside the GEMMs: t, dS read and S, dt written (8KNα in 16 bits); t and dS again per
slice of m; codes and scales read (KNC/2 + 4KN in int4) and dt again per slice of C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.common import architecture_of, dot, gelu, gelu_slope, padded_rank
from e3va.kernels.taps import decode, limit, parts

SPLITS = 64  # parts of the tokens at most
LEAST_ROWS = 128  # of a part: fewer are not worth sums of their own
PROGRAMS = 512  # fill a GPU: more parts than these take would cost memory alone


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


class TapTiles(NamedTuple):
    """Those of ``tap_gradient_kernel``."""

    rows: int
    channels: int
    num_warps: int


def tap_tiles(dtype: torch.dtype, architecture: int) -> TapTiles:
    """The largest tiles that do not spill, see ``python -m bench.registers``."""
    if architecture < 80:
        return TapTiles(16, 32, 4)
    return TapTiles(32, 32 if dtype == torch.float32 else 64, 4)


def splits_of(tokens: int, programs: int) -> int:
    """Parts of the tokens, each of them the work of ``programs``."""
    return min(SPLITS, triton.cdiv(tokens, LEAST_ROWS), triton.cdiv(PROGRAMS, programs))


def highway_backward(
    G: Tensor,  # [N, C]
    x: Sequence[Tensor],  # K × [N, C], or as stored
    scale: Sequence[Tensor],  # K × [N], or none
    taps: str,
    t: Sequence[Tensor],  # K × [N, r]
    P: Tensor,  # [K, C, r]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    V: Tensor,  # [K, r, C]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    adapters, rank, hidden = Q.shape
    tokens, channels = G.shape
    narrow = [weight.to(G.dtype).contiguous() for weight in (Q, b, U)]
    t_all = torch.stack(list(t))  # [K, N, r]
    dS = G @ V.flatten(0, 1).to(G).t()  # [N, K·r]
    S, dt = torch.empty_like(dS), torch.empty_like(t_all)
    tile = tiles(G.dtype, architecture_of(G.device), rank)
    slices = triton.cdiv(hidden, tile.hidden)
    splits = splits_of(tokens, slices * adapters)
    shapes = ((rank, hidden), (hidden,), (hidden, rank))
    dQ, db, dU = (
        torch.empty(splits, adapters, *shape, dtype=torch.float32, device=G.device)
        for shape in shapes
    )
    if tokens:
        sizes = {
            "TAPS": adapters,
            "RANK": rank,
            "HIDDEN": hidden,
            "RANK_TILE": padded_rank(rank),
            "ROWS": tile.rows,
            "HIDDEN_TILE": tile.hidden,
            "num_warps": tile.num_warps,
        }
        rows_kernel[(triton.cdiv(tokens, tile.rows), adapters)](
            t_all, dS, *narrow, S, dt, tokens, **sizes
        )
        weights_kernel[(splits, slices, adapters)](
            t_all,
            dS,
            *narrow,
            dQ,
            db,
            dU,
            tokens,
            triton.cdiv(triton.cdiv(tokens, splits), tile.rows) * tile.rows,
            **sizes,
        )
    if taps == "full":
        dP = [x_k.t() @ dt_k for x_k, dt_k in zip(x, dt, strict=True)]
    else:
        kept = zip(x, scale, dt, strict=True)
        dP = [tap_gradient(*kept_k, taps, channels) for kept_k in kept]
    dV = (S.t() @ G).view(adapters, rank, channels)
    dc = G.sum(0, dtype=torch.float32)
    return (
        torch.stack([dP_k.to(P.dtype) for dP_k in dP]),
        dQ.sum(0).to(Q.dtype),
        db.sum(0).to(b.dtype),
        dU.sum(0).to(U.dtype),
        dV.to(V.dtype),
        dc.to(V.dtype),
    )


def tap_gradient(
    codes: Tensor,  # [N, C], or as many bytes as hold C channels
    scale: Tensor,  # [N]
    dt: Tensor,  # [N, r]
    taps: str,
    channels: int,
) -> Tensor:
    """xᵀ·dt of a compressed tap, [C, r] in float32."""
    tokens, rank = dt.shape
    tile = tap_tiles(dt.dtype, architecture_of(dt.device))
    slices = triton.cdiv(codes.shape[1], tile.channels // parts(taps))
    splits = splits_of(tokens, slices)
    dP = dt.new_empty(splits, channels, rank, dtype=torch.float32)
    if tokens:
        tap_gradient_kernel[(splits, slices)](
            codes.contiguous().view(torch.uint8),
            scale.contiguous(),
            dt,
            dP,
            tokens,
            triton.cdiv(triton.cdiv(tokens, splits), tile.rows) * tile.rows,
            CHANNELS=channels,
            RANK=rank,
            FORMAT=taps,
            RANK_TILE=padded_rank(rank),
            ROWS=tile.rows,
            CHANNEL_TILE=tile.channels,
            num_warps=tile.num_warps,
        )
    return dP.sum(0)


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


@triton.jit
def tap_gradient_kernel(
    codes_ptr,  # [N, bytes]
    scale_ptr,  # [N]
    dt_ptr,  # [N, r]
    dP_ptr,  # [splits, C, r]
    tokens,
    split_rows,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    FORMAT: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    dtype: tl.constexpr = dt_ptr.dtype.element_ty
    PARTS: tl.constexpr = parts(FORMAT)
    BYTES: tl.constexpr = (CHANNELS + PARTS - 1) // PARTS
    BYTE_TILE: tl.constexpr = CHANNEL_TILE // PARTS
    # dt·scale, of fewer columns than x, would be lost in float16: all grids get int4's steps.
    GAIN: tl.constexpr = limit(FORMAT) / limit("int4")
    first = tl.program_id(0).to(tl.int64) * split_rows
    start = tl.program_id(1) * BYTE_TILE
    bytes_ = start + tl.arange(0, BYTE_TILE)
    ranks = tl.arange(0, RANK_TILE)
    rank_in = ranks < RANK
    dP = tl.zeros((CHANNEL_TILE, RANK_TILE), tl.float32)
    for step in range(0, split_rows, ROWS):
        rows = first + step + tl.arange(0, ROWS)
        row_in = rows < tokens
        codes = tl.load(
            codes_ptr + rows[:, None] * BYTES + bytes_[None, :],
            mask=row_in[:, None] & (bytes_ < BYTES)[None, :],
            other=0,
        )
        if PARTS == 2:
            codes = tl.interleave(codes & 15, codes >> 4)
        scale = tl.load(scale_ptr + rows, mask=row_in, other=0.0)
        # Rows past the end have dt = 0: they add nothing.
        dt = tl.load(
            dt_ptr + rows[:, None] * RANK + ranks[None, :],
            mask=row_in[:, None] & rank_in[None, :],
            other=0.0,
        )
        dt = (dt.to(tl.float32) * (scale * GAIN)[:, None]).to(dtype)
        dP = dot(tl.trans(decode(codes, FORMAT).to(dtype)), dt, dP)
    # The channels of a byte lie side by side in the tile, and BYTES apart in x.
    column = tl.arange(0, CHANNEL_TILE)
    byte = start + column // PARTS
    channels = column % PARTS * BYTES + byte
    inside = ((byte < BYTES) & (channels < CHANNELS))[:, None] & rank_in[None, :]
    at = tl.program_id(0) * (CHANNELS * RANK) + channels[:, None] * RANK + ranks[None, :]
    tl.store(dP_ptr + at, dP / GAIN, mask=inside)
