"""Global and shared memory, and the checks of every access.

All checks are always in force. What they find is raised as a :class:`Fault`, at the first access
that shows it.

Global memory is a set of buffers in a 64-bit address space, far apart: whatever lies outside of
them is out of bounds. Shared memory is watched for races between warps: two accesses to one byte
between the same two barriers, one of them a write, by different warps. An asynchronous copy writes
from its issue to the wait for it. Not watched: lanes of one warp that race with each other, global
memory that blocks exchange while they run, and what the asynchronous proxy of tensor cores reads.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.ptx.counters import Counts
from tests.ptx.floats import Array


class Fault(Exception):
    """What a kernel must not do."""


class OutOfBounds(Fault):
    pass


class Misaligned(Fault):
    pass


class Uninitialised(Fault):
    """A read of what nobody wrote."""


class WriteToInput(Fault):
    pass


class Collision(Fault):
    """Two blocks write one byte, or two threads different values at once."""


class Race(Fault):
    """Of warps, in shared memory."""


class Divergence(Fault):
    """A warp does together what not all of its threads do."""


class Deadlock(Fault):
    pass


APART = 1 << 40
"""Bytes between the starts of buffers: no stray index leads from one to another."""


def take(array: Array, offsets: Array, size: int) -> Array:
    """[n, size]: ``size`` neighbours from each offset on."""
    if (offsets % size).any():
        return array[offsets[:, None] + np.arange(size)]
    return array[: len(array) // size * size].reshape(-1, size)[offsets // size]


def put(array: Array, offsets: Array, values: Array) -> None:
    """The inverse: where offsets coincide, the last one's values remain."""
    size = values.shape[1]
    if (offsets % size).any():
        array[offsets[:, None] + np.arange(size)] = values
    else:
        array[: len(array) // size * size].reshape(-1, size)[offsets // size] = values


class Buffer:
    """A stretch of global memory. ``data`` and ``initialised`` may be shared with the caller."""

    def __init__(
        self, name: str, address: int, data: Array, initialised: Array, read_only: bool
    ) -> None:
        self.name, self.address, self.data = name, address, data
        self.initialised, self.read_only = initialised, read_only
        self.writer = np.full(len(data), -1, np.int32)
        """The block that wrote a byte."""


class GlobalMemory:
    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._starts = np.zeros(0, np.int64)

    def add(
        self,
        name: str,
        data: Array,
        *,
        address: int | None = None,
        initialised: bool | Array = True,
        read_only: bool = False,
    ) -> int:
        """The address of a buffer of ``data``, which stores will change. With none given it is far
        from all others, and as aligned as an allocation on a GPU."""
        data = data.reshape(-1).view(np.uint8)
        if address is None:
            last = max((buffer.address for buffer in self.buffers), default=0)
            address = (last // APART + 1) * APART
        if isinstance(initialised, bool):
            initialised = np.full(len(data), initialised)
        for other in self.buffers:
            apart = address >= other.address + len(other.data)
            if not apart and address + len(data) > other.address:
                raise ValueError(f"{name} overlaps {other.name}")
        self.buffers.append(Buffer(name, address, data, initialised, read_only))
        self.buffers.sort(key=lambda buffer: buffer.address)
        self._starts = np.array([buffer.address for buffer in self.buffers], np.int64)
        return address

    def load(
        self, addresses: Array, size: int, warps: Array, counts: Counts | None, where: str
    ) -> Array:
        """[n, size] bytes."""
        values = np.empty((len(addresses), size), np.uint8)
        for buffer, members, offsets in self._find(addresses, size, "read", where):
            values[members] = take(buffer.data, offsets, size)
            if not take(buffer.initialised, offsets, size).all():
                raise Uninitialised(f"read of {buffer.name}, which nobody wrote: {where}")
            if counts:
                counts.global_access(
                    "load", buffer.name, warps[members], addresses[members].astype(np.int64), size
                )
        return values

    def store(
        self,
        addresses: Array,
        values: Array,
        blocks: Array,
        warps: Array,
        counts: Counts | None,
        where: str,
    ) -> None:
        size = values.shape[1]
        for buffer, members, offsets in self._find(addresses, size, "write", where):
            if buffer.read_only:
                raise WriteToInput(f"write to {buffer.name}: {where}")
            wanted = values[members]
            block = np.broadcast_to(blocks[members][:, None], wanted.shape)
            before = take(buffer.writer, offsets, size)
            put(buffer.writer, offsets, block)
            if ((before >= 0) & (before != block)).any() or (
                take(buffer.writer, offsets, size) != block
            ).any():
                raise Collision(f"two blocks write one byte of {buffer.name}: {where}")
            put(buffer.data, offsets, wanted)
            if (take(buffer.data, offsets, size) != wanted).any():
                raise Collision(f"threads write different values to {buffer.name}: {where}")
            put(buffer.initialised, offsets, np.ones(wanted.shape, bool))
            if counts:
                counts.global_access(
                    "store", buffer.name, warps[members], addresses[members].astype(np.int64), size
                )

    def _find(
        self, addresses: Array, size: int, what: str, where: str
    ) -> Iterator[tuple[Buffer, slice | Array, Array]]:
        """(buffer, which accesses are to it, their offsets); most instructions have one buffer."""
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise Misaligned(f"{what} of {size} bytes: {where}")
        numbers = np.searchsorted(self._starts, addresses, "right") - 1
        for number in np.unique(numbers):
            members = slice(None) if (numbers == number).all() else numbers == number
            buffer = self.buffers[max(number, 0)]
            offsets = addresses[members] - buffer.address
            outside = (number < 0) | (offsets + size > len(buffer.data))
            if outside.any():
                first = offsets[np.flatnonzero(outside)[0]]
                raise OutOfBounds(
                    f"{what} of {size} bytes by {outside.sum()} threads, the first at {first} of "
                    f"{len(buffer.data)} bytes of {buffer.name}: {where}"
                )
            yield buffer, members, offsets


ANYONE, MANY = 62, 63
"""Instead of a warp: several wrote the same value, which all may read; several read."""


class SharedMemory:
    """That of several blocks, one after the other. ``grain``: the bytes that every access is a
    multiple of, and that are watched together."""

    def __init__(self, blocks: int, size: int, grain: int):
        self.size, self.grain = size, grain
        self.stride = -(-size // 128) * 128
        self.data = np.full(blocks * self.stride, 0xFF, np.uint8)  # not a number
        self.initialised = np.zeros(blocks * self.stride, bool)
        grains = blocks * self.stride // grain
        # Who last wrote and read a grain: epoch · 64 + warp; an epoch ends at a barrier.
        self.written = np.full(grains, -1, np.int32)
        self.read = np.full(grains, -1, np.int32)
        self.under_way = np.zeros(grains, np.int16)  # asynchronous copies
        self.epoch = np.zeros(blocks, np.int32)

    def place(self, addresses: Array, size: int, blocks: Array, where: str) -> Array:
        """Where in ``data`` an address of a block lies."""
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise Misaligned(f"{size} bytes of shared memory: {where}")
        if (addresses + size > self.size).any():
            raise OutOfBounds(
                f"shared memory at {addresses.max()} + {size} of {self.size}: {where}"
            )
        return addresses + blocks * self.stride

    def load(self, places: Array, size: int, blocks: Array, warps: Array, where: str) -> Array:
        """[n, size] bytes."""
        grains, count, stamp = self._stamps(places, size, blocks, warps)
        self._check_copies(grains, count, where)
        if not take(self.initialised, places, size).all():
            raise Uninitialised(f"read of shared memory that nobody wrote: {where}")
        written = take(self.written, grains, count)
        if (_by_another(written, stamp) & (written % 64 != ANYONE)).any():
            raise Race(f"read after another warp's write: {where}")
        before = take(self.read, grains, count)
        mine = np.where(_by_another(before, stamp), stamp // 64 * 64 + MANY, stamp)
        put(self.read, grains, mine)
        others = take(self.read, grains, count) != mine
        if others.any():
            each = (grains[:, None] + np.arange(count))[others]
            self.read[each] = mine[others] // 64 * 64 + MANY
        return take(self.data, places, size)

    def store(self, places: Array, values: Array, blocks: Array, warps: Array, where: str) -> None:
        size = values.shape[1]
        grains, count, stamp = self._stamps(places, size, blocks, warps)
        self._check_copies(grains, count, where)
        read, written = (take(stamps, grains, count) for stamps in (self.read, self.written))
        again, after_read = _by_another(written, stamp), _by_another(read, stamp)
        if (again | after_read).any():
            # Several warps may write one value, each read it, and nobody sees a difference.
            same = (take(self.data, places, size) == values).reshape(-1, count, self.grain).all(2)
            replica = same & (written // 64 == stamp // 64)
            if (after_read & ~replica).any():
                raise Race(f"write after another warp's read: {where}")
            if (again & ~replica).any():
                raise Race(f"write after another warp's write of another value: {where}")
        put(self.data, places, values)
        put(self.initialised, places, np.ones(values.shape, bool))
        if (take(self.data, places, size) != values).any():
            raise Race(f"threads write different values at once: {where}")
        mine = np.where(again, stamp // 64 * 64 + ANYONE, stamp)
        put(self.written, grains, mine)
        others = take(self.written, grains, count) != mine
        if others.any():
            each = (grains[:, None] + np.arange(count))[others]
            self.written[each] = mine[others] // 64 * 64 + ANYONE

    def begin_copy(self, places: Array, size: int, blocks: Array, warps: Array, where: str) -> None:
        grains, count, stamp = self._stamps(places, size, blocks, warps)
        self._check_copies(grains, count, where)
        for stamps in (self.read, self.written):
            if _by_another(take(stamps, grains, count), stamp).any():
                raise Race(f"asynchronous copy to what another warp uses: {where}")
        np.add.at(self.under_way, grains[:, None] + np.arange(count), 1)

    def end_copy(
        self, places: Array, values: Array, blocks: Array, warps: Array, where: str
    ) -> None:
        grains, count, stamp = self._stamps(places, values.shape[1], blocks, warps)
        np.add.at(self.under_way, grains[:, None] + np.arange(count), -1)
        put(self.data, places, values)
        put(self.initialised, places, np.ones(values.shape, bool))
        put(self.written, grains, np.broadcast_to(stamp, (len(grains), count)))

    def _stamps(
        self, places: Array, size: int, blocks: Array, warps: Array
    ) -> tuple[Array, int, Array]:
        """(the first grain, how many, [n, 1] of the epoch and the warp)."""
        stamp = (self.epoch[blocks] * 64 + warps).astype(np.int32)
        return places // self.grain, size // self.grain, stamp[:, None]

    def _check_copies(self, grains: Array, count: int, where: str) -> None:
        if take(self.under_way, grains, count).any():
            raise Race(f"an asynchronous copy to it is under way: {where}")


def _by_another(stamps: Array, mine: Array) -> Array:
    """Whether a stamp is of my epoch, but not of my warp."""
    return (stamps // 64 == mine // 64) & (stamps != mine)
