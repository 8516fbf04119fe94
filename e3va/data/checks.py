"""Checks of many files: made by threads, and not again while a file stays as it is.

What a check tells of a file is kept in the user's cache folder (:mod:`e3va.cache`) for as long as
the file has the same size and time of change, and this package and Pillow are the same. Contents
are not compared: to read them all would cost what is to be saved.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL
from PIL import Image
from tqdm import tqdm

from e3va.cache import cache_path, read_cache, write_cache

WORTH = 0.5
"""Seconds: what checks of less tell is not kept."""

BUNCH = 16
"""Files that a thread takes at a time."""


def check_files(check: Callable[[Path], Any], paths: Sequence[Path]) -> list[Any]:
    """What ``check`` tells of each file, in order.

    Args:
        check: a function of a module; tells what JSON can hold, or raises. What it raises is not
            kept.
        paths: the files.

    Raises:
        Whatever ``check`` does, of the first file for which it does.
    """
    if not paths:
        return []
    names = [os.path.abspath(path) for path in paths]
    where = cache_path(f"files-{_digest(check.__qualname__, os.path.commonpath(names))}.json")
    version = _version()
    kept = read_cache(where, lambda content: dict(content["files"].get(version, {}))) or {}
    begin, new = time.perf_counter(), {}

    def tell(bunch: Sequence[int]) -> list[Any]:
        told = []
        for i in bunch:
            state = _state(paths[i])
            entry = kept.get(names[i])
            if state is None or not isinstance(entry, list) or entry[:-1] != state:
                entry = [*(state or ()), check(paths[i])]
                if state is not None:
                    new[names[i]] = entry
            told.append(entry[-1])
        return told

    found: list[Any] = []
    Image.init()  # Pillow would load its readers in all threads at once, and one might miss some
    pool = ThreadPoolExecutor()
    try:
        bunches = [range(i, min(i + BUNCH, len(paths))) for i in range(0, len(paths), BUNCH)]
        with tqdm(total=len(paths), unit="file", desc="checked", delay=1, disable=None) as bar:
            for told in pool.map(tell, bunches):
                found += told
                bar.update(len(told))
    finally:
        pool.shutdown(cancel_futures=True)
        if new and time.perf_counter() - begin > WORTH:
            write_cache(where, {"files": {version: kept | new}}, indent=None)
    return found


def _state(path: Path) -> list[int] | None:
    """What tells that a file has changed; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


@functools.cache
def _version() -> str:
    """Of all that decides what a check tells."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return _digest(PIL.__version__, *(path.read_text(encoding="utf-8") for path in sources))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogateescape")).hexdigest()[:16]
