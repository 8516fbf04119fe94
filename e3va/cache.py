"""The user's cache folder: JSON files of what is dear to find out and can be found out again.

It is ``$XDG_CACHE_HOME/e3va`` (default ``~/.cache/e3va``). A file that is damaged, or cannot be
written, is told in one warning, and is in nobody's way.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from e3va.files import write_json

T = TypeVar("T")


def cache_path(name: str) -> Path:
    """The file of that name in the cache folder, whether or not there is one."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user without a home
        cache = os.devnull
    return Path(cache) / "e3va" / name


def read_cache(path: Path, parse: Callable[[Any], T]) -> T | None:
    """What ``parse`` makes of a file's content; None where there is no file, or it is damaged."""
    try:
        return parse(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        warn_once(f"{path} is damaged, its content is made anew: {type(error).__name__}: {error}")
        return None


def write_cache(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write a file, whole or not at all; where it cannot be written, warn."""
    try:
        write_json(path, content, indent)
    except OSError as error:
        warn_unwritable(path, error)


def warn_unwritable(path: Path, why: Exception) -> None:
    """Tell that a file of the cache cannot be written."""
    warn_once(
        f"what was found out cannot be kept in {path}: {why}. Each process finds it out anew; "
        "XDG_CACHE_HOME names another folder."
    )


@functools.cache
def warn_once(text: str) -> None:
    """Warn, but never twice of one thing."""
    warnings.warn(text, stacklevel=2)
