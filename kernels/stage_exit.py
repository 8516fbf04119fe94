"""``stage_exit_backward`` in Triton: what reaches the highway from the neck and the next stage.

A program owns a few rows, whole 2×2 neighbourhoods where there is a merging. The highway is never
written: each of two passes over the channels makes it again of p. The first one gathers the means
that the backward of a norm subtracts, that of the token and that of its neighbourhood; the second
writes dh, and what the rows add to the gradients of the norm's parameters.

Deterministic: a tile of rows is a part of the tokens, whose sums are added by one reduction. No
atomics.

Bytes moved: p, dp and the gradient of the gathered neighbours read, dh written (8NC in 16 bits);
the second pass reads from cache; sums of a part, 8C per ``ROWS`` tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from e3va.kernels.common import sum_of_rows

# They spill nowhere, see ``python -m bench.registers``. A thread holds two channels of a row, or
# more: of one, its own product would not be rounded before others' are added; see ``sum_of_rows``.
ROWS, CHANNEL_TILE, NUM_WARPS = 32, 64, 4


def stage_exit_backward(
    dp: Tensor,  # [B, H, W, C]
    dgathered: Tensor | None,  # [B, ⌈H/2⌉, ⌈W/2⌉, 4C]
    p: Tensor,  # [B, H, W, C]
    mean: Tensor,  # [N]
    rstd: Tensor,  # [N]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    merge_weight: Tensor | None,  # [4C]
    merge_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dp, p = dp.contiguous(), p.contiguous()
    (height, width, channels), limits = p.shape[1:], torch.finfo(p.dtype)
    merging = dgathered is not None and merge_weight is not None
    dh = torch.empty_like(p)
    rows = mean.numel() if dgathered is None else 4 * dgathered.shape[:-1].numel()
    parts = triton.cdiv(rows, ROWS)
    sums = mean.new_empty(2, parts, channels)
    # What is absent is not read.
    merge = [p if v is None else v.contiguous() for v in (dgathered, merge_weight)]
    if rows:
        stage_exit_backward_kernel[(parts,)](
            dp,
            merge[0],
            p,
            mean.contiguous(),
            rstd.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            merge[1],
            dh,
            sums,
            rows,
            height,
            width,
            merge_eps,
            CHANNELS=channels,
            MERGING=merging,
            LOST=limits.eps,
            TINY=limits.tiny,
            ROWS=ROWS,
            CHANNEL_TILE=CHANNEL_TILE,
            num_warps=NUM_WARPS,
        )
    return dh, sums[0].sum(0).to(weight), sums[1].sum(0).to(bias)


@triton.jit
def _normal(
    p_ptr,  # [N, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    at,
    inside,
    channels,
    CHANNELS: tl.constexpr,
    LOST: tl.constexpr,
    TINY: tl.constexpr,
):
    """(h normalised, as p tells it, and the norm's weight) of a tile, both zero outside."""
    channel_in = channels < CHANNELS
    weight = tl.load(weight_ptr + channels, mask=channel_in, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=channel_in, other=0.0).to(tl.float32)
    # A weight so small beside its bias that p, as rounded, tells nothing of the channel.
    lost = tl.abs(weight) <= LOST * tl.abs(bias) + TINY
    inverse = tl.where(lost, 0.0, 1.0 / tl.where(lost, 1.0, weight))
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normal = (p - bias[None, :]) * inverse[None, :]
    LIMIT: tl.constexpr = CHANNELS**0.5  # of a normalised value
    normal = tl.minimum(tl.maximum(normal, -LIMIT), LIMIT)
    return tl.where(inside, normal, 0.0), weight


@triton.jit
def _of_neighbours(x, ROWS: tl.constexpr):
    """Σ x [rows] over each four neighbours, for every one of them."""
    total = tl.sum(tl.reshape(x, (ROWS // 4, 4)), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], (ROWS // 4, 4)), (ROWS,))


@triton.jit
def _merged(
    dgathered_ptr, merge_weight_ptr, at_row, place, inside, channels, CHANNELS: tl.constexpr
):
    """The gradient of the gathered neighbours, times the weight of the merging's norm."""
    dmerged = tl.load(dgathered_ptr + at_row[:, None] + channels[None, :], mask=inside, other=0.0)
    at_weight = place[:, None] * CHANNELS + channels[None, :]
    weight = tl.load(merge_weight_ptr + at_weight, mask=(channels < CHANNELS)[None, :], other=0.0)
    return dmerged.to(tl.float32) * weight.to(tl.float32)


@triton.jit(do_not_specialize=["rows", "height", "width"])
def stage_exit_backward_kernel(
    dp_ptr,  # [N, C]
    dgathered_ptr,  # [rows / 4, 4, C]
    p_ptr,  # [N, C]
    mean_ptr,  # [N]
    rstd_ptr,  # [N]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    merge_weight_ptr,  # [4, C]
    dh_ptr,  # [N, C]
    sums_ptr,  # [2, parts, C]: of the gradients of weight and bias
    rows,
    height,
    width,
    eps,
    CHANNELS: tl.constexpr,
    MERGING: tl.constexpr,  # rows are neighbours in Swin's order, down first
    LOST: tl.constexpr,
    TINY: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    dtype: tl.constexpr = p_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # tokens fit into 32 bits
    row_in = row < rows
    token_in = row_in
    token = row.to(tl.int64)
    place = row % 4
    if MERGING:
        half_width = (width + 1) // 2
        half_height = (height + 1) // 2
        column = row // 4 % half_width * 2 + place // 2
        line = row // 4 // half_width
        image = line // half_height
        line = line % half_height * 2 + place % 2
        token_in = row_in & (line < height) & (column < width)
        token = (image.to(tl.int64) * height + line) * width + column
    # 64 bits: the offsets of a large map do not fit into 32.
    at_token = token * CHANNELS
    at_row = row.to(tl.int64) * CHANNELS
    mean = tl.load(mean_ptr + token, mask=token_in, other=0.0)
    rstd = tl.load(rstd_ptr + token, mask=token_in, other=1.0)
    if MERGING:
        middle = _of_neighbours(mean, ROWS) * 0.25
        deviation = 1.0 / rstd
    total = tl.zeros((ROWS,), tl.float32)  # Σ dp ⊙ weight
    along = total  # the same, with the normalised h
    squares = total  # Σ (h - middle)²
    merge_total = total  # Σ dgathered ⊙ merge_weight
    merge_along = total  # the same, with h - middle
    for start in range(0, CHANNELS, CHANNEL_TILE):
        channels = start + tl.arange(0, CHANNEL_TILE)
        channel_in = channels < CHANNELS
        inside = token_in[:, None] & channel_in[None, :]
        at = at_token[:, None] + channels[None, :]
        normal, weight = _normal(
            p_ptr, weight_ptr, bias_ptr, at, inside, channels, CHANNELS, LOST, TINY
        )
        dnormal = tl.load(dp_ptr + at, mask=inside, other=0.0).to(tl.float32) * weight[None, :]
        total += tl.sum(dnormal, 1)
        along += tl.sum(dnormal * normal, 1)
        if MERGING:
            there = row_in[:, None] & channel_in[None, :]
            # A neighbour that is missing is zero.
            off = (mean - middle)[:, None] + normal * deviation[:, None]
            off = tl.where(channel_in[None, :], off, 0.0)
            squares += tl.sum(off * off, 1)
            dmerged = _merged(
                dgathered_ptr, merge_weight_ptr, at_row, place, there, channels, CHANNELS
            )
            merge_total += tl.sum(dmerged, 1)
            merge_along += tl.sum(dmerged * off, 1)
    total *= 1.0 / CHANNELS
    along *= 1.0 / CHANNELS
    if MERGING:
        PART: tl.constexpr = 0.25 / CHANNELS
        merge_rstd = tl.rsqrt(_of_neighbours(squares, ROWS) * PART + eps)
        merge_total = _of_neighbours(merge_total, ROWS) * PART
        merge_along = _of_neighbours(merge_along, ROWS) * PART * merge_rstd * merge_rstd
    sums_ptr += tl.program_id(0).to(tl.int64) * CHANNELS
    for start in range(0, CHANNELS, CHANNEL_TILE):
        channels = start + tl.arange(0, CHANNEL_TILE)
        channel_in = channels < CHANNELS
        inside = token_in[:, None] & channel_in[None, :]
        at = at_token[:, None] + channels[None, :]
        normal, weight = _normal(
            p_ptr, weight_ptr, bias_ptr, at, inside, channels, CHANNELS, LOST, TINY
        )
        dp = tl.load(dp_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at_sum = sums_ptr + channels
        tl.store(at_sum, sum_of_rows(dp * normal), mask=channel_in)
        tl.store(
            at_sum + tl.num_programs(0).to(tl.int64) * CHANNELS, tl.sum(dp, 0), mask=channel_in
        )
        dh = (dp * weight[None, :] - total[:, None] - normal * along[:, None]) * rstd[:, None]
        if MERGING:
            off = (mean - middle)[:, None] + normal * deviation[:, None]
            dmerged = _merged(
                dgathered_ptr, merge_weight_ptr, at_row, place, inside, channels, CHANNELS
            )
            dmerged -= merge_total[:, None]
            dh += (dmerged - off * merge_along[:, None]) * merge_rstd[:, None]
        tl.store(dh_ptr + at, dh.to(dtype), mask=inside)
