"""The table of opcodes: what an instruction does to the threads that are active.

One entry per opcode: :func:`opcode` puts a function into :data:`TABLE` that reads an instruction's
operands once, when the kernel is loaded, and returns the step that executes it. What is not in the
table, a modifier included, raises :class:`NotModelled`: nothing is executed by guess.

``arithmetic.py`` and ``accesses.py`` hold what each thread does by itself, ``warps.py`` and
``tensor_memory.py`` what a warp does together.
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
        self.written: list[int] = []  # registers
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
        raw = self._raw(text, bits_of(kind))
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
            signed = SIGNED[bits_of(kind)]
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
        self.written.append(number)
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


def bits_of(kind: str) -> int:
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
        else:
            for number in operands.written:
                execution.pass_over(number)

    return guarded
