"""What an execution counts. The counts are exact; what a GPU makes of them is not modelled."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from tests.ptx.floats import Array

SECTOR = 32  # bytes
BANKS = 32  # of 4 bytes

MOVES = ("mov", "cvta")
"""What the assembler mostly removes; so do counts of instructions."""
SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div")
"""Of floats: on the special-function units."""
TENSOR = ("mma", "wgmma.mma_async", "tcgen05.mma")
CLASSES = {
    "tensor core": TENSOR,
    "special function": SPECIAL,
    "memory": ("ld", "st", "cp", "ldmatrix", "stmatrix", "tcgen05.ld", "tcgen05.st"),
    "control": ("bra", "ret", "exit", "bar", "mbarrier", "fence", "elect", "wgmma", "tcgen05"),
    "conversion": ("cvt",),
    "exchange": ("shfl", "redux"),
}


def class_of(opcode: str) -> str:
    """One of :data:`CLASSES`, "move" or "arithmetic"."""
    parts = opcode.split(".")
    if parts[0] in MOVES:
        return "move"
    if parts[0] == "div" and parts[-1] != "f32":
        return "arithmetic"  # of integers
    for name, opcodes in CLASSES.items():
        if parts[0] in opcodes or ".".join(parts[:2]) in opcodes:
            return name
    return "arithmetic"


class Access(NamedTuple):
    """The accesses to one buffer of global memory, or to shared memory."""

    requests: int = 0
    """Warp instructions."""
    bytes: int = 0
    """Different ones within a request."""
    units: int = 0
    """Sectors of global memory; wavefronts of shared memory."""

    def __add__(self, other: Access) -> Access:  # type: ignore[override]
        return Access(*(a + b for a, b in zip(self, other, strict=True)))


class Counts:
    """Of one launch, or summed over several: ``counts + others``.

    ``opcodes``: warp instructions by opcode; a warp whose threads have diverged issues one for each
    way. ``loads`` and ``stores``: of global memory by buffer. ``shared``: of shared memory.
    """

    def __init__(self) -> None:
        self.opcodes: Counter[str] = Counter()
        self.loads: dict[str, Access] = {}
        self.stores: dict[str, Access] = {}
        self.shared = Access()
        self._touched: list[Array] = []

    def __add__(self, other: Counts) -> Counts:
        total = Counts()
        for counts in (self, other):
            total.opcodes += counts.opcodes
            total.shared += counts.shared
            for mine, theirs in ((total.loads, counts.loads), (total.stores, counts.stores)):
                for name, access in theirs.items():
                    mine[name] = mine.get(name, Access()) + access
            total._touched += counts._touched
        return total

    def classes(self) -> Counter[str]:
        """Warp instructions by class; moves are left out."""
        classes: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            classes[class_of(opcode)] += count
        del classes["move"]
        return classes

    @property
    def instructions(self) -> int:
        """Warp instructions without moves."""
        return self.classes().total()

    @property
    def sectors(self) -> int:
        """Sectors of global memory that requests ask for."""
        return sum(access.units for access in (*self.loads.values(), *self.stores.values()))

    @property
    def distinct_sectors(self) -> int:
        """Those of them that are different, which is what comes from memory where caches hold all
        that is used again."""
        if len(self._touched) > 1:
            self._touched = [np.unique(np.concatenate(self._touched))]
        return sum(map(len, self._touched))

    @property
    def sectors_over_floor(self) -> float:
        """Sectors, over those that the bytes of each request would fill: 1 where neighbours in a
        warp are neighbours in memory."""
        asked = sum(access.bytes for access in (*self.loads.values(), *self.stores.values()))
        return self.sectors * SECTOR / max(1, asked)

    @property
    def wavefronts(self) -> int:
        """Passes of shared memory: as many as the bank with the most words needs."""
        return self.shared.units

    def instructions_of(self, opcodes: Counter[str], warps: int) -> None:
        for opcode, count in opcodes.items():
            self.opcodes[opcode] += count * warps

    def global_access(
        self, kind: str, buffer: str, warps: Array, addresses: Array, size: int
    ) -> None:
        accesses = self.loads if kind == "load" else self.stores
        different = _distinct(warps, addresses)
        # An access is aligned: it has one sector, or is a vector of 32 bytes at most.
        sectors = _distinct(warps, addresses // SECTOR)
        access = Access(np.unique(warps).size, different * size, sectors)
        accesses[buffer] = accesses.get(buffer, Access()) + access
        self._touched.append(np.unique(addresses // SECTOR))
        if len(self._touched) > 1000:
            self._touched = [np.unique(np.concatenate(self._touched))]

    def shared_access(self, threads: Array, addresses: Array, size: int) -> None:
        # Of wide accesses a half or a quarter of the warp is served at a time.
        together = 32 * 4 // max(4, size)
        words = max(1, size // 4)
        groups = np.repeat(threads // together, words)
        places = (addresses[:, None] // 4 + np.arange(words)).ravel()
        keys = np.unique(groups.astype(np.int64) << 32 | places)
        banks, words_of_bank = np.unique(
            (keys >> 32) * BANKS + (keys & 0xFFFFFFFF) % BANKS, return_counts=True
        )
        first = np.flatnonzero(np.diff(banks // BANKS, prepend=-1))
        wavefronts = int(np.maximum.reduceat(words_of_bank, first).sum())
        requests = np.unique(threads // 32).size
        self.shared += Access(requests, _distinct(threads // 32, addresses) * size, wavefronts)


def _distinct(warps: Array, values: Array) -> int:
    """Pairs of a warp and a value."""
    order = np.lexsort((values, warps))
    warps, values = warps[order], values[order]
    return 1 + int(((np.diff(warps) != 0) | (np.diff(values) != 0)).sum()) if len(warps) else 0
