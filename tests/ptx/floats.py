"""Float formats as registers hold them, and arithmetic that rounds once.

Values are computed in a wider format and rounded to nearest, ties to even, when they are encoded.
A sum, product, quotient or square root of p bits may be rounded to 2p + 2 bits first (Figueroa,
1995); where that is not enough, the first rounding is to odd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


class Format(NamedTuple):
    """How a register holds one or two numbers."""

    bits: int
    decode: Callable[[Array], Array]
    """Registers → values, in a format that holds them; those of one register side by side."""
    encode: Callable[[Array], Array]
    """Values, rounded → registers."""


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    if values.dtype == np.float64:
        values = to_odd_float32(values)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def to_odd_float32(values: Array) -> Array:
    """float64 → float32, what is inexact rounded to the neighbour whose last bit is set."""
    nearest = values.astype(np.float32)
    inexact = np.isfinite(nearest) & (nearest != values)
    away = np.abs(nearest.astype(np.float64)) > np.abs(values)
    bits = nearest.view(np.uint32) - (inexact & away)
    return np.where(inexact, bits | np.uint32(1), bits).astype(np.uint32).view(np.float32)


def fused(x: Array, y: Array, z: Array) -> Array:
    """x·y + z of values of at most 24 bits, in float64, rounded to odd.

    The product is exact. What the sum lost (Møller and Knuth's two-sum) says to which side the
    odd neighbour lies.
    """
    product = x.astype(np.float64) * y.astype(np.float64)
    z = z.astype(np.float64)
    total = product + z
    from_z = total - product
    lost = (product - (total - from_z)) + (z - from_z)
    bits = np.ascontiguousarray(total).view(np.uint64)
    even = np.isfinite(total) & (lost != 0) & ((bits & np.uint64(1)) == 0)
    if not even.any():
        return total
    outwards = (lost > 0) == (total > 0)
    odd = np.where(outwards, bits + np.uint64(1), bits - np.uint64(1))
    return np.where(even, odd, bits).view(np.float64)


def flushed(values: Array) -> Array:
    """Subnormals of float32 become zeros of their sign."""
    tiny = np.abs(values) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(values.dtype.type(0), values), values)


def _halves(decode: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda bits: decode(np.ascontiguousarray(bits).view(np.uint16))


def _to_float16(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint16)


def _from_float16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def _to_float32(values: Array) -> Array:
    return values.astype(np.float32, copy=False).view(np.uint32)


FORMATS = {
    "f64": Format(64, lambda bits: bits.view(np.float64), lambda values: values.view(np.uint64)),
    "f32": Format(32, lambda bits: bits.view(np.float32), _to_float32),
    "f16": Format(16, _from_float16, _to_float16),
    "bf16": Format(16, from_bfloat16, to_bfloat16),
    "f32x2": Format(
        64,
        lambda bits: np.ascontiguousarray(bits).view(np.float32),
        lambda values: _to_float32(values).view(np.uint64),
    ),
    "f16x2": Format(32, _halves(_from_float16), lambda values: _to_float16(values).view(np.uint32)),
    "bf16x2": Format(
        32, _halves(from_bfloat16), lambda values: to_bfloat16(values).view(np.uint32)
    ),
    # Pairs of integers are held alike.
    "s16x2": Format(
        32,
        lambda bits: np.ascontiguousarray(bits).view(np.int16),
        lambda values: values.view(np.uint32),
    ),
}
