"""``tap_gradient`` in Triton: dP_k = tap_kᵀ·dt_k of all taps of a stage, as they were kept.

Taps kept in full are the vendor's GEMM. Codes are decoded on chip: each tap is one launch, in
which a program sums one part of the tokens for one slice of the channels, in order; the parts of
several taps are then added by one reduction. No atomics: the same bits on every run.

Bytes moved: codes and scales read (KN(C/2 + 4) in int4), dt per slice of C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.common import architecture_of, dot, padded_rank, part_rows, splits_of
from e3va.kernels.taps import decode, limit, parts
from e3va.ops import reference

ROOM = 8 << 20  # bytes for the sums of parts: of as many taps as that holds


class Tiles(NamedTuple):
    """Sizes of what a program holds, and its warps."""

    rows: int
    channels: int
    num_warps: int


def tiles(dtype: torch.dtype, architecture: int) -> Tiles:
    """The fastest tiles on an H100 that spill nowhere, see ``python -m bench.registers``."""
    if architecture < 80:
        return Tiles(16, 32, 4)
    return Tiles(32, 32, 4) if dtype == torch.float32 else Tiles(64, 64, 4)


def tap_gradient(
    tap: Sequence[Tensor],  # K × [N, C], or as kept
    scale: Sequence[Tensor],  # K × [N], or none
    taps: str,
    dt: Tensor,  # [K, N, r]
    channels: int,
) -> Tensor:
    if taps == "full":  # nothing to decode: GEMMs
        return reference.tap_gradient(tap, scale, taps, dt, channels)
    dt = dt.contiguous()
    K, tokens, rank = dt.shape
    dP = dt.new_empty(K, channels, rank, dtype=torch.float32)
    if not tokens:
        return dP.zero_()
    tile = tiles(dt.dtype, architecture_of(dt.device))
    slices = triton.cdiv(tap[0].shape[1], tile.channels // parts(taps))
    splits = splits_of(tokens, slices)
    group = max(1, ROOM // (4 * splits * channels * rank))
    sums = dP.new_empty(min(K, group), splits, channels, rank)
    for first in range(0, K, group):
        members = range(first, min(K, first + group))
        for k in members:
            tap_gradient_kernel[splits, slices](
                tap[k].contiguous().view(torch.uint8),
                scale[k].contiguous(),
                dt[k],
                sums[k - first],
                tokens,
                part_rows(tokens, splits, tile.rows),
                CHANNELS=channels,
                RANK=rank,
                FORMAT=taps,
                RANK_TILE=padded_rank(rank),
                ROWS=tile.rows,
                CHANNEL_TILE=tile.channels,
                num_warps=tile.num_warps,
            )
        torch.sum(sums[: len(members)], 1, out=dP[first : first + len(members)])
    return dP


@triton.jit(do_not_specialize=["tokens", "split_rows"])
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
    part = tl.program_id(0).to(tl.int64)
    at = (part * CHANNELS + channels[:, None]) * RANK + ranks[None, :]
    tl.store(dP_ptr + at, dP / GAIN, mask=inside)
