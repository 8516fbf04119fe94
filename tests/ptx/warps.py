"""Opcodes that a warp, or a group of four, executes together; entries of the table of opcodes.

Tensor cores multiply exactly and add in float64, rounded once to float32: hardware keeps fewer
bits, in an order that nobody documents. Fragments lie in registers as the PTX manual says of each
shape; an 8 × 8 matrix of 16 bits gives lane 4g + t columns 2t and 2t + 1 of row g.

``wgmma`` is executed where it is issued, so that its fences and waits have nothing to do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.floats import FORMATS, Array
from tests.ptx.memory import Divergence
from tests.ptx.opcodes import Active, NotModelled, Operands, Step, opcode

if TYPE_CHECKING:
    from tests.ptx.machine import Execution

WARP = 32
GROUP = 4 * WARP
"""Threads that execute wgmma together."""


def whole_warps(execution: Execution, active: Active, where: str) -> Array:
    """[warps, 32] thread numbers; all threads of a warp must be here."""
    ids = execution.ids(active)
    first = ids[::WARP]
    if len(ids) % WARP or (ids.reshape(-1, WARP) != first[:, None] + np.arange(WARP)).any():
        raise Divergence(f"not all threads of a warp are at {where}")
    if (first % WARP).any():
        raise Divergence(f"not all threads of a warp are at {where}")
    return ids.reshape(-1, WARP)


def _by_warp(execution: Execution, active: Active, values: Array) -> Array:
    return np.broadcast_to(values, execution.count(active)).reshape(-1, WARP)


@opcode("bar.warp", modifiers="sync")
def _bar_warp(o: Operands) -> Step:
    def meet(execution: Execution, active: Active) -> None:
        whole_warps(execution, active, o.where)

    return meet


@opcode("shfl.sync", modifiers="up down bfly idx")
def _shfl(o: Operands) -> Step:
    mode = o.one_of("up", "down", "bfly", "idx")
    text, _, predicate = o.texts[0].partition("|")
    write, found = o.writer(text), o.writer(predicate or "_")
    read, by, clamp, members = (o.read(i, "u32") for i in (1, 2, 3, 4))
    lane = np.arange(WARP)

    def shuffle(execution: Execution, active: Active) -> None:
        whole_warps(execution, active, o.where)
        if (members(execution, active) != 0xFFFFFFFF).any():
            raise NotModelled(f"some lanes of a warp: {o.where}")
        values, b, c = (
            _by_warp(execution, active, r(execution, active)) for r in (read, by, clamp)
        )
        b, c = b.astype(np.int64), c.astype(np.int64)
        segment = c >> 8 & 31
        least, most = lane & segment, (lane & segment) | (c & 31 & ~segment)
        source = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": least | (b & 31 & ~segment),
        }[mode]
        inside = source >= most if mode == "up" else source <= most
        found(execution, active, inside.ravel())
        write(
            execution,
            active,
            np.take_along_axis(values, np.where(inside, source, lane), 1).ravel(),
        )

    return shuffle


_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux.sync", modifiers=" ".join(_REDUCTIONS))
def _redux(o: Operands) -> Step:
    reduction, read, write = _REDUCTIONS[o.modifiers[0]], o.read(1), o.write()

    def reduce(execution: Execution, active: Active) -> None:
        whole_warps(execution, active, o.where)
        values = _by_warp(execution, active, read(execution, active))
        total = reduction.reduce(values, axis=1, dtype=values.dtype)
        write(execution, active, np.repeat(total, WARP))

    return reduce


@opcode("elect.sync")
def _elect(o: Operands) -> Step:
    """The first lane is elected."""
    lane, _, elected = o.texts[0].partition("|")
    write, which = o.writer(lane), o.writer(elected)

    def elect(execution: Execution, active: Active) -> None:
        warps = whole_warps(execution, active, o.where)
        write(execution, active, np.zeros(warps.size, np.uint32))
        which(execution, active, (warps % WARP == 0).ravel())

    return elect


# Matrices of 8 × 8 values of 16 bits, between registers and shared memory

_MATRIX = "aligned m8n8 x1 x2 x4 trans shared shared:cta"


@opcode("ldmatrix.sync", modifiers=_MATRIX)
def _ldmatrix(o: Operands) -> Step:
    """Lane 8i + r gives the address of row r of matrix i."""
    count = int((o.one_of("x1", "x2", "x4") or "x1")[1:])
    writes, address = [o.writer(text) for text in o.vector(0)], o.address(1, 32)

    def load(execution: Execution, active: Active) -> None:
        warps = whole_warps(execution, active, o.where)
        rows = warps[:, : 8 * count].ravel()
        addresses = address(execution, active).reshape(-1, WARP)[:, : 8 * count].ravel()
        values = execution.load("shared", addresses, 16, rows, o.where)
        matrices = np.ascontiguousarray(values).view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in o.modifiers:
            matrices = matrices.transpose(0, 1, 3, 2)
        fragments = np.ascontiguousarray(matrices).view(np.uint32)
        for i, write in enumerate(writes):
            write(execution, active, fragments[:, i].ravel())

    return load


@opcode("stmatrix.sync", modifiers=_MATRIX)
def _stmatrix(o: Operands) -> Step:
    count = int((o.one_of("x1", "x2", "x4") or "x1")[1:])
    address, reads = o.address(0, 32), [o.reader(text, "b32") for text in o.vector(1)]

    def store(execution: Execution, active: Active) -> None:
        warps = whole_warps(execution, active, o.where)
        rows = warps[:, : 8 * count].ravel()
        addresses = address(execution, active).reshape(-1, WARP)[:, : 8 * count].ravel()
        matrices = np.stack([_matrix(execution, active, read) for read in reads], 1)
        if "trans" in o.modifiers:
            matrices = matrices.transpose(0, 1, 3, 2)
        values = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
        execution.store("shared", addresses, values, rows, o.where)

    return store


def _matrix(execution: Execution, active: Active, read) -> Array:
    """[warps, 8, 8] of 16 bits, out of a register of each lane."""
    fragment = np.ascontiguousarray(_by_warp(execution, active, read(execution, active)))
    return fragment.view(np.uint16).reshape(-1, 8, 8)


# Tensor cores


def _decoder(o: Operands):
    """Of a product's factors: float16 or bfloat16, sums in float32."""
    result, *factors, total = o.kinds
    if result != "f32" or total not in ("f32", factors[-1]) or len(set(factors)) != 1:
        raise NotModelled(o.where)
    decode = FORMATS[factors[0]].decode
    return lambda bits: decode(np.ascontiguousarray(bits)).astype(np.float64)


