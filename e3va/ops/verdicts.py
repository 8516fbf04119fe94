"""What trials of kernels have shown, kept in the user's cache folder (:mod:`e3va.cache`): a file
for each GPU, driver, version of PyTorch and Triton, and state of our kernels.

A lock makes processes that start together on one machine, those of one training above all, agree.
What failed for want of memory or a tool is not kept.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from e3va.cache import cache_path, read_cache, warn_once, warn_unwritable, write_cache
from e3va.ops.trial import Verdict, current, fields, try_kernel
from e3va.ops.variants import VARIANTS, Variant

WAIT = 60.0
"""Seconds that another process is waited for."""

DRIVER = Path("/proc/driver/nvidia/version")

_memory: dict[str, dict[str, Verdict]] = {}
"""Of this process, by the file that they would be kept in."""


def verdict(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    arguments: tuple[Any, ...],
    size: int,
) -> Verdict:
    """What a trial of ``backend`` showed on this device, for the variant of ``arguments`` and maps
    of a size, see :func:`e3va.ops.dispatch.size_of`; it is made now if it never was."""
    variant = VARIANTS[op].of(*arguments)
    name = _name(op, backend, dtype, variant, size)
    with current(device):
        seen = _seen(device)
        if name in seen:
            return seen[name]
        found = _read(_path(device)).get(name)
        if found is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            found = Verdict(failure="it was not tried before a CUDA graph was captured")
        else:
            if found is None:
                attempt = op, backend, device, dtype, variant, arguments
                found = _first(name, device, functools.partial(try_kernel, *attempt))
            seen[name] = found
        _warn(op, backend, device, dtype, found)
        return found


def known(device: torch.device) -> dict[str, Verdict]:
    """All that is known of ``device``: "op backend dtype variant size" → verdict."""
    return _read(_path(device)) | _seen(device)


def _warn(op: str, backend: str, device: torch.device, dtype: torch.dtype, found: Verdict) -> None:
    if not found.right:
        warnings.warn(
            f"the {backend} kernel of {op} is not used on {_device_name(device)} in {dtype}: "
            f"{found.describe()}. Please report it together with what `e3va selftest` prints, "
            "unless something is missing here.",
            stacklevel=2,
        )


def _first(name: str, device: torch.device, make: Callable[[], Verdict]) -> Verdict:
    """The verdict of the first process that comes here: others wait for it."""
    path, lock = _path(device), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"), timeout=WAIT)
        lock.acquire()
    except Timeout:
        lock = None
        warn_once(f"another process keeps {path} locked: kernels are tried without waiting for it")
    except (OSError, NotImplementedError) as error:
        lock = None
        warn_unwritable(path, error)
    try:
        found = _read(path).get(name) or make()
        if lock and found.lasting:
            _write(path, device, name, found)
        return found
    finally:
        if lock:
            lock.release()


def _seen(device: torch.device) -> dict[str, Verdict]:
    return _memory.setdefault(str(_path(device)), {})


def _read(path: Path) -> dict[str, Verdict]:
    def parse(content: Any) -> dict[str, Verdict]:
        return {str(name): _parsed(fields) for name, fields in content["verdicts"].items()}

    return read_cache(path, parse) or {}


def _write(path: Path, device: torch.device, name: str, found: Verdict) -> None:
    values = {key: value._asdict() for key, value in {**_read(path), name: found}.items()}
    write_cache(path, {**_identity(device), "verdicts": values})


def _parsed(fields: dict[str, Any]) -> Verdict:
    found = Verdict(**fields)
    times = found.seconds, found.reference_seconds
    if (
        type(found.right) is not bool
        or not all(number is None or type(number) is float for number in (found.error, *times))
        or not all(time is None or 0 < time < math.inf for time in times)
        or (found.error is not None and math.isnan(found.error))
        or not (found.failure is None or (type(found.failure) is str and not found.right))
    ):
        raise TypeError(f"no verdict: {fields}")
    return found


def _name(op: str, backend: str, dtype: torch.dtype, variant: Variant, size: int) -> str:
    form = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:  # "high" makes the reference faster, and less exact
        form += f" ({torch.get_float32_matmul_precision()})"
    return f"{op} {backend} {form} {fields(variant)}, size={size}"


def _path(device: torch.device) -> Path:
    digest = hashlib.sha256(json.dumps(_identity(device)).encode()).hexdigest()[:16]
    return cache_path(f"verdicts-{digest}.json")


@functools.cache
def _identity(device: torch.device) -> dict[str, str]:
    """All that a verdict holds for."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "device": _device_name(device),
        "driver": driver(),
        "torch": torch.__version__,
        "triton": triton,
        "kernels": _kernels(),
    }


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}"


def driver() -> str:
    """The GPU driver's version, as "NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul …" names
    it."""
    text = DRIVER.read_text() if DRIVER.exists() else ""
    found = re.search(r"Kernel Module.*?  (\d[\d.]+)", text)
    return found[1] if found else "unknown"


@functools.cache
def _kernels() -> str:
    """A hash of what was compiled, of what will be, and of what judges it."""
    package = Path(__file__).parents[1]
    spec = importlib.util.find_spec("e3va.kernels")
    folders = [*map(Path, (spec.submodule_search_locations or []) if spec else []), package / "ops"]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    digest = hashlib.sha256()
    for path in (package / "_C.abi3.so", *files):
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()
