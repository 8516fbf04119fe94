"""How the taps are kept for backward: as they are, or with fewer bits and a scale for each token.

The trunk always sees the exact taps; what is kept serves the gradient of P alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAPS = ("full", "fp8", "int8", "int4")
"""``full``: in the dtype of the map. ``fp8``: e4m3, round to nearest. ``int8``: round to nearest.
``int4``: stochastic rounding, so that the gradient stays unbiased."""

DEFAULT_TAPS = "int4"
"""On the demo its AP is that of ``full`` to within the noise of a seed."""

LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}


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
    rows = x.flatten(0, -2).float()
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    limit = torch.full_like(largest, LARGEST[taps])  # a number would be multiplied by 1/largest
    scale = largest / limit
    scaled = rows * torch.where(largest > 0, limit / largest, 0.0)[:, None]
    if taps == "fp8":
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn), scale
    if taps == "int8":
        return scaled.round().to(torch.int8), scale
    noise = uniform(rows.numel(), seed, rows.device).view_as(rows)
    codes = ((scaled + noise).floor().clamp(-7, 7) + 8).to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scale


def expand(codes: Tensor, scale: Tensor, taps: str, channels: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`compress`: [N, C] in ``dtype``."""
    if taps == "int4":
        nibbles = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, :channels]
        values = nibbles.float() - 8
    else:
        values = codes.float()
    return (values * scale[:, None]).to(dtype)


def uniform(count: int, seed: int, device: torch.device) -> Tensor:
    """``count`` float32 in [0, 1): hashes of their positions, the same on every backend."""
    key = _hash(torch.tensor(seed & 0xFFFFFFFF, device=device))
    return (_hash(torch.arange(count, device=device) ^ key) >> 8).float() * 2.0**-24


def _hash(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers with little bias (C. Wellons' lowbias32), held in int64."""
    mask = 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x7FEB352D) & mask
    x = ((x ^ x >> 15) * 0x846CA68B) & mask
    return x ^ x >> 16
