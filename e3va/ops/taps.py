"""How the taps are kept for backward: as they are, or with fewer bits and a scale for each token.

The trunk always sees the exact taps; what is kept serves the gradient of P alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TAPS = ("full", "fp8", "int8", "int4")
"""``full``: in the dtype of the map. ``fp8``: e4m3, round to nearest. ``int8``: round to nearest.
``int4``: stochastic rounding, so that the gradient stays unbiased."""

DEFAULT_TAPS = "int4"
"""On the demo its AP is that of ``full`` to within the noise of a seed."""

LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}

CHUNK = 2**22
"""Values that are compressed or expanded at a time: bounds what is made in between."""


def stored_channels(channels: int, taps: str) -> int:
    """Values that a token of C = ``channels`` is stored in: two channels share a byte of int4."""
    return -(-channels // 2) if taps == "int4" else channels


def stored_dtype(taps: str) -> torch.dtype:
    """The dtype of compressed taps."""
    return {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[taps]


def compress(x: Tensor, taps: str, seed: int) -> tuple[Tensor, Tensor]:
    """A tap [..., C] in fewer bits.

    Args:
        x: the tap, N tokens.
        taps: "fp8", "int8" or "int4".
        seed: of int4's stochastic rounding.

    Returns:
        codes [N, C], or [N, ⌈C/2⌉] of int4, the even channel in the low four bits, offset by 8;
        scale [N] float32: x ≈ codes·scale.
    """
    rows = x.flatten(0, -2)
    tokens, channels = rows.shape
    codes = rows.new_empty(tokens, stored_channels(channels, taps), dtype=stored_dtype(taps))
    scale = rows.new_empty(tokens, dtype=torch.float32)
    for part in _parts(tokens, channels):
        place = part.start * channels
        codes[part], scale[part] = _compress(rows[part].float(), taps, seed, place)
    return codes, scale


def _compress(rows: Tensor, taps: str, seed: int, place: int) -> tuple[Tensor, Tensor]:
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    limit = torch.full_like(largest, LARGEST[taps])  # a number would be multiplied by 1/largest
    scaled = rows * torch.where(largest > 0, limit / largest, 0.0)[:, None]
    if taps == "fp8":
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn), largest / limit
    if taps == "int8":
        return scaled.round().to(torch.int8), largest / limit
    noise = uniform(rows.numel(), seed, place, rows.device).view_as(rows)
    codes = ((scaled + noise).floor().clamp(-7, 7) + 8).to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, largest / limit


def expand(codes: Tensor, scale: Tensor, taps: str, channels: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`compress`: [N, C] in ``dtype``."""
    x = torch.empty(len(codes), channels, dtype=dtype, device=codes.device)
    for part in _parts(len(codes), channels):
        values = codes[part]
        if taps == "int4":
            values = torch.stack([values & 15, values >> 4], dim=2).flatten(1)[:, :channels]
        offset = 8 if taps == "int4" else 0
        x[part] = (values.float() - offset) * scale[part, None]
    return x


def _parts(tokens: int, channels: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, channels))
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))


def uniform(count: int, seed: int, place: int, device: torch.device) -> Tensor:
    """``count`` float32 in [0, 1): hashes of the positions from ``place`` on, the same on every
    backend."""
    key = _hash(torch.tensor(_int32(seed), dtype=torch.int32)).item()
    x = torch.arange(count, dtype=torch.int32, device=device)
    x += _int32(place)
    x ^= key
    return ((_hash(x) >> 8) & 0xFFFFFF).float() * 2.0**-24


def _int32(number: int) -> int:
    """The int32 of the same lowest 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


def _hash(x: Tensor) -> Tensor:
    """A bijection of 32 bits with little bias (C. Wellons' lowbias32), in place, in int32."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x
