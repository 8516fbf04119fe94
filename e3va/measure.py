"""What training costs: memory, counted exactly and on any device, and time; used by demo, bench and
tests."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e3va.ops.library import FUNCTIONS


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
        before = {_storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if _is_real(leaf)}
        if func.namespace == "e3va":
            with self:
                out = FUNCTIONS[func._schema.name.removeprefix("e3va::")](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if _is_real(leaf) and _storage_key(leaf) not in before:
                self._track(leaf.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


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
        storages = {_storage_key(t): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(storages.values())

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
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as memory:
        step().backward()
    return memory.peak


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


def step_seconds(steps: Mapping[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Seconds of training steps, by name: each gives the loss, whose backward runs. Medians of
    interleaved ``repeats``."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step().backward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
