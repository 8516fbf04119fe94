"""A GPU that is not there: the launchers of ``e3va.kernels`` run, and so do their kernels.

    with Device(compiler, architecture=80) as device:
        y_out, z, t, codes, scale = sublayer_epilogue(x, y, ...)
    device.counts["sublayer_epilogue_kernel"].instructions

Within the block every kernel of the package is compiled for the architecture, specialised as
Triton's JIT would for these arguments, and executed on the tensors of a CPU: what is launched how
is known to the launchers alone. Each storage has its own stretch of the address space, aligned as
PyTorch allocates on a GPU, and a view begins where it does there. What a launcher is handed is an
input, which kernels must not write. What PyTorch allocates within the block is uninitialised until
something writes it, an operation of PyTorch or a kernel. Tensors on PyTorch's meta device have
addresses, and nothing there: launches of them can be noted, and executed on a memory that holds
what they touch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ptx.compiler import Compiled, TritonCompiler
from tests.ptx.counters import Counts
from tests.ptx.memory import APART, GlobalMemory


def kernel_modules() -> Iterator[ModuleType]:
    package = importlib.import_module("e3va.kernels")
    for found in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{found.name}")


@functools.cache
def kernels() -> dict[str, tuple[ModuleType, Any]]:
    """Every kernel that is launched, by name, and the module that launches it."""
    return {
        name: (module, value)
        for module in kernel_modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    }


class Launch(NamedTuple):
    """What a launcher asked for: arguments and constants by name, and options."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class _Storage:
    """A storage of PyTorch, and what is known of its bytes."""

    def __init__(self, storage: torch.UntypedStorage, address: int):
        self.storage, self.address = storage, address
        self.is_input = False

    @functools.cached_property
    def initialised(self) -> np.ndarray:
        return np.ones(self.storage.nbytes(), bool)

    @property
    def data(self) -> np.ndarray:
        """Its bytes, not a copy."""
        pointer = (ctypes.c_uint8 * self.storage.nbytes()).from_address(self.storage.data_ptr())
        return np.frombuffer(pointer, np.uint8)

    def initialised_of(self, tensor: Tensor) -> np.ndarray:
        """Of the bytes of a view, with its strides."""
        size = tensor.element_size()
        return np.lib.stride_tricks.as_strided(
            self.initialised[tensor.storage_offset() * size :],
            (*tensor.shape, size),
            (*(stride * size for stride in tensor.stride()), 1),
        )


