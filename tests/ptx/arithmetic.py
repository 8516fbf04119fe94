"""Opcodes that compute with registers. ``approx`` functions give the result rounded to nearest,
with which a GPU's agree to some units of the last place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import floats
from tests.ptx.floats import FORMATS, SIGNED, UNSIGNED, Array
from tests.ptx.opcodes import Active, NotModelled, Operands, Step, Translate, bits_of, opcode

if TYPE_CHECKING:
    from tests.ptx.machine import Execution


# Moves and conversions


@opcode("mov")
def _mov(o: Operands) -> Step:
    if o.kind == "pred":
        return o.elementwise(lambda x: x)
    bits = bits_of(o.kind)
    targets, sources = o.vector(0), o.vector(1)
    if len(targets) > 1:  # taken apart
        part = bits // len(targets)
        read, writes = o.read(1, f"u{bits}"), [o.writer(text) for text in targets]

        def unpack(execution: Execution, active: Active) -> None:
            values = read(execution, active)
            for i, write in enumerate(writes):
                shifted = values >> values.dtype.type(i * part)
                write(execution, active, shifted.astype(UNSIGNED[part]))

        return unpack
    part = bits // len(sources)
    reads, write = [o.reader(text, f"u{part}") for text in sources], o.write(0, f"u{bits}")

    def pack(execution: Execution, active: Active) -> None:
        total = UNSIGNED[bits](0)
        for i, read in enumerate(reads):
            values = read(execution, active).astype(UNSIGNED[bits])
            total = total | values << UNSIGNED[bits](i * part)
        write(execution, active, total)

    return pack


@opcode("cvta", modifiers="to global shared")
def _cvta(o: Operands) -> Step:
    """Generic addresses are those of their space."""
    return o.elementwise(lambda x: x)


_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt", modifiers="rn rzi rni rmi rpi sat")
def _cvt(o: Operands) -> Step:
    to, source = o.kinds[0], o.kinds[-1]
    if to.endswith("x2"):  # of two floats, the first in the high half
        if "sat" in o.modifiers:
            raise NotModelled(o.where)
        high, low, write = o.read(1, source), o.read(2, source), o.write(0, to)

        def convert_two(execution: Execution, active: Active) -> None:
            count = execution.count(active)
            pair = (np.broadcast_to(read(execution, active), count) for read in (low, high))
            write(execution, active, np.stack(list(pair), 1).ravel())

        return convert_two
    if to in FORMATS:
        if "sat" in o.modifiers:
            return o.elementwise(lambda x: np.fmin(np.fmax(x, 0), 1), source, result=to)
        if source in FORMATS:
            return o.elementwise(lambda x: x, source, result=to)
        # float64 holds integers of 32 bits; more of them would be rounded twice
        if bits_of(source) > 32:
            raise NotModelled(o.where)
        return o.elementwise(lambda x: x.astype(np.float64), source, result=to)
    bits = bits_of(to)
    integer = (SIGNED if to[0] == "s" else UNSIGNED)[bits]
    if source not in FORMATS:
        if "sat" in o.modifiers:
            raise NotModelled(o.where)
        return o.elementwise(lambda x: x.astype(integer), source, result=to)
    if bits > 32:
        raise NotModelled(o.where)
    rounding = _TO_INTEGER[o.one_of(*_TO_INTEGER)]
    limits = np.iinfo(integer)

    def to_integer(x: Array) -> Array:
        x = rounding(x.astype(np.float64))
        return np.clip(np.where(np.isnan(x), 0, x), limits.min, limits.max).astype(integer)

    return o.elementwise(to_integer, source, result=to)


# Arithmetic


def _wider(kind: str) -> str:
    return f"{kind[0]}{2 * bits_of(kind)}"


@opcode("add", modifiers="rn ftz")
def _add(o: Operands) -> Step:
    return _sum(o, np.add)


@opcode("sub", modifiers="rn ftz")
def _sub(o: Operands) -> Step:
    return _sum(o, np.subtract)


def _sum(o: Operands, function: np.ufunc) -> Step:
    if _is_mixed(o):
        return o.elementwise(function, o.kind, "f32", result="f32")
    return o.elementwise(function)


def _is_mixed(o: Operands) -> bool:
    """Whether 16-bit factors or terms are combined with float32, as from sm_100 on."""
    return len(o.kinds) == 2 and o.kinds[0] == "f32" and o.kind in ("f16", "bf16")


@opcode("mul", modifiers="rn ftz lo hi wide")
def _mul(o: Operands) -> Step:
    if o.kind in FORMATS:
        return o.elementwise(np.multiply)
    return o.elementwise(_product(o), result=_wider(o.kind) if "wide" in o.modifiers else o.kind)


@opcode("mad", modifiers="lo hi wide")
def _mad(o: Operands) -> Step:
    product = _product(o)
    total = _wider(o.kind) if "wide" in o.modifiers else o.kind
    return o.elementwise(lambda x, y, z: product(x, y) + z, o.kind, o.kind, total, result=total)


def _product(o: Operands) -> Callable[[Array, Array], Array]:
    """Of integers: the low half, the high half, or all of it."""
    half = o.one_of("lo", "hi", "wide")
    if half == "lo":
        return np.multiply
    bits, types = bits_of(o.kind), SIGNED if o.kind[0] == "s" else UNSIGNED
    whole, part = types[2 * bits], types[bits]
    if half == "wide":
        return lambda x, y: x.astype(whole) * y.astype(whole)
    return lambda x, y: (x.astype(whole) * y.astype(whole) >> whole(bits)).astype(part)


@opcode("fma", modifiers="rn rm ftz")
def _fma(o: Operands) -> Step:
    if "rm" not in o.modifiers:
        if o.kind == "f64":
            raise NotModelled(o.where)
        if _is_mixed(o):
            return o.elementwise(floats.fused, o.kind, o.kind, "f32", result="f32")
        return o.elementwise(floats.fused)
    if o.kind != "f32":
        raise NotModelled(o.where)

    def downwards(x: Array, y: Array, z: Array) -> Array:
        exact = floats.fused(x, y, z)
        nearest = exact.astype(np.float32)
        lower = np.nextafter(nearest, np.float32(-np.inf))
        return np.where(nearest > exact, lower, nearest)

    return o.elementwise(downwards)


@opcode("div", modifiers="rn full approx ftz")
def _div(o: Operands) -> Step:
    if o.kind in FORMATS:
        return o.elementwise(np.divide)
    return o.elementwise(_quotient)


def _quotient(x: Array, y: Array) -> Array:
    """Of integers, towards zero."""
    if x.dtype.kind == "u":
        return x // y
    size = np.abs(x.astype(np.int64)) // np.abs(y.astype(np.int64))
    return (np.sign(x).astype(np.int64) * np.sign(y) * size).astype(x.dtype)


@opcode("rem")
def _rem(o: Operands) -> Step:
    return o.elementwise(lambda x, y: x - _quotient(x, y) * y)


def _special(function: Callable[[Array], Array]) -> Translate:
    """Of float32, computed in float64."""

    def translate_special(o: Operands) -> Step:
        if o.kind != "f32":
            raise NotModelled(o.where)
        return o.elementwise(lambda x: function(x.astype(np.float64)).astype(np.float32))

    return translate_special


for _name, _function in {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}.items():
    opcode(_name, modifiers="rn approx ftz")(_special(_function))


@opcode("max", modifiers="ftz NaN relu")
def _max(o: Operands) -> Step:
    return _extreme(o, np.maximum, np.fmax)


@opcode("min", modifiers="ftz NaN relu")
def _min(o: Operands) -> Step:
    return _extreme(o, np.minimum, np.fmin)


def _extreme(o: Operands, of_numbers: np.ufunc, of_any: np.ufunc) -> Step:
    """Of a number and what is none, the number, or with NaN the latter; with relu, at least 0."""
    function = of_numbers if o.kind not in FORMATS or "NaN" in o.modifiers else of_any
    if "relu" not in o.modifiers:
        return o.elementwise(function)
    if o.kind in FORMATS:
        raise NotModelled(o.where)
    return o.elementwise(lambda x, y: np.maximum(function(x, y), x.dtype.type(0)))


@opcode("abs", modifiers="ftz")
def _abs(o: Operands) -> Step:
    return o.elementwise(np.abs)


@opcode("neg", modifiers="ftz")
def _neg(o: Operands) -> Step:
    return o.elementwise(np.negative)


# Bits


@opcode("and")
def _and(o: Operands) -> Step:
    return o.elementwise(np.bitwise_and)


@opcode("or")
def _or(o: Operands) -> Step:
    return o.elementwise(np.bitwise_or)


@opcode("xor")
def _xor(o: Operands) -> Step:
    return o.elementwise(np.bitwise_xor)


@opcode("not")
def _not(o: Operands) -> Step:
    return o.elementwise(np.invert)


@opcode("shl")
def _shl(o: Operands) -> Step:
    bits = bits_of(o.kind)

    def left(x: Array, by: Array) -> Array:
        moved = x << np.minimum(by, bits - 1).astype(x.dtype)
        return np.where(by < bits, moved, x.dtype.type(0))

    return o.elementwise(left, o.kind, "u32")


@opcode("shr")
def _shr(o: Operands) -> Step:
    bits = bits_of(o.kind)

    def right(x: Array, by: Array) -> Array:
        moved = x >> np.minimum(by, bits - 1).astype(x.dtype)
        if x.dtype.kind == "i":  # the sign fills what gets free, all of it if need be
            return moved
        return np.where(by < bits, moved, x.dtype.type(0))

    return o.elementwise(right, o.kind, "u32")


@opcode("bfe")
def _bfe(o: Operands) -> Step:
    if bits_of(o.kind) != 32:
        raise NotModelled(o.where)

    def field(x: Array, start: Array, length: Array) -> Array:
        start = np.minimum(start & np.uint32(255), 32).astype(np.int64)
        length = np.minimum(length & np.uint32(255), 32).astype(np.int64)
        found = (x.astype(np.int64) >> start) & ((np.int64(1) << length) - 1)
        if o.kind[0] == "s":
            sign = found >> np.maximum(length - 1, 0) & 1
            found = found - (sign << length)
        return found.astype(x.dtype)

    return o.elementwise(field, o.kind, "u32", "u32")


@opcode("prmt")
def _prmt(o: Operands) -> Step:
    def permuted(x: Array, y: Array, selector: Array) -> Array:
        eight = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
        result = np.uint32(0)
        for i in range(4):
            which = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = eight >> (which & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            byte = (byte & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & 128, np.uint32(255), np.uint32(0))  # repeated
            byte = np.where(which & 8, sign, byte)
            result = result | byte << np.uint32(8 * i)
        return result

    return o.elementwise(permuted)


@opcode("lop3")
def _lop3(o: Operands) -> Step:
    table = o.number(4)

    def looked_up(x: Array, y: Array, z: Array) -> Array:
        result = np.uint32(0)
        for i in range(8):
            if table >> i & 1:
                term = (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
                result = result | term
        return result

    return o.elementwise(looked_up, *["b32"] * 3)


# Comparison and choice

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


def _neither(x: Array, y: Array) -> Array:
    return np.isnan(x) | np.isnan(y)


@opcode("setp", modifiers=" ".join(("nan", "num", "ftz", *_COMPARE, *_UNORDERED)))
def _setp(o: Operands) -> Step:
    """Comparisons hold of no pair with a NaN, those that end in u of every such pair."""
    name = o.modifiers[0]
    if "ftz" in o.modifiers or len(o.texts) != 3:
        raise NotModelled(o.where)
    if name in ("nan", "num"):
        wanted = name == "nan"
        return o.elementwise(lambda x, y: _neither(x, y) == wanted, o.kind, o.kind)
    compare = _COMPARE[_UNORDERED.get(name, name)]
    if o.kind not in FORMATS:
        return o.elementwise(compare, o.kind, o.kind, result="pred")
    if name in _UNORDERED:
        return o.elementwise(lambda x, y: compare(x, y) | _neither(x, y), result="pred")
    return o.elementwise(lambda x, y: compare(x, y) & ~_neither(x, y), result="pred")


@opcode("selp")
def _selp(o: Operands) -> Step:
    bits = f"b{bits_of(o.kind)}"
    return o.elementwise(lambda x, y, which: np.where(which, x, y), bits, bits, "pred", result=bits)
