"""Whose the bytes of a training step are."""

from __future__ import annotations

import bisect
import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from e3va.measure.live import LiveBytes, storage_key

SPLIT = (
    "trunk_weights",
    "other_weights",
    "gradients",
    "optimizer",
    "backbone_saved",
    "backbone_transient",
    "neck",
    "proposals",
    "heads",
    "loss_and_data",
)
"""Whose the bytes of a training step are, see :func:`step_split`."""


class PartsBytes(LiveBytes):
    """Knows of each storage which part of a detector made it: in the forward by the innermost of
    the parts that runs, in the backward by the part whose forward made the node of the graph.

    What the backbone's forward leaves behind is "backbone_saved", what else it makes
    "backbone_transient"; what becomes the gradient of a parameter is "gradients"; what no part
    makes is "loss_and_data".

    Made by :meth:`of`.

    Attributes:
        live, peak: as of :class:`LiveBytes`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running = ["loss_and_data"]
        # From which number of a node on the graph is whose.
        self._nodes, self._owners = [0], ["loss_and_data"]
        self._storages: dict[int, _Storage] = {}
        # What came and went since the beginning, and how much of that until the peak.
        self._history: list[tuple[_Storage, int]] = []
        self._peak_at = 0

    def at_peak(self) -> Counter[str]:
        """Bytes that each part had at the peak; their sum is ``peak``."""
        parts: Counter[str] = Counter()
        for storage, size in self._history[: self._peak_at]:
            parts[storage.part] += size
        return parts

    @classmethod
    @contextlib.contextmanager
    def of(cls, model: nn.Module) -> Iterator[PartsBytes]:
        """Counts inside the context what the parts of ``model`` make: a detector of Detectron2 or
        torchvision, or a semantic segmentor of Detectron2."""
        memory, hooks = cls(), []
        for name, module in _parts(model).items():
            hooks += [
                module.register_forward_pre_hook(lambda *_, name=name: memory._begin(name)),
                module.register_forward_hook(lambda *_: memory._end(), always_call=True),
            ]
        trained = [p for p in model.parameters() if p.requires_grad]
        hooks += [p.register_post_accumulate_grad_hook(memory._accumulated) for p in trained]
        try:
            with memory:
                yield memory
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, part: str) -> None:
        self._running.append(part)
        self._owned_from_here()

    def _end(self) -> None:
        if self._running.pop() == "backbone_transient":
            for storage in self._storages.values():
                if storage.part == "backbone_transient":
                    storage.part = "backbone_saved"
        self._owned_from_here()

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = self._storages.get(storage_key(parameter.grad))
        if storage is not None:  # not there beforehand
            storage.part = "gradients"

    def _owned_from_here(self) -> None:
        self._nodes.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(self._running[-1])

    def _part(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None or len(self._running) > 1:  # a part may run anew in the backward
            return self._running[-1]
        return self._owners[bisect.bisect_right(self._nodes, node._sequence_nr()) - 1]

    def _made(self, key: int, size: int) -> None:
        before = self.peak
        super()._made(key, size)
        storage = self._storages[key] = _Storage(self._part())
        self._history.append((storage, size))
        if self.peak > before:
            self._peak_at = len(self._history)

    def _freed(self, key: int, size: int) -> None:
        super()._freed(key, size)
        self._history.append((self._storages.pop(key), -size))


class _Storage:
    def __init__(self, part: str) -> None:
        self.part = part


def _parts(model: Any) -> dict[str, nn.Module]:
    """The parts of a detector, as Detectron2 and torchvision call them."""
    neck = model.backbone
    backbone = bottom_up(model)
    parts = {"backbone_transient": backbone}
    if neck is not backbone:
        parts["neck"] = neck
    names = {
        "proposals": ("proposal_generator", "rpn", "head"),
        "heads": ("roi_heads", "sem_seg_head"),
    }
    for part, attributes in names.items():
        for attribute in attributes:
            if isinstance(module := getattr(model, attribute, None), nn.Module):
                parts[part] = module
    return parts


def bottom_up(model: Any) -> nn.Module:
    """The backbone of a detector of Detectron2 or torchvision, without the FPN."""
    backbone = model.backbone
    for name in ("bottom_up", "body"):
        if isinstance(inner := getattr(backbone, name, None), nn.Module):
            return inner
    return backbone
