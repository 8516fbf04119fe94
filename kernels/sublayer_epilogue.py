"""``sublayer_epilogue`` in Triton: residual add, LayerNorm, an adapter's low-rank half, kept tap.

A program owns a few rows of the map. It runs over their channels twice: once to add, to gather the
statistics of the norm and of the codes and to project the tap down, once more, when x and y come
from cache, to normalise and to compress. The adapter's hidden width exists on chip only, a slice at
a time.

Bytes moved: x and y read, y' and its norm written (8NC in 16 bits), t and s written (4Nα), codes
and their scales written (NC/2 + 4N in int4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.common import architecture_of, dot, gelu, padded_rank
from e3va.kernels.taps import encode, hash, magnitude, parts, scales
from e3va.ops.taps import int32, stored_channels, stored_dtype


class Tiles(NamedTuple):
    """Sizes of what a program holds, and its warps."""

    rows: int
    channels: int
    hidden: int
    num_warps: int


def tiles(dtype: torch.dtype, architecture: int, taps: str) -> Tiles:
    """The largest tiles that do not spill, see ``python -m bench.registers``.

    Args:
        dtype: that of the map.
        architecture: 75 for sm_75, and so on.
        taps: how the tap is kept; a tile of int4's bytes has half as many channels, twice.
    """
    if dtype == torch.float32:
        return Tiles(16, 64, 32, 4 if taps == "full" else 8)
    if architecture < 80:
        return Tiles(16, 64, 64, 8)
    return Tiles(16, 64 if taps == "int4" else 128, 32, 4)


def sublayer_epilogue(
    x: Tensor,  # [..., C]
    y: Tensor,  # [..., C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
    P: Tensor | None = None,  # [C, r]
    Q: Tensor | None = None,  # [r, m]
    b: Tensor | None = None,  # [m]
    U: Tensor | None = None,  # [m, r]
    taps: str = "full",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    channels, tokens = x.shape[-1], x.shape[:-1].numel()
    adapter = [weight.to(x.dtype).contiguous() for weight in (P, Q, b, U) if weight is not None]
    rank, hidden = adapter[1].shape if adapter else (0, 0)
    y_out = torch.empty_like(y)
    z = y.new_empty(0) if norm_weight is None else torch.empty_like(y)
    low_rank = (tokens, rank) if adapter else (0,)
    t, s = x.new_empty(low_rank), x.new_empty(low_rank)
    if not adapter:
        taps = "full"
    codes, scale = x.new_empty(0), x.new_empty(0)
    if taps != "full":
        codes = x.new_empty(tokens, stored_channels(channels, taps), dtype=stored_dtype(taps))
        scale = x.new_empty(tokens, dtype=torch.float32)
    # What is absent is neither read nor written.
    norm = [x if v is None else v.contiguous() for v in (norm_weight, norm_bias)]
    tile = tiles(x.dtype, architecture_of(x.device), taps)
    if tokens:
        sublayer_epilogue_kernel[(triton.cdiv(tokens, tile.rows),)](
            x,
            y,
            *norm,
            *(adapter or [x] * 4),
            y_out,
            z,
            t,
            s,
            codes if taps == "full" else codes.view(torch.uint8),
            scale,
            tokens,
            eps,
            int32(seed),
            CHANNELS=channels,
            RANK=rank,
            HIDDEN=hidden,
            NORM=norm_weight is not None,
            ADAPTER=bool(adapter),
            FORMAT=taps,
            RANK_TILE=padded_rank(rank),
            ROWS=tile.rows,
            CHANNEL_TILE=tile.channels,
            HIDDEN_TILE=tile.hidden,
            num_warps=tile.num_warps,
        )
    return y_out, z, t, s, codes, scale


@triton.jit(do_not_specialize=["seed"])
def sublayer_epilogue_kernel(
    x_ptr,
    y_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    P_ptr,
    Q_ptr,
    b_ptr,
    U_ptr,
    y_out_ptr,
    z_ptr,
    t_ptr,
    s_ptr,
    codes_ptr,
    scale_ptr,
    tokens,
    eps,
    seed,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    NORM: tl.constexpr,
    ADAPTER: tl.constexpr,
    FORMAT: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # 64 bits: the offsets of a large map do not fit into 32.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_in = rows < tokens
    ranks = tl.arange(0, RANK_TILE)
    rank_in = ranks < RANK

    t = tl.zeros((ROWS, RANK_TILE), tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)  # Σ (y' - mean)²
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
            # Means and squares of slices merge exactly (Chan et al., 1983): Σy² - (Σy)²/C would
            # cancel where the mean is large.
            count = tl.minimum(CHANNELS - start, CHANNEL_TILE).to(tl.float32)
            y = y.to(tl.float32)
            slice_mean = tl.sum(y, 1) / count
            off = tl.where(inside, y - slice_mean[:, None], 0.0)
            step = slice_mean - mean
            mean += step * (count / (start + count))
            squares += tl.sum(off * off, 1) + step * step * (start * count / (start + count))
        if ADAPTER:
            P = tl.load(
                P_ptr + channels[:, None] * RANK + ranks[None, :],
                mask=channel_in[:, None] & rank_in[None, :],
                other=0.0,
            )
            t = dot(x, P, t)
        if FORMAT != "full":
            largest = tl.maximum(largest, tl.max(magnitude(x.to(tl.float32)), 1))

    if ADAPTER:
        t = t.to(dtype)
        at_rank = rows[:, None] * RANK + ranks[None, :]
        inside_rank = row_in[:, None] & rank_in[None, :]
        tl.store(t_ptr + at_rank, t, mask=inside_rank)

        s = tl.zeros((ROWS, RANK_TILE), tl.float32)
        for start in range(0, HIDDEN, HIDDEN_TILE):
            hidden = start + tl.arange(0, HIDDEN_TILE)
            hidden_in = hidden < HIDDEN
            Q = tl.load(
                Q_ptr + ranks[:, None] * HIDDEN + hidden[None, :],
                mask=rank_in[:, None] & hidden_in[None, :],
                other=0.0,
            )
            U = tl.load(
                U_ptr + hidden[:, None] * RANK + ranks[None, :],
                mask=hidden_in[:, None] & rank_in[None, :],
                other=0.0,
            )
            b = tl.load(b_ptr + hidden, mask=hidden_in, other=0.0).to(tl.float32)
            h = dot(t, Q, tl.zeros((ROWS, HIDDEN_TILE), tl.float32)) + b[None, :]
            s = dot(gelu(h).to(dtype), U, s)
        tl.store(s_ptr + at_rank, s.to(dtype), mask=inside_rank)

    if NORM or FORMAT != "full":
        # A byte holds a channel of each part.
        PARTS: tl.constexpr = parts(FORMAT)
        BYTES: tl.constexpr = (CHANNELS + PARTS - 1) // PARTS
        BYTE_TILE: tl.constexpr = CHANNEL_TILE // PARTS
        if NORM:
            rstd = tl.rsqrt(squares / CHANNELS + eps)
        if FORMAT != "full":
            inverse, scale = scales(largest, FORMAT)
            tl.store(scale_ptr + rows, scale, mask=row_in)
            key = hash(seed.to(tl.uint32))
        for start in range(0, BYTES, BYTE_TILE):
            bytes_ = start + tl.arange(0, BYTE_TILE)
            byte_in = bytes_ < BYTES
            place = rows[:, None] * BYTES + bytes_[None, :]
            codes = tl.zeros((ROWS, BYTE_TILE), tl.int32)
            random = codes
            if FORMAT == "int4":
                random = hash(place.to(tl.uint32) ^ key).to(tl.int32, bitcast=True)
            for part in tl.static_range(PARTS):
                channels = part * BYTES + bytes_
                channel_in = byte_in & (channels < CHANNELS)
                at = rows[:, None] * CHANNELS + channels[None, :]
                inside = row_in[:, None] & channel_in[None, :]
                x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
                if NORM:
                    y = tl.load(y_ptr + at, mask=inside, other=0.0)
                    y = (x + y.to(tl.float32)).to(dtype).to(tl.float32)
                    weight = tl.load(norm_weight_ptr + channels, mask=channel_in, other=0.0)
                    bias = tl.load(norm_bias_ptr + channels, mask=channel_in, other=0.0)
                    z = (y - mean[:, None]) * rstd[:, None]
                    z = z * weight.to(tl.float32)[None, :] + bias.to(tl.float32)[None, :]
                    tl.store(z_ptr + at, z.to(dtype), mask=inside)
                if FORMAT != "full":
                    bits = (random >> (16 * part)) & 0xFFFF
                    codes |= encode(x, inverse[:, None], bits, FORMAT) << (4 * part)
            if FORMAT != "full":
                at_byte = row_in[:, None] & byte_in[None, :]
                tl.store(codes_ptr + place, codes.to(tl.uint8), mask=at_byte)
