"""PTX as text → entries of instructions. No meaning is given to an opcode here."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    guard: str | None
    """The predicate register that must hold, after "!" if it must not."""
    opcode: str
    """With its modifiers: "add.rn.f32"."""
    operands: tuple[str, ...]
    line: int
    text: str

    @property
    def where(self) -> str:
        return f"line {self.line}: {self.text[:100]}"


class Label(NamedTuple):
    name: str


class Parameter(NamedTuple):
    offset: int
    size: int


class Entry(NamedTuple):
    """A kernel."""

    name: str
    parameters: dict[str, Parameter]
    registers: dict[str, int]
    """The bits of each; 1 of a predicate."""
    shared: dict[str, int]
    """Where each static array of shared memory begins."""
    shared_bytes: int
    dynamic: dict[str, int]
    """The alignment of arrays whose size the launch says."""
    threads: int | None
    """Of a block, where the kernel says."""
    body: list[Instruction | Label]


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LINE_DIRECTIVE = re.compile(r"^[ \t]*\.(?:loc|file)\b[^\n]*", re.M)
_LABEL = re.compile(r"([\w$]+):(?!:)")
_NAME = re.compile(r"(?<![\w$.])%?[A-Za-z_][\w$]*")
_INSTRUCTION = re.compile(r"(?:@(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_PARAMETER = re.compile(r"\.param\s+([^,()]*?)\s*([\w$]+)(?:\[(\d+)\])?\s*(?=[,)])")


def parse(ptx: str) -> dict[str, Entry]:
    """The entries of a module by name."""
    # What is removed leaves its line breaks: lines are counted as in the file.
    text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), ptx)
    text = _LINE_DIRECTIVE.sub("", text)
    breaks = [match.start() for match in re.finditer("\n", text)]
    dynamic = {
        name: int(alignment)
        for alignment, name in re.findall(
            r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[\]", text
        )
    }
    entries = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)([^{]*)\{", text):
        body = _Body(text, match.end(), breaks)
        limit = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", match[2])
        entries[match[1]] = Entry(
            match[1],
            _parameters(match[2]),
            body.registers,
            body.shared,
            body.shared_bytes,
            dynamic,
            int(limit[1]) if limit else None,
            body.statements,
        )
    return entries


def _parameters(head: str) -> dict[str, Parameter]:
    """Laid out one after the other, each as its alignment asks."""
    parameters, offset = {}, 0
    for attributes, name, count in _PARAMETER.findall(head):
        if count:
            size, alignment = int(count), int(re.search(r"\.align (\d+)", attributes)[1])
        else:
            size = alignment = int(re.search(r"\.[usbf](\d+)", attributes)[1]) // 8
        offset = -(-offset // alignment) * alignment
        parameters[name] = Parameter(offset, size)
        offset += size
    return parameters


class _Body:
    """What stands between the braces of an entry. A register declared in an inner pair of braces
    gets a name of its own."""

    def __init__(self, text: str, start: int, breaks: list[int]):
        self.registers: dict[str, int] = {}
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        self.statements: list[Instruction | Label] = []
        self._scopes: list[dict[str, str]] = [{}]
        self._opened = 0
        for at, statement in self._split(text, start):
            if statement.startswith(".reg"):
                self._declare(statement)
            elif statement.startswith(".shared"):
                self._reserve(statement)
            elif not statement.startswith(".pragma"):
                line = bisect.bisect_left(breaks, at) + 1
                self.statements.append(self._instruction(" ".join(statement.split()), line))

    def _split(self, text: str, at: int) -> Iterator[tuple[int, str]]:
        """(where, statement); scopes and labels on the way are taken note of."""
        while True:
            while text[at].isspace():
                at += 1
            if text[at] == "{":
                self._scopes.append({})
                self._opened += 1
                at += 1
            elif text[at] == "}":
                self._scopes.pop()
                at += 1
                if not self._scopes:
                    return
            elif label := _LABEL.match(text, at):
                # Labels of inner scopes are numbered, too: inline assembly repeats them.
                name = label[1]
                if len(self._scopes) > 1:
                    name = self._scopes[-1].setdefault(name, f"{name}${self._opened}")
                self.statements.append(Label(name))
                at = label.end()
            else:
                end = text.index(";", at)
                yield at, text[at:end].strip()
                at = end + 1

    def _declare(self, statement: str) -> None:
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
        bits = 1 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        for item in names.split(","):
            name, count = re.fullmatch(r"\s*([%\w$]+?)(?:<(\d+)>)?\s*", item).groups()
            for declared in [name] if count is None else [f"{name}{i}" for i in range(int(count))]:
                own = f"%{declared.lstrip('%')}"
                if len(self._scopes) > 1:
                    own += f"${self._opened}"
                self._scopes[-1][declared] = own
                self.registers[own] = bits

    def _reserve(self, statement: str) -> None:
        pattern = r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]"
        alignment, name, size = re.fullmatch(pattern, statement).groups()
        start = -(-self.shared_bytes // int(alignment)) * int(alignment)
        self.shared[name] = start
        self.shared_bytes = start + int(size)

    def _instruction(self, statement: str, line: int) -> Instruction:
        guard, opcode, operands = _INSTRUCTION.fullmatch(statement).groups()
        if guard:
            guard = self._renamed(guard)
        operands = tuple(map(self._renamed, _operands(operands)))
        return Instruction(guard, opcode, operands, line, statement)

    def _renamed(self, operand: str) -> str:
        def own(match: re.Match) -> str:
            for scope in reversed(self._scopes):
                if match[0] in scope:
                    return scope[match[0]]
            return match[0]

        return _NAME.sub(own, operand)


def _operands(text: str) -> list[str]:
    """Split at commas that stand in no braces or brackets."""
    operands, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            operands.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*operands, last] if last else operands