class Device:
    """Use as a context; see the module.

    Args:
        compiler: of the kernels.
        architecture: 80 for sm_80, and so on.
        seed: of a random schedule, see :meth:`tests.ptx.machine.Program.launch`.
        execute: whether kernels are executed, and not only noted.
        counted: whether counts are kept.

    ``launches`` are those that were asked for, in order; ``counts`` are sums by kernel.
    """

    def __init__(
        self,
        compiler: TritonCompiler,
        architecture: int,
        *,
        seed: int | None = None,
        execute: bool = True,
        counted: bool = False,
    ):
        self.compiler, self.architecture = compiler, architecture
        self.seed, self.execute, self.counted = seed, execute, counted
        self.launches: list[Launch] = []
        self.counts: dict[str, Counts] = {}
        self._storages: dict[int, _Storage] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Device:
        with contextlib.ExitStack() as stack:
            for module in kernel_modules():
                for name, value in vars(module).copy().items():
                    if replacement := self._instead_of(module, name, value):
                        stack.enter_context(mock.patch.object(module, name, replacement))
            stack.enter_context(_Watch(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _instead_of(self, module: ModuleType, name: str, value: Any) -> Any:
        """What a name of a module stands for within the block; None: what it always does."""
        if name == "architecture_of":
            return lambda device: self.architecture
        if name in kernels():
            return _Kernel(self, name)
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            return None if name.startswith("_") else self._launcher(value)
        return None

    def _launcher(self, function: Callable) -> Callable:
        """A function, with the tensors that it is handed as inputs while it runs."""

        @functools.wraps(function)
        def launcher(*arguments: Any, **named: Any) -> Any:
            handed = [self.storage_of(tensor) for tensor in _tensors((arguments, named))]
            new = [storage for storage in handed if not storage.is_input]
            for storage in new:
                storage.is_input = True
            try:
                return function(*arguments, **named)
            finally:
                for storage in new:
                    storage.is_input = False

        return launcher

    def launch(self, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.launches.append(Launch(kernel, grid, arguments))
        if not self.execute or 0 in grid:
            return
        memory = GlobalMemory()
        for start, end, storage, names in self._stretches(arguments):
            inside = slice(start - storage.address, end - storage.address)
            memory.add(
                "/".join(names),
                storage.data[inside],
                address=start,
                initialised=storage.initialised[inside],
                read_only=storage.is_input,
            )
        counts = self.counts.setdefault(kernel, Counts()) if self.counted else None
        self.run(self.launches[-1], memory, counts=counts)

    def compiled(self, launch: Launch) -> Compiled:
        module, _ = kernels()[launch.kernel]
        arguments = {
            name: [str(value.dtype).removeprefix("torch."), self.address_of(value) % 16]
            if isinstance(value, Tensor)
            else value
            for name, value in launch.arguments.items()
        }
        return self.compiler.compile(module.__name__, launch.kernel, self.architecture, **arguments)

    def run(
        self,
        launch: Launch,
        memory: GlobalMemory,
        *,
        blocks: Sequence[int] | None = None,
        counts: Counts | None = None,
    ) -> None:
        """Executes a launch on a memory that has its tensors where :meth:`address_of` says."""
        compiled = self.compiled(launch)
        values = (launch.arguments[name] for name in compiled.parameters)
        parameters = [self.address_of(v) if isinstance(v, Tensor) else v for v in values]
        compiled.program.launch(
            memory,
            launch.grid,
            compiled.threads,
            parameters,
            blocks=blocks,
            counts=counts,
            seed=self.seed,
        )

    def address_of(self, tensor: Tensor) -> int:
        offset = tensor.storage_offset() * tensor.element_size()
        return self.storage_of(tensor).address + offset

    def storage_of(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            address = APART * (1 + len(self._storages))
            self._storages[key] = _Storage(storage, address)
        return self._storages[key]

    def _stretches(
        self, arguments: dict[str, Any]
    ) -> Iterator[tuple[int, int, _Storage, list[str]]]:
        """(start, end, storage, names of the arguments) of what pointers point to; tensors that
        overlap are one."""
        tensors = sorted(
            (self.address_of(value), value.nbytes, name, self.storage_of(value))
            for name, value in arguments.items()
            if isinstance(value, Tensor)
        )
        joined: list[tuple[int, int, _Storage, list[str]]] = []
        for start, size, name, storage in tensors:
            if joined and start < joined[-1][1]:
                before, end, _, names = joined.pop()
                joined.append((before, max(end, start + size), storage, [*names, name]))
            elif size:
                joined.append((start, start + size, storage, [name]))
        return iter(joined)


class _Kernel:
    """Stands where a kernel stood."""

    def __init__(self, device: Device, name: str):
        self._device, self._name = device, name
        self._parameters = kernels()[name][1].arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> functools.partial:
        return functools.partial(self._launch, tuple(grid))

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        named = dict(zip(self._parameters, arguments, strict=False))
        for name, value in named.items():
            if isinstance(value, Tensor) and not value.is_contiguous():
                raise ValueError(f"{name} of {self._name} is not contiguous")
        self._device.launch(self._name, grid, named | constants)


class _Watch(TorchDispatchMode):
    """Notes what PyTorch allocates and writes."""

    def __init__(self, device: Device):
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore
        named = named or {}
        result = function(*arguments, **named)
        for tensor in _tensors(result):
            if not tensor.is_meta and "empty" in function.name():
                self._device.storage_of(tensor).initialised[:] = False
        schema = function._schema.arguments
        by_name = dict(zip((a.name for a in schema), arguments, strict=False)) | named
        for argument in schema:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(by_name.get(argument.name)):
                    if tensor.is_meta:
                        continue
                    self._device.storage_of(tensor).initialised_of(tensor)[...] = True
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
