"""A training step on shapes alone: real tensors and real autograd, without the arithmetic."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from e3va.measure import tensors_in

LARGE = 2**16
"""Values from which on a new tensor's are unknown, and autograd's are not computed."""

NOISE = 0.01
"""Standard deviation of unknown values that are looked at: as that of an untrained head's outputs,
so that proposals are anchors, in no order."""

PERIOD = 65521
"""Values of noise that are drawn; they are repeated. A prime, that rows of maps begin elsewhere."""

_LOOKS = {"_local_scalar_dense", "masked_select", "nms", "nonzero"}
"""Operations whose result's shape, or what Python does next, depends on values."""

_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
"""Shares its storage as a view does, and is not called one."""

_HEAVY = ("attention", "conv", "mm", "norm", "pool", "roi_align", "upsample")
"""Parts of the names of operations that nobody chooses anything by."""


class ShapesOnly(TorchDispatchMode):
    """Runs what is inside without its heavy arithmetic: in seconds, and in little memory.

    Values may be unknown: those of large new tensors, of what :meth:`forget` was told, of what is
    made of these, and of heavy arithmetic on large tensors. An operation on them gives a tensor on
    the CPU of the right shape and dtype, in memory that nobody touches, so that whoever counts
    storages finds all of them. What depends on known values alone (anchors, targets and their
    matching) is computed. So is, with noise for what is unknown, what a detector may choose by:
    what autograd does not see, and what is small.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unknown: set[int] = set()
        self._unseen = 0
        self._results: dict[Any, Any] = {}
        self._noise: Tensor | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # which would import it: seconds
        return False

    def forget(self, *tensors: Tensor) -> None:
        """From now on the values of ``tensors`` are unknown."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._unknown:
                self._unknown.add(storage._cdata)
                weakref.finalize(storage, self._unknown.discard, storage._cdata)

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Within the block nothing is chosen by values: all operations on unknown ones are left
        out."""
        self._unseen += 1
        try:
            yield
        finally:
            self._unseen -= 1

    def never_look_in(self, owner: nn.Module | torch.optim.Optimizer) -> None:
        """The same in each forward of a module, or step of an optimizer."""
        name = "forward" if isinstance(owner, nn.Module) else "step"
        run = getattr(owner, name)

        def unseen(*args: Any, **kwargs: Any) -> Any:
            with self.unseen():
                return run(*args, **kwargs)

        setattr(owner, name, unseen)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        unknown = [tensor for tensor in tensors if self._is_unknown(tensor)]
        if not tensors:
            out = func(*args, **kwargs)
            if func._schema.name in ("aten::empty", "aten::empty_strided"):
                self.forget(*(out,) if out.numel() >= LARGE else ())
            return out
        heavy = _is_heavy(func) and any(tensor.numel() >= LARGE for tensor in tensors)
        if func.is_view or func is _UNSAFE_VIEW or not (unknown or heavy):
            return func(*args, **kwargs)
        if self._looks(func, tensors):
            for tensor in unknown:
                self._make_up(tensor)
            return func(*args, **kwargs)
        written = list(tensors_in(_written(func, args, kwargs)))
        self.forget(*written)
        returns = func._schema.returns
        if written and all(result.alias_info is not None for result in returns):
            return written[0] if len(returns) == 1 else tuple(written) if returns else None
        return self._leave_out(func, args, kwargs)

    def _is_unknown(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._unknown

    def _looks(self, func: Any, tensors: list[Tensor]) -> bool:
        name = func._schema.name.partition("::")[2]
        if name in _LOOKS:
            return True
        if self._unseen or torch._C._current_graph_task_id() != -1:  # in a backward
            return False
        if _is_heavy(func):
            return False
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return not learns or all(tensor.numel() < LARGE for tensor in tensors)

    def _make_up(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        values = torch.empty(0, dtype=tensor.dtype).set_(storage)
        if values.is_floating_point():
            if self._noise is None:
                self._noise = torch.empty(PERIOD).normal_(0, NOISE)
            for part in values.split(PERIOD):
                part.copy_(self._noise[: len(part)])
        else:
            values.zero_()
        self._unknown.discard(storage._cdata)

    def _leave_out(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "index" in func._schema.name and isinstance(args[1], list | tuple):
            indices = [place for index in args[1] for place in self._places(index)]
            args = (args[0], indices, *args[2:])
        key = func, _form(args), _form(tuple(kwargs.items()))
        if key not in self._results:
            meta = {name: _on_meta(value) for name, value in kwargs.items()}
            self._results[key] = func(*_on_meta(args), **meta)
        return self._like(self._results[key])

    def _like(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            made = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype)
            self.forget(made)
            return made
        return type(result)(map(self._like, result)) if isinstance(result, list | tuple) else result

    def _places(self, index: Tensor | None) -> tuple[Tensor | None, ...]:
        """A mask as the indices that it stands for, whose number a shape depends on."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return (index,)
        if self._is_unknown(index):
            self._make_up(index)
        return index.nonzero().unbind(1)


def _is_heavy(func: Any) -> bool:
    return any(word in func._schema.name.partition("::")[2] for word in _HEAVY)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """What an operation writes to, of its arguments."""
    named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
    values = dict(itertools.chain(named, kwargs.items()))
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield values.get(argument.name)


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_form, value)) if isinstance(value, list | tuple) else (type(value), value)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    return type(value)(map(_on_meta, value)) if isinstance(value, list | tuple) else value
