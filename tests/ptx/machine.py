"""Launches an entry: the threads of many blocks at once, with numpy.

Threads have program counters of their own, at the grain of basic blocks. At each step those of
least rank (see ``flow.py``) execute one block together; a seeded random schedule lets only some
warps run at a step. Instructions of a block are never interleaved with those of other warps, which
the checks of races make up for: they do not depend on the order.

Barrier 0 of all threads that have not returned is modelled; other barriers, calls, generic
addresses, clusters and texture are not. Blocks are independent: they run in groups, one after the
other.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.ptx import accesses, arithmetic, tensor_memory, warps  # noqa: F401  (the opcodes)
from tests.ptx.counters import Counts
from tests.ptx.floats import UNSIGNED, Array
from tests.ptx.flow import Flow, is_end_of_block
from tests.ptx.memory import Deadlock, Divergence, Fault, GlobalMemory, Race, SharedMemory
from tests.ptx.opcodes import Active, NotModelled, Operands, Step, translate
from tests.ptx.parser import Entry, Instruction

WARP = 32
THREADS = 4096
"""Of the blocks that run together: as many as stay in a CPU's cache."""
STEPS = 10**6
"""Basic blocks after which a launch counts as endless."""
LARGEST_X, LARGEST_YZ = 2**31 - 1, 65535
"""Blocks along the axes of a grid, from CUDA's programming guide (compute capabilities)."""

_BRANCHES = ("bra", "bra.uni")
_RETURNS = ("ret", "exit")
_BARRIERS = ("bar.sync", "barrier.sync.aligned", "barrier.sync")
_VOTES = {"bar.red.or.pred": np.any, "bar.red.and.pred": np.all}
_CONTROL = (*_BRANCHES, *_RETURNS, *_BARRIERS, *_VOTES)


class Block(NamedTuple):
    """A basic block, translated."""

    steps: list[Step]
    last: Instruction | None
    """The branch, return or barrier at its end."""
    operands: Operands | None
    """Those of ``last``."""
    opcodes: Counter[str]


