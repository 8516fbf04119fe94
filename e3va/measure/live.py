"""The bytes of all tensors that are alive, and those that are saved for backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

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
        given = args, tuple((kwargs or {}).values())
        before = {storage_key(tensor) for tensor in tensors_in(given) if is_real(tensor)}
        if func.namespace == "e3va":
            with self:
                out = FUNCTIONS[func._schema.name.removeprefix("e3va::")](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tensors_in((out,)):
            if is_real(tensor) and storage_key(tensor) not in before:
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
            storage_key(tensor)
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in self._own:
            self.tensors.append(tensor)
        return tensor

    @property
    def total(self) -> int:
        return bytes_of(self.tensors)

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


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once; those of quantised weights are of what they are made
    of."""
    plain = (t for tensor in tensors for t in _plain(tensor))
    return sum({storage_key(t): t.untyped_storage().nbytes() for t in plain}.values())


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def is_real(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
