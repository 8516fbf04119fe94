"""The tensor cores of sm_100: their memory, and products that one thread issues; entries of the
table of opcodes.

Tensor memory is 128 lanes of 512 columns of 32 bits to a block; an address has the lane in its
upper half. Products of 64 rows are modelled, by one block (``cta_group::1``), of 16 bits: rows 16w
… 16w + 15 of a matrix lie in lanes 32w … 32w + 15, or 16 further on. All is executed where it is
issued, so that waits have nothing to do and barriers in memory (mbarrier) count arrivals alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.floats import FORMATS, Array
from tests.ptx.memory import Fault, Uninitialised
from tests.ptx.opcodes import Active, NotModelled, Operands, Step, opcode
from tests.ptx.warps import WARP, described, whole_warps

if TYPE_CHECKING:
    from tests.ptx.machine import Execution

LANES, COLUMNS = 128, 512
ROWS = 64
DEPTH = 16


class TensorMemory:
    """That of several blocks. ``end``: the columns that a block has allocated."""

    def __init__(self, blocks: int):
        self.data = np.zeros((blocks, LANES, COLUMNS), np.uint32)
        self.initialised = np.zeros((blocks, LANES, COLUMNS), bool)
        self.end = np.zeros(blocks, np.int64)

    def load(self, blocks: Array, lanes: Array, columns: Array, where: str) -> Array:
        self._check(blocks, columns, where)
        if not self.initialised[blocks, lanes, columns].all():
            raise Uninitialised(f"read of tensor memory that nobody wrote: {where}")
        return self.data[blocks, lanes, columns]

    def store(self, blocks: Array, lanes: Array, columns: Array, values: Array, where: str) -> None:
        self._check(blocks, columns, where)
        self.data[blocks, lanes, columns] = values
        self.initialised[blocks, lanes, columns] = True

    def _check(self, blocks: Array, columns: Array, where: str) -> None:
        if (columns >= self.end[blocks]).any():
            raise Fault(f"tensor memory that is not allocated: {where}")


_ORDER = "sync aligned cta_group:1 shared:cta"


@opcode("tcgen05.alloc", modifiers=_ORDER)
def _alloc(o: Operands) -> Step:
    """A block's first columns; their address goes to shared memory."""
    address, columns = o.address(0, 32), o.number(1)

    def allocate(execution: Execution, active: Active) -> None:
        first = whole_warps(execution, active, o.where)[:, 0]
        memory = execution.tensor_memory(TensorMemory)
        blocks = execution.block[first]
        if memory.end[blocks].any():
            raise NotModelled(f"a second allocation: {o.where}")
        memory.end[blocks] = columns
        zero = np.zeros((len(first), 4), np.uint8)
        execution.store("shared", address(execution, active)[::WARP], zero, first, o.where)

    return allocate


@opcode("tcgen05.dealloc", modifiers=_ORDER)
def _dealloc(o: Operands) -> Step:
    def free(execution: Execution, active: Active) -> None:
        first = whole_warps(execution, active, o.where)[:, 0]
        execution.tensor_memory(TensorMemory).end[execution.block[first]] = 0

    return free


@opcode("tcgen05.relinquish_alloc_permit", modifiers=_ORDER)
@opcode("tcgen05.wait::ld", "tcgen05.wait::st", modifiers=_ORDER)
def _meet(o: Operands) -> Step:
    def meet(execution: Execution, active: Active) -> None:
        whole_warps(execution, active, o.where)

    return meet


_SHAPE = "sync aligned 16x32bx2 x1 x2 x4 x8 x16 x32 x64 x128"


