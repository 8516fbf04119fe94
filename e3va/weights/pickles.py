"""Detectron2's pickles of weights, read without running what is in them.

An unpickler that builds arrays of numbers and plain containers, and refuses everything else. This
file is what stands between a stranger's ``.pkl`` and the process.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch


def read_pickle(path: Path) -> Any:
    """The content of a pickle, its arrays as tensors.

    Raises:
        pickle.UnpicklingError: it is damaged, or asks for anything but arrays and containers.
    """
    with path.open("rb") as file:
        return _as_tensors(_ArrayUnpickler(file, encoding="latin1").load())


def _as_tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_tensors(item) for key, item in value.items()}
    if isinstance(value, _Array):
        return torch.from_numpy(value.array)
    return value


class _Dtype:
    """Stands for a numpy.dtype in a pickle: of its state, only the byte order is believed."""

    def __init__(self, code: str, *_: bool) -> None:
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a numpy.ndarray in a pickle, and for what builds one: made of its bytes alone.

    numpy's own functions trust a pickle: with a dtype that lies about itself they crash.
    """

    array: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self._fill(data, dtype, shape, "F" if fortran else "C")

    @classmethod
    def reconstruct(cls, *_: Any) -> _Array:
        return cls()

    @classmethod
    def scalar(cls, dtype: _Dtype, data: bytes | str) -> _Array:
        return cls()._fill(data, dtype, (), "C")

    @classmethod
    def frombuffer(
        cls,
        data: bytes,
        dtype: _Dtype,
        shape: tuple[int, ...],
        order: Literal["C", "F", "K"],
        axes: tuple[int, ...] | None = None,
    ) -> _Array:
        built = cls()._fill(data, dtype, shape, "C" if order == "K" else order)
        if axes is not None:
            built.array = built.array.transpose(axes)
        return built

    def _fill(
        self, data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]
    ) -> _Array:
        if dtype.dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"refused an array of {dtype.dtype}")
        if isinstance(data, str):  # a pickle of Python 2
            data = _encode(data)
        flat = np.frombuffer(data, dtype.dtype).astype(dtype.dtype.newbyteorder("="))
        self.array = flat.reshape(shape, order=order)
        return self


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of protocol 2 and below write bytes."""
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays of numbers and plain containers, and refuses to look up anything else."""

    _KNOWN: Mapping[str, Any] = {
        "collections.OrderedDict": collections.OrderedDict,
        "_codecs.encode": _encode,
        "numpy.dtype": _Dtype,
        "numpy.ndarray": _Array,
        **{
            f"numpy.{core}.{name}": build
            for core in ("core", "_core")
            for name, build in (
                ("multiarray._reconstruct", _Array.reconstruct),
                ("multiarray.scalar", _Array.scalar),
                ("numeric._frombuffer", _Array.frombuffer),
            )
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._KNOWN:
            raise pickle.UnpicklingError(f"refused the global {module}.{name}")
        return self._KNOWN[f"{module}.{name}"]