def _shape(o: Operands) -> tuple[int, int, int]:
    shape = next(part for part in o.modifiers if part.startswith("m"))
    return tuple(int(n) for n in re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())


@opcode("mma.sync", modifiers="aligned m16n8k8 m16n8k16 row col")
def _mma(o: Operands) -> Step:
    """d = a·b + c of a warp: a [16, k], b [k, 8]."""
    decode, (_, _, depth) = _decoder(o), _shape(o)
    if o.kinds[1] not in ("f16", "bf16"):
        raise NotModelled(o.where)
    writes = [o.writer(text, "f32") for text in o.vector(0)]
    a, b = ([o.reader(text, "b32") for text in o.vector(i)] for i in (1, 2))
    c = [o.reader(text, "f32") for text in o.vector(3)]

    def multiply(execution: Execution, active: Active) -> None:
        count = len(whole_warps(execution, active, o.where))
        A = np.empty((count, 16, depth))
        for i, read in enumerate(a):  # rows 0–7, rows 8–15, then the next columns
            rows, columns = slice(i % 2 * 8, i % 2 * 8 + 8), slice(i // 2 * 8, i // 2 * 8 + 8)
            A[:, rows, columns] = decode(_matrix(execution, active, read))
        B = np.concatenate([decode(_matrix(execution, active, read)) for read in b], 2)
        sums = A @ B.transpose(0, 2, 1)  # B is stored by column
        for i, (read, write) in enumerate(zip(c, writes, strict=True)):
            half = sums[:, i // 2 * 8 : i // 2 * 8 + 8, i % 2 :: 2]
            write(execution, active, half.reshape(-1) + read(execution, active))

    return multiply


@opcode("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", modifiers="sync aligned")
def _wgmma_order(o: Operands) -> Step:
    def meet(execution: Execution, active: Active) -> None:
        whole_warps(execution, active, o.where)

    return meet


@opcode("fence", modifiers="proxy async async:shared shared:cta")
def _fence(o: Operands) -> Step:
    return lambda execution, active: None


_WGMMA = " ".join(("sync aligned", *(f"m64n{n}k16" for n in range(8, 257, 8))))


@opcode("wgmma.mma_async", modifiers=_WGMMA)
def _wgmma(o: Operands) -> Step:
    """d = a·b + d of four warps: a [64, 16] out of registers or shared memory, b [16, n]."""
    decode, (_, width, depth) = _decoder(o), _shape(o)
    writes = [o.writer(text, "f32") for text in o.vector(0)]
    d = [o.reader(text, "f32") for text in o.vector(0)]
    registers = o.texts[1].startswith("{")
    a = [o.reader(text, "b32" if registers else "u64") for text in o.vector(1)]
    b, keep = o.read(2, "u64"), o.read(3, "pred")
    signs, transposed = o.texts[4:6], [text == "1" for text in o.texts[6:]]
    if signs != ("1", "1"):
        raise NotModelled(f"negated factors: {o.where}")

    def multiply(execution: Execution, active: Active) -> None:
        warps = whole_warps(execution, active, o.where)
        if len(warps) % 4 or (warps[::4, 0] % GROUP).any():
            raise Divergence(f"not all warps of a group are at {o.where}")
        groups = len(warps) // 4
        leaders = warps[::4, 0]

        def from_shared(read, rows: int, columns_first: bool) -> Array:
            descriptors = np.broadcast_to(read(execution, active), warps.size)[::GROUP]
            return decode(described(execution, descriptors, leaders, rows, columns_first, o.where))

        if registers:
            A = np.empty((len(warps), 16, depth))
            for i, read in enumerate(a):
                rows, columns = slice(i % 2 * 8, i % 2 * 8 + 8), slice(i // 2 * 8, i // 2 * 8 + 8)
                A[:, rows, columns] = decode(_matrix(execution, active, read))
            A = A.reshape(groups, 64, depth)
        else:
            A = from_shared(a[0], 64, transposed[0])
        B = from_shared(b, width, transposed[-1])
        sums = (A @ B.transpose(0, 2, 1)).reshape(len(warps), 2, 8, width // 8, 4, 2)
        kept = np.broadcast_to(keep(execution, active), warps.size)
        for i, (read, write) in enumerate(zip(d, writes, strict=True)):
            tile, half, column = i // 4, i % 4 // 2, i % 2
            # Where nothing is kept, the register may never have been written.
            before = np.where(kept, read(execution, active), 0) if kept.any() else 0
            write(execution, active, sums[:, half, :, tile, :, column].reshape(-1) + before)

    return multiply


def described(
    execution: Execution,
    descriptors: Array,
    ids: Array,
    rows: int,
    transposed: bool,
    where: str,
) -> Array:
    """[n, rows, 16] of 16 bits out of shared memory, read by a thread each, as its descriptor says:
    where a matrix starts, the bytes between its parts (leading and stride), how it is swizzled."""
    descriptor = descriptors.astype(np.int64)
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = {0: 1, 3: 2, 2: 4, 1: 8}[int(descriptor[0] >> 62 & 3)]  # rows of 16 bytes that mix
    row, depth = np.arange(rows)[:, None], np.arange(16)[None]
    leading, stride = leading[:, None, None], stride[:, None, None]
    wide = 8 * swizzle  # values side by side
    if transposed and swizzle > 1:
        at = row % wide * 2 + leading * (row // wide) + 2 * wide * (depth % 8)
        at = at + stride * (depth // 8)
    elif transposed:
        at = row % 8 * 2 + stride * (row // 8) + 16 * (depth % 8) + leading * (depth // 8)
    elif swizzle > 1:
        at = 2 * wide * (row % 8) + stride * (row // 8) + depth * 2
    else:
        at = 16 * (row % 8) + stride * (row // 8) + depth % 8 * 2 + leading * (depth // 8)
    at = start[:, None, None] + at
    at ^= (at & (swizzle - 1 << 7)) >> 3
    values = execution.load(
        "shared", at.ravel(), 2, np.repeat(ids, at[0].size), where, counted=False
    )
    return np.ascontiguousarray(values).view(np.uint16).reshape(len(ids), rows, 16)
