"""``tap_gradient`` in Triton: dP_k = tap_kᵀ·dt_k of all taps of a stage, as they were kept.

Taps kept in full are the vendor's GEMM. Codes are decoded on chip, in one launch: a program sums
one part of the tokens of a tap for one slice of the channels, in order; the parts are then added by
one reduction. No atomics: the same bits on every run.

Bytes moved: codes and scales read (KN(C/2 + 4) in int4), dt per slice of C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.common import architecture_of, dot, padded_rank, part_rows, splits_of
from e3va.kernels.storage import decode, limit, parts, place_of
from e3va.ops.backends import reference

WORD = 4  # bytes


class Tiles(NamedTuple):
    """Sizes of what a program holds, and its warps."""

    rows: int
    channels: int
    num_warps: int


def tiles(dtype: torch.dtype, architecture: int, channels: int, rank: int) -> Tiles:
    """Tiles of as many channels as spill nowhere, see ``python -m bench.registers``: every slice of
    the channels reads and scales dt anew."""
    turing = architecture < 80
    rows = 16 if turing else 32
    if dtype == torch.float32:
        return Tiles(rows, 32, 4)
    most = (2048 if turing else 4096) // padded_rank(rank)
    return Tiles(rows, min(most, max(16, triton.next_power_of_2(channels))), 4)


def tap_gradient(
    taps: Sequence[Tensor] | Tensor,  # K × [N, C], or as kept, [K, N, bytes]
    scale: Tensor | None,  # [K, N]
    storage: str,
    dt: Tensor,  # [K, N, r]
    channels: int,
) -> Tensor:
    if scale is None or not isinstance(taps, Tensor):  # nothing to decode: GEMMs
        return reference.tap_gradient(taps, scale, storage, dt, channels)
    K, tokens, rank = dt.shape
    dP = dt.new_empty(K, channels, rank, dtype=torch.float32)
    if not tokens:
        return dP.zero_()
    codes = taps.contiguous().view(torch.uint8)
    if codes.shape[-1] % WORD or codes.storage_offset() % WORD:
        codes = F.pad(codes, (0, -codes.shape[-1] % WORD))
    tile = tiles(dt.dtype, architecture_of(dt.device), channels, rank)
    slices = triton.cdiv(codes.shape[-1], tile.channels // parts(storage))
    splits = splits_of(tokens, K * slices)
    sums = dP[:, None] if splits == 1 else dP.new_empty(K, splits, channels, rank)
    tap_gradient_kernel[splits, slices, K](
        codes.view(torch.uint32),
        scale.contiguous(),
        dt.contiguous(),
        sums,
        tokens,
        part_rows(tokens, splits, tile.rows),
        CHANNELS=channels,
        RANK=rank,
        STORAGE=storage,
        RANK_TILE=padded_rank(rank),
        ROWS=tile.rows,
        CHANNEL_TILE=tile.channels,
        num_warps=tile.num_warps,
    )
    return dP if splits == 1 else torch.sum(sums, 1, out=dP)


@triton.jit(do_not_specialize=["tokens", "split_rows"])
def tap_gradient_kernel(
    words_ptr,  # [K, N, ⌈bytes/4⌉]
    scale_ptr,  # [K, N]
    dt_ptr,  # [K, N, r]
    dP_ptr,  # [K, splits, C, r]
    tokens,
    split_rows,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    STORAGE: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    dtype: tl.constexpr = dt_ptr.dtype.element_ty
    HALF: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    PARTS: tl.constexpr = parts(STORAGE)
    BYTES: tl.constexpr = (CHANNELS + PARTS - 1) // PARTS
    WORDS: tl.constexpr = (BYTES + 3) // 4
    WORD_TILE: tl.constexpr = CHANNEL_TILE // (4 * PARTS)
    # dt·scale, of fewer columns than x, would be lost in float16: all grids get int4's steps.
    GAIN: tl.constexpr = limit(STORAGE) / limit("int4")
    k = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * split_rows
    start = tl.program_id(1) * WORD_TILE
    words = start + tl.arange(0, WORD_TILE)
    ranks = tl.arange(0, RANK_TILE)
    rank_in = ranks < RANK
    dP = tl.zeros((CHANNEL_TILE, RANK_TILE), tl.float32)
    for step in range(0, split_rows, ROWS):
        rows = first + step + tl.arange(0, ROWS)
        row_in = rows < tokens
        rows += k * tokens
        word = tl.load(
            words_ptr + rows[:, None] * WORDS + words[None, :],
            mask=row_in[:, None] & (words < WORDS)[None, :],
            other=0,
        )
        scale = tl.load(scale_ptr + rows, mask=row_in, other=0.0)
        # Rows past the end have dt = 0: they add nothing.
        dt = tl.load(
            dt_ptr + rows[:, None] * RANK + ranks[None, :],
            mask=row_in[:, None] & rank_in[None, :],
            other=0.0,
        )
        dt = (dt.to(tl.float32) * (scale * GAIN)[:, None]).to(dtype)
        dP = dot(tl.trans(decode(word, STORAGE, HALF).to(dtype)), dt, dP)
    # The channels of a byte lie BYTES apart in x.
    byte, part = place_of(tl.arange(0, CHANNEL_TILE), STORAGE)
    byte += 4 * start
    channels = part * BYTES + byte
    inside = ((byte < BYTES) & (channels < CHANNELS))[:, None] & rank_in[None, :]
    part_of_tap = k * tl.num_programs(0) + tl.program_id(0)
    at = (part_of_tap * CHANNELS + channels[:, None]) * RANK + ranks[None, :]
    tl.store(dP_ptr + at, dP / GAIN, mask=inside)