def _places(o: Operands, memory_operand: int):
    """Where a warp's accesses of shape 16x32bx2 go: (blocks, lanes, columns) of the first register.
    Lanes 16 … 31 of the warp go to lanes 0 … 15 of the memory, further right."""
    address, right = o.address(memory_operand, 32), o.number(memory_operand + 1)

    def places(execution: Execution, active: Active) -> tuple[Array, Array, Array]:
        threads = whole_warps(execution, active, o.where).ravel()
        addresses = address(execution, active).astype(np.int64)
        lanes, columns = addresses >> 16, addresses & 0xFFFF
        if (lanes // WARP != execution.warp[threads] % 4).any():
            raise Fault(f"lanes of tensor memory that are another warp's: {o.where}")
        thread = threads % WARP
        return execution.block[threads], lanes + thread % 16, columns + thread // 16 * right

    return places


@opcode("tcgen05.st", modifiers=_SHAPE)
def _st(o: Operands) -> Step:
    places, reads = _places(o, 0), [o.reader(text, "b32") for text in o.vector(2)]

    def store(execution: Execution, active: Active) -> None:
        blocks, lanes, columns = places(execution, active)
        memory = execution.tensor_memory(TensorMemory)
        for i, read in enumerate(reads):
            memory.store(blocks, lanes, columns + i, read(execution, active), o.where)

    return store


@opcode("tcgen05.ld", modifiers=_SHAPE)
def _ld(o: Operands) -> Step:
    places, writes = _places(o, 1), [o.writer(text) for text in o.vector(0)]

    def load(execution: Execution, active: Active) -> None:
        blocks, lanes, columns = places(execution, active)
        memory = execution.tensor_memory(TensorMemory)
        for i, write in enumerate(writes):
            write(execution, active, memory.load(blocks, lanes, columns + i, o.where))

    return load


@opcode("tcgen05.mma", modifiers="cta_group:1 kind:f16")
def _mma(o: Operands) -> Step:
    """d = a·b + d, a [64, 16] out of tensor or shared memory, b [16, n] out of shared memory. A
    descriptor says which formats, which of a and b are transposed, and how large they are."""
    d, a_is_tensor = o.address(0, 32), o.texts[1].startswith("[")
    a = o.address(1, 32) if a_is_tensor else o.read(1, "u64")
    b, description, keep = o.read(2, "u64"), o.read(3, "u32"), o.read(4, "pred")

    def multiply(execution: Execution, active: Active) -> None:
        issuers, count = execution.ids(active), execution.count(active)
        blocks = execution.block[issuers]
        if len(np.unique(blocks)) != count:
            raise Fault(f"issued by more than one thread of a block: {o.where}")
        memory = execution.tensor_memory(TensorMemory)
        formats = int(description(execution, active)[0])
        kinds = [("f16", "bf16")[formats >> at & 7] for at in (7, 10)]
        width = (formats >> 17 & 63) << 3
        if formats >> 4 & 3 != 1 or (formats >> 24 & 31) << 4 != ROWS or formats >> 13 & 3:
            raise NotModelled(f"descriptor {formats:#x}: {o.where}")

        def lanes(address: Array) -> Array:
            row = np.arange(ROWS)
            return (address.astype(np.int64) >> 16)[:, None] + row // 16 * WARP + row % 16

        def one_each(read) -> Array:
            return np.broadcast_to(read(execution, active), count)

        def from_shared(read, rows: int, transposed: int) -> Array:
            descriptors = one_each(read)
            return described(execution, descriptors, issuers, rows, bool(transposed), o.where)

        if a_is_tensor:
            start = one_each(a)
            columns = (start & np.uint32(0xFFFF))[:, None, None] + np.arange(DEPTH // 2)
            place = blocks[:, None, None], lanes(start)[:, :, None], columns
            pairs = memory.load(*np.broadcast_arrays(*place), o.where)
            A = np.ascontiguousarray(pairs).view(np.uint16)
        else:
            A = from_shared(a, ROWS, formats >> 15 & 1)
        B = from_shared(b, width, formats >> 16 & 1)
        A, B = (
            FORMATS[kind].decode(np.ascontiguousarray(bits)).astype(np.float64)
            for kind, bits in zip(kinds, (A, B), strict=True)
        )
        sums = A @ B.transpose(0, 2, 1)
        start = one_each(d)
        columns = (start & np.uint32(0xFFFF))[:, None, None] + np.arange(width)
        place = np.broadcast_arrays(blocks[:, None, None], lanes(start)[:, :, None], columns)
        kept = np.flatnonzero(one_each(keep))
        if len(kept):
            before = memory.load(*(part[kept] for part in place), o.where)
            sums[kept] += before.view(np.float32)
        memory.store(*place, sums.astype(np.float32).view(np.uint32), o.where)

    return multiply


# Barriers in shared memory


class Mbarrier:
    def __init__(self, count: int):
        self.count = self.missing = count
        self.phase = 0

    def arrive(self) -> None:
        self.missing -= 1
        if not self.missing:
            self.missing, self.phase = self.count, self.phase ^ 1


_BARRIER = "shared shared:cta shared:cluster cta_group:1 mbarrier:arrive:one parity"


def _keys(execution: Execution, active: Active, address) -> list[tuple[int, int]]:
    blocks = execution.block[execution.ids(active)].tolist()
    return list(zip(blocks, address(execution, active).tolist(), strict=True))


@opcode("mbarrier.init", modifiers=_BARRIER)
def _init(o: Operands) -> Step:
    address, count = o.address(0, 32), o.number(1)

    def initialise(execution: Execution, active: Active) -> None:
        for key in _keys(execution, active, address):
            if key in execution.barriers:
                raise Fault(f"a barrier begun twice: {o.where}")
            execution.barriers[key] = Mbarrier(count)

    return initialise


def _barrier(execution: Execution, key: tuple[int, int], where: str) -> Mbarrier:
    if key not in execution.barriers:
        raise Uninitialised(f"no barrier there: {where}")
    return execution.barriers[key]


@opcode("mbarrier.inval", modifiers=_BARRIER)
def _inval(o: Operands) -> Step:
    address = o.address(0, 32)

    def invalidate(execution: Execution, active: Active) -> None:
        for key in _keys(execution, active, address):
            _barrier(execution, key, o.where)
            del execution.barriers[key]

    return invalidate


@opcode("tcgen05.commit", modifiers=_BARRIER)
def _commit(o: Operands) -> Step:
    """Arrives when the products issued before are done: they are."""
    address = o.address(0, 32)

    def commit(execution: Execution, active: Active) -> None:
        for key in _keys(execution, active, address):
            _barrier(execution, key, o.where).arrive()

    return commit


@opcode("mbarrier.try_wait", modifiers=_BARRIER)
def _try_wait(o: Operands) -> Step:
    """Whether the phase of this parity is over."""
    write, address, parity = o.write(0, "pred"), o.address(1, 32), o.read(2, "u32")

    def wait(execution: Execution, active: Active) -> None:
        keys = _keys(execution, active, address)
        phases = np.array([_barrier(execution, key, o.where).phase for key in keys])
        write(execution, active, phases != parity(execution, active))

    return wait
