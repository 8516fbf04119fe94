"""What training costs: memory, counted exactly and on any device, and time; used by demo, bench and
tests."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from e3va.checkpoint import find_trunk
from e3va.ops.library import FUNCTIONS

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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages made inside the context and still alive.

    Looks into this package's own ops too. Storages that existed before (weights, images) and what
    a library allocates inside one op are not counted.

    Attributes:
        live: bytes alive now.
        peak: the most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = args, tuple((kwargs or {}).values())
        before = {_storage_key(tensor) for tensor in tensors_in(given) if _is_real(tensor)}
        if func.namespace == "e3va":
            with self:
                out = FUNCTIONS[func._schema.name.removeprefix("e3va::")](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tensors_in((out,)):
            if _is_real(tensor) and _storage_key(tensor) not in before:
                self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._made(key, size)
        weakref.finalize(storage, self._freed, key, size)

    def _made(self, key: int, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class CappedBytes(LiveBytes):
    """Has no more memory than ``limit`` bytes: on any device a GPU that is full.

    Raises:
        torch.OutOfMemoryError: from the operation whose result no longer fits.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def _made(self, key: int, size: int) -> None:
        super()._made(key, size)
        if self.live > self._limit:
            self._freed(key, size)
            raise torch.OutOfMemoryError(f"{size} bytes more than the {self._limit} that there are")


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
        storage = self._storages.get(_storage_key(parameter.grad))
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


class SavedBytes:
    """Counts the bytes that autograd saves for backward inside the context.

    A storage counts once, however often it is saved; parameters and buffers of ``modules`` do not.

    Attributes:
        tensors: every tensor saved, ``modules``' own excluded.
        total: bytes of their distinct storages.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self.tensors: list[Tensor] = []
        self._own = {
            _storage_key(tensor)
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage_key(tensor) not in self._own:
            self.tensors.append(tensor)
        return tensor

    @property
    def total(self) -> int:
        return _bytes_of(self.tensors)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)


def trainable_parameters(module: nn.Module) -> int:
    """Number of values that require a gradient."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def peak_live_bytes(module: nn.Module, step: Callable[[], Tensor]) -> int:
    """Most bytes alive at once in a training step: ``step()`` gives the loss, whose backward runs.

    Gradients of parameters exist beforehand, as from the second step on, and are not counted.
    """
    make_gradients(module)
    with LiveBytes() as memory:
        step().backward()
    return memory.peak


def step_split(
    model: nn.Module, step: Callable[[], Any], optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """The bytes of a training step at their peak by what they are of, with the keys :data:`SPLIT`;
    their sum is :func:`whole_step_bytes`.

    - "trunk_weights", "other_weights": parameters and buffers of the trunk, and all others.
    - "gradients": of what is trained, as many as there are at once.
    - "optimizer": its state, such as Adam's moments.
    - "backbone_saved": what the backbone's forward leaves behind, for its backward (of E³VA: the
      kept taps, u, the maps) or as its maps alone (of a frozen one).
    - "backbone_transient": what else the backbone makes, in forward and backward.
    - "neck": the FPN. "proposals": the RPN, or RetinaNet's head. "heads": the RoI heads, or that of
      semantic segmentation; with their losses.
    - "loss_and_data": images, targets and what no part makes, such as RetinaNet's losses.

    Gradients that there are beforehand stay, as between the parts of an accumulated step. See
    :class:`PartsBytes`.

    Args:
        model: a detector of Detectron2 or torchvision, or a semantic segmentor of Detectron2.
        step: forward, backward and, if it is a whole one, the optimizer's step.
        optimizer: of the model. Where it has no state yet it is made, as from the second step on.
    """
    if not optimizer.state:
        make_state(model, optimizer)
    trunk = find_trunk(model)[1] or bottom_up(model)
    trunk_weights = _bytes_of((*trunk.parameters(), *trunk.buffers()))
    fixed = {
        "trunk_weights": trunk_weights,
        "other_weights": _bytes_of((*model.parameters(), *model.buffers())) - trunk_weights,
        "gradients": _bytes_of([p.grad for p in model.parameters() if p.grad is not None]),
        "optimizer": _bytes_of(_state(optimizer)),
    }
    with PartsBytes.of(model) as memory:
        step()
    made = memory.at_peak()
    return {part: fixed.get(part, 0) + made[part] for part in SPLIT}


def make_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state, as there is from the second step of a training on, by a step of
    zero gradients. Leaves none."""
    make_gradients(model)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    optimizer.zero_grad()


def make_gradients(module: nn.Module) -> None:
    """Zeros, where a parameter that is trained has no gradient yet."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that stay between two training steps: parameters, buffers, the optimizer's state."""
    return _bytes_of((*model.parameters(), *model.buffers(), *_state(optimizer)))


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return list(tensors_in(v for values in optimizer.state.values() for v in values.values()))


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({_storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


def whole_step_bytes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], Any],
    limit: int | None = None,
) -> int:
    """Most bytes alive at once in a training step, everything included: weights, the optimizer's
    state, gradients while they exist, activations.

    Args:
        step: forward, backward and the optimizer's step; begins and ends without gradients.
        limit: of these bytes, see :class:`CappedBytes` (default: none).
    """
    if not optimizer.state:  # as from the second step on
        make_state(model, optimizer)
    optimizer.zero_grad()
    before = resident_bytes(model, optimizer)
    memory = LiveBytes() if limit is None else CappedBytes(limit - before)
    with memory:
        step()
    return before + memory.peak


def saved_bytes(module: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that ``run`` makes autograd save beyond the parameters and buffers of ``module``."""
    with SavedBytes([module]) as saved:
        result = run()
    del result
    return saved.total


def step_costs(
    module: nn.Module, backbone: nn.Module, images: Any, step: Callable[[], Tensor]
) -> dict[str, int]:
    """What a training step of ``module`` costs: "trainable_params" and "saved_bytes" of its
    ``backbone``, which takes ``images``, and "peak_live_bytes" of all, ``step()`` giving the
    loss."""
    return {
        "trainable_params": trainable_parameters(backbone),
        "saved_bytes": saved_bytes(backbone, lambda: backbone(images)),
        "peak_live_bytes": peak_live_bytes(module, step),
    }


class Seconds(NamedTuple):
    """Of a training step: in all, and of its parts. Medians, so that the parts need not sum up."""

    step: float
    forward: float
    backward: float
    optimizer: float


def step_seconds(
    steps: Mapping[str, Callable[[], Tensor]],
    repeats: int,
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
) -> dict[str, Seconds]:
    """Seconds of training steps, by name: each gives the loss, whose backward runs. Medians of
    interleaved ``repeats``; on a GPU by its own clock.

    Args:
        steps: by name.
        repeats: steps of each.
        optimizers: what takes a step after each backward, and forgets the gradients (default:
            nothing).
    """
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for _ in tqdm(range(repeats), desc="steps", unit="round", disable=None):
        for name, step in steps.items():
            moments = [_moment()]
            loss = step()
            moments.append(_moment())
            loss.backward()
            moments.append(_moment())
            if optimizers:
                optimizers[name].step()
                optimizers[name].zero_grad()
            moments.append(_moment())
            parts = [_between(*pair) for pair in itertools.pairwise(moments)]
            measured[name].append((sum(parts), *parts))
    return {
        name: Seconds(*map(statistics.median, zip(*rounds, strict=True)))
        for name, rounds in measured.items()
    }


def _moment() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def _is_real(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