class Program:
    """An entry ready to run: registers by number, symbols placed, instructions translated."""

    def __init__(self, entry: Entry, dynamic_bytes: int = 0):
        self.entry = entry
        self.numbers = {name: i for i, name in enumerate(entry.registers)}
        self.widths = list(entry.registers.values())
        self.written: set[int] = set()
        """Registers that an instruction writes. Of others compilers read half a pair whose result
        they leave; they hold what is no number."""
        self.symbols = dict(entry.shared)
        end = entry.shared_bytes
        for name, alignment in entry.dynamic.items():
            end = -(-end // alignment) * alignment
            self.symbols[name] = end
        self.shared_bytes = max(16, -(-(end + dynamic_bytes) // 16) * 16)
        self.flow = Flow(entry)
        self.grain = _grain(self.flow.blocks)
        self.blocks = [self._translated(block) for block in self.flow.blocks]

    def _translated(self, block: list[Instruction]) -> Block:
        last, operands = None, None
        opcodes = Counter(instruction.opcode for instruction in block)
        if block and is_end_of_block(block[-1]):
            *block, last = block
            if last.opcode not in _CONTROL:
                raise NotModelled(last.where)
            operands = Operands(last, self, last.opcode, frozenset())
        return Block([translate(i, self) for i in block], last, operands, opcodes)

    def launch(
        self,
        memory: GlobalMemory,
        grid: Sequence[int],
        threads: int,
        parameters: Sequence[int | float | bytes],
        *,
        blocks: Sequence[int] | None = None,
        counts: Counts | None = None,
        seed: int | None = None,
    ) -> None:
        """Executes the kernel.

        Args:
            memory: what pointers point to.
            grid: blocks along up to three axes.
            threads: of a block, along one axis.
            parameters: in order; those not given are zero.
            blocks: these only, by number, x fastest.
            counts: is added to; without it nothing is counted, which is faster.
            seed: of a random schedule; without it the order is fixed.
        """
        if self.entry.threads is not None and threads > self.entry.threads:
            raise ValueError(f"{self.entry.name} takes {self.entry.threads} threads, got {threads}")
        grid = (*grid, 1, 1)[:3]
        if grid[0] > LARGEST_X or max(grid[1:]) > LARGEST_YZ:
            raise Fault(f"no GPU launches a grid of {grid}")
        numbers = np.arange(np.prod(grid)) if blocks is None else np.asarray(blocks)
        packed = self._pack(parameters)
        together = max(1, THREADS // threads)
        random = None if seed is None else np.random.default_rng(seed)
        with np.errstate(all="ignore"):
            for first in range(0, len(numbers), together):
                some = numbers[first : first + together]
                Execution(self, memory, grid, threads, packed, some, counts, random).run()

    def _pack(self, values: Sequence[int | float | bytes]) -> bytes:
        slots = list(self.entry.parameters.values())
        packed = bytearray(max((slot.offset + slot.size for slot in slots), default=0))
        for slot, value in zip(slots, values, strict=False):
            if isinstance(value, float):
                value = struct.pack("<f", value)
            elif isinstance(value, int):
                value = (value & (1 << 8 * slot.size) - 1).to_bytes(slot.size, "little")
            if len(value) != slot.size:
                raise ValueError(f"a parameter of {slot.size} bytes, got {len(value)}")
            packed[slot.offset : slot.offset + slot.size] = value
        return bytes(packed)


def _grain(blocks: list[list[Instruction]]) -> int:
    """Bytes that every access to shared memory is a multiple of."""
    grain = 4
    for block in blocks:
        for instruction in block:
            parts = instruction.opcode.split(".")
            if parts[0] in ("ld", "st") and parts[1].startswith("shared"):
                grain = min(grain, int(parts[-1][1:]) // 8)
            elif parts[0] in ("wgmma", "tcgen05"):
                grain = min(grain, 2)
    return grain


class Execution:
    """Some blocks of a launch, under way. Its methods are what steps may use."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        grid: tuple[int, int, int],
        threads: int,
        parameters: bytes,
        blocks: Array,
        counts: Counts | None,
        random: np.random.Generator | None,
    ):
        if threads % WARP:
            raise NotModelled(f"blocks of {threads} threads: no whole warps")
        self.program, self.memory, self.parameters = program, memory, parameters
        self.counts, self.random = counts, random
        self.total = total = threads * len(blocks)
        self.shape = len(blocks), threads
        self.registers: list[Array | None] = [None] * len(program.widths)
        self.block = np.repeat(np.arange(len(blocks)), threads)
        self.grid_block = np.repeat(blocks, threads).astype(np.int32)
        self.warp = np.tile(np.arange(threads) // WARP, len(blocks))
        self.shared = SharedMemory(len(blocks), program.shared_bytes, program.grain)
        self.barriers: dict[tuple[int, int], Any] = {}  # by block and address in shared memory
        self._tensor_memory: Any = None
        self.everyone = np.arange(total)
        self.rank = np.full(total, program.flow.rank[0])
        self.alive = np.ones(total, bool)
        self.waiting = np.zeros(total, bool)
        self.said = np.zeros(total, bool)  # what a thread brings to a voting barrier
        self.group = np.zeros(total, np.int32)  # of asynchronous copies, the one being issued
        self.copies: list[tuple[Array, Array, Array, Array, str]] = []
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        x, y, z = (np.uint32(n) for n in grid)
        number = self.grid_block.astype(np.uint32)
        zero, one = np.zeros_like(thread), np.ones_like(thread)
        self._special = {
            "%tid.x": thread,
            "%tid.y": zero,
            "%tid.z": zero,
            "%ntid.x": one * np.uint32(threads),
            "%ntid.y": one,
            "%ntid.z": one,
            "%laneid": thread % np.uint32(WARP),
            "%warpid": thread // np.uint32(WARP),
            "%ctaid.x": number % x,
            "%ctaid.y": number // x % y,
            "%ctaid.z": number // x // y,
            "%nctaid.x": one * x,
            "%nctaid.y": one * y,
            "%nctaid.z": one * z,
        }

    # Registers and threads

    def special(self, name: str) -> Array:
        if name not in self._special:
            raise NotModelled(f"special register {name}")
        return self._special[name]

    def register(self, number: int) -> Array:
        values = self.registers[number]
        if values is None:
            if number in self.program.written:
                name = list(self.program.numbers)[number]
                raise Fault(f"register {name} is read, and no thread has come to what writes it")
            self.pass_over(number)
        return self.registers[number]

    def pass_over(self, number: int) -> None:
        """A thread comes to what writes this register and does not: it holds what is no number.
        Compilers load for some threads and read in all, to leave what comes of the others."""
        if self.registers[number] is None:
            dtype = UNSIGNED.get(self.program.widths[number], np.bool_)
            self.registers[number] = np.full(self.total, -1).astype(dtype)

    def set(self, number: int, active: Active, values: Array) -> None:
        self.pass_over(number)
        self.registers[number][active] = values

    def ids(self, active: Active) -> Array:
        return self.everyone if isinstance(active, slice) else active

    def count(self, active: Active) -> int:
        return self.total if isinstance(active, slice) else len(active)

    # Memory

    def load(
        self, space: str, addresses: Array, size: int, ids: Array, where: str, counted: bool = True
    ) -> Array:
        counts = self.counts if counted else None
        if space == "global":
            return self.memory.load(addresses, size, ids // WARP, counts, where)
        if counts:
            counts.shared_access(ids, addresses.astype(np.int64), size)
        blocks = self.block[ids]
        places = self.shared.place(addresses, size, blocks, where)
        return self.shared.load(places, size, blocks, self.warp[ids], where)

    def store(self, space: str, addresses: Array, values: Array, ids: Array, where: str) -> None:
        if space == "global":
            blocks = self.grid_block[ids]
            self.memory.store(addresses, values, blocks, ids // WARP, self.counts, where)
            return
        if self.counts:
            self.counts.shared_access(ids, addresses.astype(np.int64), values.shape[1])
        blocks = self.block[ids]
        places = self.shared.place(addresses, values.shape[1], blocks, where)
        self.shared.store(places, values, blocks, self.warp[ids], where)

    def tensor_memory(self, make: Callable[[int], Any]) -> Any:
        """That of the blocks, made when it is first used."""
        if self._tensor_memory is None:
            self._tensor_memory = make(self.shape[0])
        return self._tensor_memory

    def begin_copy(
        self, to: Array, source: Array, size: int, real: Array, ids: Array, where: str
    ) -> None:
        """An asynchronous copy into shared memory; where not ``real``, of zeros."""
        values = np.zeros((len(ids), size), np.uint8)
        if real.any():
            values[real] = self.load("global", source[real], size, ids[real], where)
        blocks = self.block[ids]
        places = self.shared.place(to, size, blocks, where)
        if self.counts:
            self.counts.shared_access(ids, to.astype(np.int64), size)
        self.shared.begin_copy(places, size, blocks, self.warp[ids], where)
        self.copies.append((ids, places, values, self.group[ids], where))

    def end_copies(self, active: Active, left: int | None) -> None:
        """The threads wait for all copies of theirs but the last ``left`` committed groups; with
        None for all."""
        waits = np.zeros(self.total, bool)
        waits[active] = True
        under_way = []
        for ids, places, values, group, where in self.copies:
            done = waits[ids]
            if left is not None:
                done &= group < self.group[ids] - left
            if done.any():
                members = ids[done]
                self.shared.end_copy(
                    places[done], values[done], self.block[members], self.warp[members], where
                )
            if not done.all():
                rest = ~done
                under_way.append((ids[rest], places[rest], values[rest], group[rest], where))
        self.copies = under_way

    # Control

    def run(self) -> None:
        everyone = slice(None)
        for _ in range(STEPS):
            ready = self.alive & ~self.waiting
            if not ready.any():
                if self.alive.any():
                    raise Deadlock("threads wait at barriers for each other")
                if self.copies:
                    raise Race(f"nobody waits for an asynchronous copy: {self.copies[0][-1]}")
                return
            if self.random is not None:
                by_warp = ready.reshape(-1, WARP)
                runs = by_warp.any(1) & (self.random.random(len(by_warp)) < 0.25)
                ready = (by_warp & runs[:, None]).ravel() if runs.any() else ready
            least = self.rank[ready].min()
            ready &= self.rank == least
            self._block(
                self.program.flow.order[least],
                everyone if ready.all() else np.flatnonzero(ready),
            )
        raise Deadlock(f"no end after {STEPS} basic blocks")

    def _block(self, number: int, active: Active) -> None:
        block = self.program.blocks[number]
        if self.counts:
            warps = self.total // WARP
            if not isinstance(active, slice):
                warps = len(np.unique(active // WARP))
            self.counts.instructions_of(block.opcodes, warps)
        for step in block.steps:
            step(self, active)
        if number + 1 == len(self.program.blocks):
            self.alive[active] = False
            self._release()
            return
        self.rank[active] = self.program.flow.rank[number + 1]
        if block.last is not None:
            self._control(block, active)

    def _control(self, block: Block, active: Active) -> None:
        """The end of a block: by default threads go on with the next one."""
        last, taken = block.last, self.ids(active)
        if last.guard:
            taken = taken[block.operands.reader(last.guard, "pred")(self, active)]
        if last.opcode in _BRANCHES:
            target = self.program.flow.labels[last.operands[0]]
            self.rank[taken] = self.program.flow.rank[target]
        elif last.opcode in _RETURNS:
            self.alive[taken] = False
            self._release()
        else:
            self._arrive(block, taken)

    def _arrive(self, block: Block, arrived: Array) -> None:
        last = block.last
        votes = last.opcode in _VOTES
        if last.operands[votes : votes + 1] != ("0",) or len(last.operands) != (3 if votes else 1):
            raise NotModelled(f"a barrier of some threads: {last.where}")
        here = np.zeros(self.total, bool)
        here[arrived] = True
        here, alive = here.reshape(-1, WARP), self.alive.reshape(-1, WARP)
        some = here.any(1)
        if (here[some] != alive[some]).any():
            raise Divergence(f"not all threads of a warp are at {last.where}")
        if votes:
            said = block.operands.read(2, "pred")(self, arrived)
            self.said[arrived] = said
        self.waiting[arrived] = True
        self._release()

    def _release(self) -> None:
        """Blocks all of whose threads wait, or have returned, go on."""
        waiting, alive = (v.reshape(self.shape) for v in (self.waiting, self.alive))
        ready = waiting.any(1) & (waiting | ~alive).all(1)
        if not ready.any():
            return
        for block in np.flatnonzero(ready):
            ranks = self.rank.reshape(self.shape)[block][waiting[block]]
            if (ranks != ranks[0]).any():
                raise Deadlock("threads of a block wait at different barriers")
            self._vote(block, waiting[block], ranks[0])
        self.waiting.reshape(self.shape)[ready] = False
        self.shared.epoch[ready] += 1

    def _vote(self, block: int, waiting: Array, rank: int) -> None:
        """Tells those that waited what all of them said. They go on with the basic block after the
        one that the barrier ends."""
        ended = self.program.blocks[self.program.flow.order[rank] - 1]
        if ended.last is None or ended.last.opcode not in _VOTES:
            return
        result = _VOTES[ended.last.opcode](self.said.reshape(self.shape)[block][waiting])
        members = block * self.shape[1] + np.flatnonzero(waiting)
        ended.operands.write(0, "pred")(self, members, np.broadcast_to(result, len(members)))
