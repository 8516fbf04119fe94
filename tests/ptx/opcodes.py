"""The table of opcodes: what an instruction does to the threads that are active.

One entry per opcode: :func:`opcode` puts a function into :data:`TABLE` that reads an instruction's
operands once, when the kernel is loaded, and returns the step that executes it. What is not in the
table, a modifier included, raises :class:`NotModelled`: nothing is executed by guess.

Here is what each thread does by itself; ``warps.py`` adds what a warp does together. ``approx``
functions give the result rounded to nearest, with which a GPU's agree to some units of the last
place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import floats
from tests.ptx.floats import FORMATS, SIGNED, UNSIGNED, Array
from tests.ptx.parser import Instruction

if TYPE_CHECKING:
    from tests.ptx.machine import Execution, Program

Active = slice | Array
"""The threads that execute an instruction: all, or their numbers in order."""
Step = Callable[["Execution", Active], None]
Read = Callable[["Execution", Active], Array]
Write = Callable[["Execution", Active, Array], None]

_KIND = re.compile(r"pred|[us](8|16|32|64)|b(8|16|32|64|128)|b?f(16|32|64)(x2)?|s16x2")


class NotModelled(NotImplementedError):
    """An instruction that the table has no meaning for."""


class Operands:
    """An instruction about to be translated: its modifiers, and access to its operands.

    ``kind``: its last type, "f32"; ``kinds``: all of them.
    """

    def __init__(self, instruction: Instruction, program: Program, name: str, known: frozenset):
        self.texts, self.where = instruction.operands, instruction.where
        self.program = program
        rest = instruction.opcode[len(name) :].replace("::", ":").split(".")[1:]
        self.modifiers = [part for part in rest if not _KIND.fullmatch(part)]
        self.kinds = [part for part in rest if _KIND.fullmatch(part)]
        self.kind = self.kinds[-1] if self.kinds else ""
        unknown = [part for part in self.modifiers if part not in known]
        if unknown:
            raise NotModelled(f"modifier {unknown[0]}: {self.where}")

    def one_of(self, *choices: str) -> str | None:
        """Which of these modifiers the instruction has."""
        return next((part for part in self.modifiers if part in choices), None)

    def number(self, operand: int) -> int:
        """A literal."""
        return int(self.texts[operand], 0)

    def vector(self, operand: int) -> list[str]:
        """The members of {a, b, …}; an operand that is none is its only member."""
        text = self.texts[operand]
        if not text.startswith("{"):
            return [text]
        return [member.strip() for member in text[1:-1].split(",")]

    def reader(self, text: str, kind: str) -> Read:
        """Values of the active threads, or one for all: of "f32", "bf16x2", … floats, decoded; of
        "s32" signed, of others unsigned."""
        if kind == "pred":
            return self._predicate(text)
        raw = self._raw(text, _bits(kind))
        if kind in FORMATS:
            decode = FORMATS[kind].decode
            if not kind.endswith("x2"):
                return lambda execution, active: decode(raw(execution, active))

            def decoded(execution: Execution, active: Active) -> Array:
                # One for all would no longer be one, but two.
                bits = raw(execution, active)
                return decode(np.broadcast_to(bits, execution.count(active)))

            return decoded
        if kind[0] == "s":
            signed = SIGNED[_bits(kind)]
            return lambda execution, active: raw(execution, active).view(signed)
        return raw

    def read(self, operand: int, kind: str | None = None) -> Read:
        return self.reader(self.texts[operand], kind or self.kind)

    def _predicate(self, text: str) -> Read:
        if text.lstrip("-").isdigit():
            constant = np.array([text != "0"])
            return lambda execution, active: constant
        number = self.program.numbers[text.lstrip("!")]
        if text.startswith("!"):
            return lambda execution, active: ~execution.register(number)[active]
        return lambda execution, active: execution.register(number)[active]

    def _raw(self, text: str, bits: int) -> Read:
        unsigned = UNSIGNED[bits]
        if text in self.program.numbers:
            number = self.program.numbers[text]
            if self.program.widths[number] == bits:
                return lambda execution, active: execution.register(number)[active]
            return lambda execution, active: execution.register(number)[active].astype(unsigned)
        if text.startswith("%"):
            return lambda execution, active: execution.special(text)[active].astype(unsigned)
        constant = np.array([self._constant(text) & ((1 << bits) - 1)], unsigned)
        return lambda execution, active: constant

    def _constant(self, text: str) -> int:
        if text[:2] in ("0f", "0d"):
            return int(text[2:], 16)
        symbols = self.program.symbols
        return symbols[text] if text in symbols else int(text.rstrip("U"), 0)

    def writer(self, text: str, kind: str | None = None) -> Write:
        """Stores values of ``kind``; what is narrower than the register is extended."""
        if text == "_":
            return lambda execution, active, values: None
        number = self.program.numbers[text]
        self.program.written.add(number)
        width = self.program.widths[number]
        if width == 1:
            return lambda execution, active, values: execution.set(number, active, values)
        encode = FORMATS[kind].encode if kind in FORMATS else None

        def write(execution: Execution, active: Active, values: Array) -> None:
            if encode:
                values = encode(values)
            bits = values.dtype.itemsize * 8
            if bits != width:
                if values.dtype.kind == "i":
                    values = values.astype(SIGNED[width])
                else:
                    values = values.astype(UNSIGNED[width])
            execution.set(number, active, values.view(UNSIGNED[width]))

        return write

    def write(self, operand: int = 0, kind: str | None = None) -> Write:
        return self.writer(self.texts[operand], kind or self.kind)

    def address(self, operand: int, bits: int) -> Read:
        """[base + offset]: one for each active thread."""
        match = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+)\s*)?\]", self.texts[operand])
        if match is None:
            raise NotModelled(f"address {self.texts[operand]}: {self.where}")
        base = self.reader(match[1], f"u{bits}")
        offset = np.array([int(match[2] or "0", 0) & ((1 << bits) - 1)], UNSIGNED[bits])

        def address(execution: Execution, active: Active) -> Array:
            return np.broadcast_to(base(execution, active) + offset, execution.count(active))

        return address

    def elementwise(
        self, function: Callable[..., Array], *sources: str, result: str | None = None
    ) -> Step:
        """Operand 0 = function(operands 1, …); the kinds of the sources, if not the
        instruction's."""
        if not sources and len(self.kinds) > 1:
            raise NotModelled(f"operands of several types: {self.where}")
        kinds = sources or [self.kind] * (len(self.texts) - 1)
        reads = [self.read(i + 1, kind) for i, kind in enumerate(kinds)]
        write = self.write(0, result)
        keep = floats.flushed if "ftz" in self.modifiers else lambda values: values

        def step(execution: Execution, active: Active) -> None:
            values = [keep(read(execution, active)) for read in reads]
            write(execution, active, keep(function(*values)))

        return step


