"""``sublayer_epilogue`` in Triton: residual add, LayerNorm, an adapter's tap projected and kept.

A program owns a few rows of the map and runs over their channels, each time but the first reading
from cache. The first pass adds, gathers the statistics of the norm and, of a tap that is the
sub-layer's output, projects it down and finds its largest value; the next one normalises and, of a
tap that is the norm, does the same. Codes need the largest value first: they are made with the norm
where the tap is the output, else in a third pass.

Bytes moved: x and y read, y' and its norm written (8NC in 16 bits), t written (2Nα), codes and
their scales written (NC/2 + 4N in int4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.common import architecture_of, dot, padded_rank
from e3va.kernels.storage import encode, hash, magnitude, parts, scales
from e3va.ops.storage import int32, room


class Tiles(NamedTuple):
    """Sizes of what a program holds, of what it codes at a time, and its warps."""

    rows: int
    channels: int
    coded: int
    num_warps: int


def tiles(dtype: torch.dtype, architecture: int, tap: str, storage: str) -> Tiles:
    """The fastest tiles on an H100 that spill nowhere, but for what is coded at a time, which no
    GPU has timed: see ``python -m bench.registers``.

    Args:
        dtype: that of the map.
        architecture: 75 for sm_75, and so on.
        tap: what it is, or "none".
        storage: how the tap is kept; a tile of int4's bytes has half as many channels, twice.
    """
    rows, channels, num_warps = 16, 128, 4
    if dtype == torch.float32:
        channels = 64
    elif architecture < 80:
        channels, num_warps = 64, 8
    coded = channels // parts(storage)
    if storage != "full":
        # A thread reads as many neighbours as it codes. A load has 16 bytes of them: with more,
        # each sector would be asked for twice.
        neighbours, threads = 16 // dtype.itemsize, 32 * num_warps
        coded = min(coded, neighbours * threads // rows)
    return Tiles(rows, channels, coded, num_warps)


def sublayer_epilogue(
    x: Tensor,  # [..., C]
    y: Tensor,  # [..., C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
    P: Tensor | None = None,  # [C, r]
    tap: str = "output",
    storage: str = "full",
    seed: Tensor | None = None,
    index: int = 0,
    into: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    channels, tokens = x.shape[-1], x.shape[:-1].numel()
    if P is None:
        tap, storage = "none", "full"
    affine = norm_weight is not None
    stored = affine or (tap == "norm" and storage == "full")
    y_out = torch.empty_like(y)
    z = torch.empty_like(y) if stored else y.new_empty(0)
    rank = 0 if P is None else P.shape[1]
    if not into:
        into = [x.new_empty(0)] * 3 if P is None else room(x, rank, storage)
    t, codes, scale = into
    # What is absent is neither read nor written.
    norm = [x if v is None else v.contiguous() for v in (norm_weight, norm_bias)]
    tile = tiles(x.dtype, architecture_of(x.device), tap, storage)
    if tokens:
        sublayer_epilogue_kernel[(triton.cdiv(tokens, tile.rows),)](
            x,
            y,
            *norm,
            x if P is None else P.to(x.dtype).contiguous(),
            y_out,
            z,
            t,
            codes if storage == "full" else codes.view(torch.uint8),
            scale,
            tokens,
            eps,
            # Where nothing rounds at random it is not read.
            x if storage != "int4" else _seed(seed, x.device),
            int32(index),
            CHANNELS=channels,
            RANK=rank,
            AFFINE=affine,
            STORED=stored,
            TAP=tap,
            STORAGE=storage,
            RANK_TILE=padded_rank(rank),
            ROWS=tile.rows,
            CHANNEL_TILE=tile.channels,
            BYTE_TILE=tile.coded,
            num_warps=tile.num_warps,
        )
    return y_out, z, t, codes, scale


def _seed(seed: Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.zeros((), dtype=torch.int64, device=device)
    return seed.to(device, torch.int64)


@triton.jit
def _normalise(
    y_ptr,  # [N, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    at,
    inside,
    channels,
    mean,
    rstd,
    CHANNELS: tl.constexpr,
    AFFINE: tl.constexpr,
):
    """The norm of a tile as it is stored, anything outside: the same bits in every pass."""
    y = tl.load(y_ptr + at, mask=inside, other=0.0)
    z = (y.to(tl.float32) - mean[:, None]) * rstd[:, None]
    if AFFINE:
        weight = tl.load(weight_ptr + channels, mask=channels < CHANNELS, other=0.0)
        bias = tl.load(bias_ptr + channels, mask=channels < CHANNELS, other=0.0)
        # Left to the compiler, one pass might round the product and another not.
        z = tl.fma(z, weight.to(tl.float32)[None, :], bias.to(tl.float32)[None, :])
    return z.to(y_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["tokens", "index"])
def sublayer_epilogue_kernel(
    x_ptr,  # [N, C]
    y_ptr,  # [N, C]
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    P_ptr,  # [C, r]
    y_out_ptr,  # [N, C]
    z_ptr,  # [N, C]
    t_ptr,  # [N, r]
    codes_ptr,  # [N, bytes]
    scale_ptr,  # [N]
    tokens,
    eps,
    seed_ptr,  # []
    index,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    AFFINE: tl.constexpr,  # the norm has a weight and a bias
    STORED: tl.constexpr,  # the norm is written
    TAP: tl.constexpr,  # none, output or norm
    STORAGE: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    BYTE_TILE: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    NORM: tl.constexpr = STORED or TAP == "norm"
    # 64 bits: the offsets of a large map do not fit into 32.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_in = rows < tokens
    ranks = tl.arange(0, RANK_TILE)
    rank_in = ranks < RANK

    t = tl.zeros((ROWS, RANK_TILE), tl.float32)
    shift = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, CHANNEL_TILE), tl.float32)  # Σ y' - shift
    squares = total  # Σ (y' - shift)²
    largest = tl.zeros((ROWS,), tl.int32)
    for start in range(0, CHANNELS, CHANNEL_TILE):
        channels = start + tl.arange(0, CHANNEL_TILE)
        channel_in = channels < CHANNELS
        at = rows[:, None] * CHANNELS + channels[None, :]
        inside = row_in[:, None] & channel_in[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        y = tl.load(y_ptr + at, mask=inside, other=0.0)
        y = (x.to(tl.float32) + y.to(tl.float32)).to(dtype)
        tl.store(y_out_ptr + at, y, mask=inside)
        if NORM:
            # Σy² - (Σy)²/C would cancel where the mean is large. Not so about the mean of the first
            # slice: that of all lies within √(C/slice) standard deviations of it.
            y = y.to(tl.float32)
            if start == 0:
                shift = tl.sum(y, 1) * (1.0 / min(CHANNELS, CHANNEL_TILE))
            off = y - shift[:, None]
            if CHANNELS % CHANNEL_TILE:
                off = tl.where(channel_in[None, :], off, 0.0)
            total += off
            squares = tl.fma(off, off, squares)
        if TAP == "output":
            P = tl.load(
                P_ptr + channels[:, None] * RANK + ranks[None, :],
                mask=channel_in[:, None] & rank_in[None, :],
                other=0.0,
            )
            t = dot(x, P, t)
            if STORAGE != "full":
                largest = tl.maximum(largest, tl.max(magnitude(x.to(tl.float32)), 1))

    off = tl.sum(total, 1) * (1.0 / CHANNELS)
    mean = shift + off
    variance = tl.sum(squares, 1) * (1.0 / CHANNELS) - off * off
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    if NORM:
        tl.debug_barrier()  # y' is read again, and not by the threads that wrote it
    if TAP == "norm":
        for start in range(0, CHANNELS, CHANNEL_TILE):
            channels = start + tl.arange(0, CHANNEL_TILE)
            channel_in = channels < CHANNELS
            at = rows[:, None] * CHANNELS + channels[None, :]
            inside = row_in[:, None] & channel_in[None, :]
            z = _normalise(
                y_out_ptr,
                norm_weight_ptr,
                norm_bias_ptr,
                at,
                inside,
                channels,
                mean,
                rstd,
                CHANNELS,
                AFFINE,
            )
            if CHANNELS % CHANNEL_TILE:
                z = tl.where(channel_in[None, :], z, 0.0)
            if STORED:
                tl.store(z_ptr + at, z, mask=inside)
            P = tl.load(
                P_ptr + channels[:, None] * RANK + ranks[None, :],
                mask=channel_in[:, None] & rank_in[None, :],
                other=0.0,
            )
            t = dot(z, P, t)
            if STORAGE != "full":
                largest = tl.maximum(largest, tl.max(magnitude(z.to(tl.float32)), 1))
    if TAP != "none":
        at_rank = rows[:, None] * RANK + ranks[None, :]
        tl.store(t_ptr + at_rank, t.to(dtype), mask=row_in[:, None] & rank_in[None, :])

    if STORAGE != "full" or (NORM and TAP != "norm"):
        # A byte holds a channel of each part.
        PARTS: tl.constexpr = parts(STORAGE)
        BYTES: tl.constexpr = (CHANNELS + PARTS - 1) // PARTS
        if STORAGE != "full":
            inverse, scale = scales(largest, STORAGE)
            tl.store(scale_ptr + rows, scale, mask=row_in)
            if STORAGE == "int4":
                key = hash((tl.load(seed_ptr) + index).to(tl.uint32))
        for start in range(0, BYTES, BYTE_TILE):
            bytes_ = start + tl.arange(0, BYTE_TILE)
            byte_in = bytes_ < BYTES
            place = rows[:, None] * BYTES + bytes_[None, :]
            codes = tl.zeros((ROWS, BYTE_TILE), tl.int32)
            random = codes
            if STORAGE == "int4":
                random = hash(place.to(tl.uint32) ^ key).to(tl.int32, bitcast=True)
            for part in tl.static_range(PARTS):
                channels = part * BYTES + bytes_
                channel_in = byte_in & (channels < CHANNELS)
                at = rows[:, None] * CHANNELS + channels[None, :]
                inside = row_in[:, None] & channel_in[None, :]
                if NORM:
                    tapped = _normalise(
                        y_out_ptr,
                        norm_weight_ptr,
                        norm_bias_ptr,
                        at,
                        inside,
                        channels,
                        mean,
                        rstd,
                        CHANNELS,
                        AFFINE,
                    )
                    if CHANNELS % PARTS:  # the last byte has room for one more
                        tapped = tl.where(channel_in[None, :], tapped, 0.0)
                    if TAP != "norm":
                        tl.store(z_ptr + at, tapped, mask=inside)
                if STORAGE != "full":
                    if TAP == "output":
                        tapped = tl.load(x_ptr + at, mask=inside, other=0.0)
                    bits = (random >> (16 * part)) & 0xFFFF
                    code = encode(tapped.to(tl.float32), inverse[:, None], bits, STORAGE)
                    codes |= code << (4 * part)
            if STORAGE != "full":
                at_byte = row_in[:, None] & byte_in[None, :]
                tl.store(codes_ptr + place, codes.to(tl.uint8), mask=at_byte)
