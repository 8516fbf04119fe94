"""Taps in fewer bits, inside of a kernel: what ``e3va/ops/storage.py`` defines, to the last bit.

The conversions are integer arithmetic: it runs on GPUs without float8, and no compiler fuses a
product with an addition that rounds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from e3va.kernels.common import INTERPRETED
from e3va.ops import storage

TINY = tl.constexpr(storage.TINY)


@triton.constexpr_function
def parts(STORAGE):
    """Channels that share a byte."""
    return 2 if STORAGE == "int4" else 1


@triton.constexpr_function
def limit(STORAGE):
    """The largest number that has a code."""
    return storage.LARGEST[STORAGE]


@triton.jit
def magnitude(x):
    """|x| of float32, as an integer: in the same order, NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales(largest, STORAGE: tl.constexpr):
    """(what x is multiplied by, what codes are) from the largest :func:`magnitude` of a token."""
    largest = largest.to(tl.float32, bitcast=True)
    top = tl.full(largest.shape, limit(STORAGE), tl.float32)
    inverse = tl.where(largest > TINY, tl.div_rn(top, tl.maximum(largest, TINY)), 0.0)
    return inverse, tl.div_rn(largest, top)


@triton.jit
def hash(x):
    """A bijection of uint32 with little bias (C. Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def encode(x, inverse, random, STORAGE: tl.constexpr):
    """The code of x, float32, in int32; ``random``: 16 bits."""
    if STORAGE == "int4":  # fixed point, 16 bits after the point
        code = ((x * (inverse * 65536.0)).to(tl.int32) + (8 << 16) + random) >> 16 & 15
    elif STORAGE == "int8":
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


@triton.constexpr_function
def mantissa(dtype):
    """Bits of a 16-bit float's mantissa."""
    return 10 if dtype == tl.float16 else 7


@triton.constexpr_function
def bias(dtype):
    """Of its exponent."""
    return 15 if dtype == tl.float16 else 127


@triton.constexpr_function
def powers(exponent, dtype):
    """The word whose halves are 2 to the power of ``exponent``."""
    return (exponent + bias(dtype) << mantissa(dtype)) * 0x10001


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """The halves of words as numbers, the lower one first."""
    low = word.to(tl.int16).to(dtype, bitcast=True)
    return tl.interleave(low, (word >> 16).to(tl.int16).to(dtype, bitcast=True))


@triton.jit
def _fma(a, b, c, dtype: tl.constexpr):
    """a·b + c of the halves of words, in one instruction for both: no compiler finds it."""
    if INTERPRETED:
        b, c = a & 0 | b, a & 0 | c
        product = _halves(a, dtype).to(tl.float32) * _halves(b, dtype).to(tl.float32)
        return (product + _halves(c, dtype).to(tl.float32)).to(dtype)
    NAME: tl.constexpr = "fma.rn.f16x2" if dtype == tl.float16 else "fma.rn.bf16x2"
    word = tl.inline_asm_elementwise(
        NAME + " $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.uint32, is_pure=True, pack=1
    )
    return _halves(word, dtype)


@triton.jit
def decode(word, STORAGE: tl.constexpr, dtype: tl.constexpr):
    """What the codes in words of 32 bits stand for, exactly, in a 16-bit ``dtype``; they come in
    the order that :func:`place_of` tells."""
    MANTISSA: tl.constexpr = mantissa(dtype)
    ONE: tl.constexpr = powers(0, dtype)
    BASE: tl.constexpr = powers(MANTISSA, dtype)  # what is put into its last bits, is added to it
    if STORAGE == "int4":
        word = tl.interleave(tl.interleave(word, word >> 8), tl.interleave(word >> 4, word >> 12))
        x = _fma(word & 0x000F000F | BASE, ONE, BASE | 0x80088008, dtype)
    else:
        word = tl.interleave(word, word >> 8)
        size, sign = word & 0x007F007F, word & 0x00800080
        if STORAGE == "int8":  # the sign weighs -128
            x = _fma(sign | BASE, ONE | 0x80008000, size | BASE, dtype)
        else:  # the bits of a float of a larger bias
            bits = size << (MANTISSA - 3) | sign << 8
            x = _fma(bits, powers(bias(dtype) - 7, dtype), 0, dtype)
    return x


@triton.jit
def place_of(column, STORAGE: tl.constexpr):
    """(byte, part) of the code that :func:`decode` puts into a column: what lies half a word apart
    comes side by side."""
    CODES: tl.constexpr = 4 * parts(STORAGE)  # of a word
    code = column % CODES // 2 + column % 2 * (CODES // 2)
    return column // CODES * 4 + code // parts(STORAGE), code % parts(STORAGE)
