"""GPUs by name, and how much of their memory tensors may fill."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

GIB = 2**30

CARDS = {
    "GTX 1060": 6,
    "GTX 1080": 8,
    "GTX 1080 Ti": 11,
    "GTX 1650": 4,
    "GTX 1660": 6,
    "RTX 2060": 6,
    "RTX 2070": 8,
    "RTX 2080": 8,
    "RTX 2080 Ti": 11,
    "RTX 3050": 8,
    "RTX 3060": 12,
    "RTX 3060 Ti": 8,
    "RTX 3070": 8,
    "RTX 3080": 10,
    "RTX 3080 Ti": 12,
    "RTX 3090": 24,
    "RTX 4060": 8,
    "RTX 4060 Ti": 8,
    "RTX 4070": 12,
    "RTX 4070 Ti": 12,
    "RTX 4080": 16,
    "RTX 4090": 24,
    "RTX 5060": 8,
    "RTX 5070": 12,
    "RTX 5080": 16,
    "RTX 5090": 32,
    "T4": 16,
    "P100": 16,
    "V100": 16,
    "L4": 24,
    "A10": 24,
    "L40S": 48,
    "RTX A6000": 48,
    "A100": 40,
    "H100": 80,
}
"""Memory in GiB; of those sold with more than one size, the smallest of common ones."""

CONTEXT = 600 * 2**20
FRAGMENTS = 0.05
"""What no tensor has: CUDA's context and the libraries' workspaces, in bytes, and the part of the
memory that the allocator loses between tensors. A model, not measured."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: what it is called. memory: bytes that it has.
        whole: whether tensors may fill all of it, as of a CPU's (default: they may not).
    """

    name: str
    memory: int
    whole: bool = False

    @property
    def usable(self) -> int:
        """Bytes that tensors may fill."""
        if self.whole:
            return self.memory
        return max(0, int(self.memory * (1 - FRAGMENTS)) - CONTEXT)


def card(name: str) -> Card:
    """A card by its name ("RTX 3060"), or by its memory ("8GB").

    Raises:
        ValueError: it is neither; the message lists the names.
    """
    if memory := re.fullmatch(r"(\d{1,6}(?:\.\d+)?)\s*Gi?B?", name.strip(), re.IGNORECASE):
        return Card(name.strip(), int(float(memory[1]) * GIB))
    known = {_plain(own): own for own in CARDS}
    if own := known.get(_plain(name)):
        return Card(own, CARDS[own] * GIB)
    raise ValueError(
        f"unknown card {name!r}: give its memory, such as 8GB, or one of {', '.join(CARDS)}"
    )


def own_card(device: torch.device | None = None) -> Card | None:
    """The GPU that ``device`` is (default: the first of this machine); None: it is none."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    properties = torch.cuda.get_device_properties(device.index or 0 if device else 0)
    return Card(properties.name, properties.total_memory)


def memory_of(device: torch.device) -> Card:
    """The GPU that ``device`` is, or this machine's own memory."""
    return own_card(device) or Card("this machine", own_memory(), whole=True)


def own_memory() -> int:
    """Bytes of this machine's own memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _plain(name: str) -> str:
    words = re.sub(r"[^a-z0-9]", "", name.lower())
    return words.removeprefix("nvidia").removeprefix("geforce")
