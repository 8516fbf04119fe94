"""Opcodes that read and write memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.floats import SIGNED, UNSIGNED
from tests.ptx.opcodes import Active, NotModelled, Operands, Step, Translate, bits_of, opcode

if TYPE_CHECKING:
    from tests.ptx.machine import Execution


@opcode("ld.param")
def _ld_param(o: Operands) -> Step:
    base, offset = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", o.texts[1]).groups()
    start = o.program.entry.parameters[base].offset + int(offset or 0)
    kind = SIGNED if o.kind[0] == "s" else UNSIGNED
    dtype, write = kind[bits_of(o.kind)], o.write(0, f"b{bits_of(o.kind)}")

    def load(execution: Execution, active: Active) -> None:
        write(execution, active, np.frombuffer(execution.parameters, dtype, 1, start))

    return load


def _width(o: Operands) -> int:
    return {"v2": 2, "v4": 4, "v8": 8, None: 1}[o.one_of("v2", "v4", "v8")]


_CACHE = "nc v2 v4 v8 L1:evict_last L1:evict_first L1:no_allocate volatile relaxed"


def _load(space: str, bits: int) -> Translate:
    def translate_load(o: Operands) -> Step:
        count, size = _width(o), bits_of(o.kind) // 8
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
        count, size = _width(o), bits_of(o.kind) // 8
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
