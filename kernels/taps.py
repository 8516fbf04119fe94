"""Taps in fewer bits, inside of a kernel: what ``e3va/ops/taps.py`` defines, to the last bit.

The conversions are integer arithmetic: it runs on GPUs without float8, and no compiler fuses a
product with an addition that rounds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from e3va.ops import taps

TINY = tl.constexpr(taps.TINY)


@triton.constexpr_function
def parts(FORMAT):
    """Channels that share a byte."""
    return 2 if FORMAT == "int4" else 1


@triton.constexpr_function
def limit(FORMAT):
    """The largest number that has a code."""
    return taps.LARGEST[FORMAT]


@triton.jit
def magnitude(x):
    """|x| of float32, as an integer: in the same order, NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales(largest, FORMAT: tl.constexpr):
    """(what x is multiplied by, what codes are) from the largest :func:`magnitude` of a token."""
    largest = largest.to(tl.float32, bitcast=True)
    top = tl.full(largest.shape, limit(FORMAT), tl.float32)
    inverse = tl.where(largest > TINY, tl.div_rn(top, tl.maximum(largest, TINY)), 0.0)
    return inverse, tl.div_rn(largest, top)


@triton.jit
def hash(x):
    """A bijection of uint32 with little bias (C. Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def encode(x, inverse, random, FORMAT: tl.constexpr):
    """The code of x, float32, in int32; ``random``: 16 bits."""
    if FORMAT == "int4":  # fixed point, 16 bits after the point
        code = ((x * (inverse * 65536.0)).to(tl.int32) + (8 << 16) + random) >> 16 & 15
    elif FORMAT == "int8":
        code = _nearest(x * inverse) & 255
    else:
        bits = (x * inverse).to(tl.int32, bitcast=True)
        size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
        normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
        small = tl.minimum(size, 121 << 23).to(tl.float32, bitcast=True)  # 2⁻⁶, the least normal
        code = tl.where(size < (121 << 23), _nearest(small * 512.0), normal) | (bits >> 24) & 0x80
    return code


@triton.jit
def _nearest(x):
    """The integer nearest to |x| < 127.5, ties to even."""
    fixed = (x * 16777216.0).to(tl.int32)  # 2²⁴: exact where |x| ≥ ½
    return (fixed + 0x7FFFFF + ((fixed >> 24) & 1)) >> 24


@triton.jit
def decode(code, FORMAT: tl.constexpr):
    """What a code of one byte, or four bits, stands for, in float32."""
    if FORMAT == "int4":
        x = code.to(tl.float32) - 8.0
    elif FORMAT == "int8":
        x = code.to(tl.int8, bitcast=True).to(tl.float32)
    else:  # laid out as float16, whose bias is larger by 8
        code = code.to(tl.int16)
        half = ((code & 0x7F) << 7 | (code & 0x80) << 8).to(tl.float16, bitcast=True)
        x = half.to(tl.float32) * 256.0
    return x