def _bits(kind: str) -> int:
    return FORMATS[kind].bits if kind in FORMATS else int(re.search(r"\d+", kind)[0])


Translate = Callable[[Operands], Step]
TABLE: dict[str, tuple[Translate, frozenset[str]]] = {}


def opcode(*names: str, modifiers: str = "") -> Callable[[Translate], Translate]:
    """Enters a translation under the names; ``modifiers``: those that it knows, types apart."""

    def enter(translate: Translate) -> Translate:
        for name in names:
            if name in TABLE:
                raise ValueError(f"{name} is in the table")
            TABLE[name] = translate, frozenset(modifiers.split())
        return translate

    return enter


def find(name: str) -> str:
    """The longest entry that an opcode begins with: "cp.async.commit_group" before "cp.async"."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if (start := ".".join(parts[:count])) in TABLE:
            return start
    raise NotModelled(f"opcode {name}")


def translate(instruction: Instruction, program: Program) -> Step:
    """The step, executed by those active threads whose guard holds."""
    name = find(instruction.opcode)
    entry, known = TABLE[name]
    operands = Operands(instruction, program, name, known)
    try:
        step = entry(operands)
    except (KeyError, ValueError, IndexError) as error:
        raise NotModelled(operands.where) from error
    if instruction.guard is None:
        return step
    guard = operands.reader(instruction.guard, "pred")

    def guarded(execution: Execution, active: Active) -> None:
        holds = guard(execution, active)
        if holds.all():
            step(execution, active)
        elif holds.any():
            step(execution, execution.ids(active)[holds])

    return guarded


# Moves and conversions


@opcode("mov")
def _mov(o: Operands) -> Step:
    if o.kind == "pred":
        return o.elementwise(lambda x: x)
    bits = _bits(o.kind)
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
        if _bits(source) > 32:
            raise NotModelled(o.where)
        return o.elementwise(lambda x: x.astype(np.float64), source, result=to)
    bits = _bits(to)
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
    return f"{kind[0]}{2 * _bits(kind)}"


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
    bits, types = _bits(o.kind), SIGNED if o.kind[0] == "s" else UNSIGNED
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
    bits = _bits(o.kind)

    def left(x: Array, by: Array) -> Array:
        moved = x << np.minimum(by, bits - 1).astype(x.dtype)
        return np.where(by < bits, moved, x.dtype.type(0))

    return o.elementwise(left, o.kind, "u32")


@opcode("shr")
def _shr(o: Operands) -> Step:
    bits = _bits(o.kind)

    def right(x: Array, by: Array) -> Array:
        moved = x >> np.minimum(by, bits - 1).astype(x.dtype)
        if x.dtype.kind == "i":  # the sign fills what gets free, all of it if need be
            return moved
        return np.where(by < bits, moved, x.dtype.type(0))

    return o.elementwise(right, o.kind, "u32")


@opcode("bfe")
def _bfe(o: Operands) -> Step:
    if _bits(o.kind) != 32:
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
    bits = f"b{_bits(o.kind)}"
    return o.elementwise(lambda x, y, which: np.where(which, x, y), bits, bits, "pred", result=bits)


# Memory


@opcode("ld.param")
def _ld_param(o: Operands) -> Step:
    base, offset = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", o.texts[1]).groups()
    start = o.program.entry.parameters[base].offset + int(offset or 0)
    kind = SIGNED if o.kind[0] == "s" else UNSIGNED
    dtype, write = kind[_bits(o.kind)], o.write(0, f"b{_bits(o.kind)}")

    def load(execution: Execution, active: Active) -> None:
        write(execution, active, np.frombuffer(execution.parameters, dtype, 1, start))

    return load


def _width(o: Operands) -> int:
    return {"v2": 2, "v4": 4, "v8": 8, None: 1}[o.one_of("v2", "v4", "v8")]


_CACHE = "nc v2 v4 v8 L1:evict_last L1:evict_first L1:no_allocate volatile relaxed"


def _load(space: str, bits: int) -> Translate:
    def translate_load(o: Operands) -> Step:
        count, size = _width(o), _bits(o.kind) // 8
        address = o.address(1, bits)
        dtype = (SIGNED if o.kind[0] == "s" else UNSIGNED)[8 * size]
        writes = [o.writer(text) for text in o.vector(0)]

        def load(execution: Execution, active: Active) -> None:
            loaded = execution.load(
                space, address(execution, active), count * size, execution.ids(active), o.where
            )
            values = np.ascontiguousarray(loaded).view(dtype)
            for i, write in enumerate(writes):
                write(execution, active, values[:, i])

        return load

    return translate_load


def _store(space: str, bits: int) -> Translate:
    def translate_store(o: Operands) -> Step:
        count, size = _width(o), _bits(o.kind) // 8
        address = o.address(0, bits)
        reads = [o.reader(text, f"b{8 * size}") for text in o.vector(1)]

        def store(execution: Execution, active: Active) -> None:
            values = np.empty((execution.count(active), count), UNSIGNED[8 * size])
            for i, read in enumerate(reads):
                values[:, i] = read(execution, active)
            ids = execution.ids(active)
            data = values.view(np.uint8)
            execution.store(space, address(execution, active), data, ids, o.where)

        return store

    return translate_store


for _space, _width_of_address in (("global", 64), ("shared", 32), ("shared::cta", 32)):
    _short = _space.split("::")[0]
    opcode(f"ld.{_space}", modifiers=_CACHE)(_load(_short, _width_of_address))
    opcode(f"st.{_space}", modifiers=_CACHE)(_store(_short, _width_of_address))


@opcode("cp.async", modifiers="ca cg shared global shared:cta L2:128B")
def _cp_async(o: Operands) -> Step:
    """A copy from global to shared memory; what lies beyond the source's size is zero."""
    to, source, size = o.address(0, 32), o.address(1, 64), o.number(2)
    have = o.read(3, "u32") if len(o.texts) > 3 else None

    def copy(execution: Execution, active: Active) -> None:
        count = execution.count(active)
        real = np.broadcast_to(have(execution, active) if have else np.uint32(size), count)
        if not np.isin(real, (0, size)).all():
            raise NotModelled(f"part of a copy: {o.where}")
        execution.begin_copy(
            to(execution, active),
            source(execution, active),
            size,
            real > 0,
            execution.ids(active),
            o.where,
        )

    return copy


@opcode("cp.async.commit_group")
def _commit(o: Operands) -> Step:
    def commit(execution: Execution, active: Active) -> None:
        execution.group[active] += 1

    return commit


@opcode("cp.async.wait_group")
def _wait_group(o: Operands) -> Step:
    left = o.number(0)
    return lambda execution, active: execution.end_copies(active, left)


@opcode("cp.async.wait_all")
def _wait_all(o: Operands) -> Step:
    return lambda execution, active: execution.end_copies(active, None)
