"""Files appear whole or not at all, and are what they seem to be."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends without an error.

    Missing parent directories are made. On an error ``path`` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        # Some writers, safetensors' among them, keep what they make to its owner.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 1) -> None:
    """Write ``content`` as JSON, whole or not at all; without an ``indent`` in one line."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


_PLACEHOLDERS = {
    b"version https://git-lfs.github.com/spec": "a pointer of Git LFS: run `git lfs pull`",
    b"<!doctype html": "an HTML page: the download has brought an error or a login",
    b"<html": "an HTML page: the download has brought an error or a login",
}
"""What a file begins with that stands where another should be, in small letters."""


def placeholder(path: str | os.PathLike[str]) -> str | None:
    """What a file is that stands where another should be, in words; None if it is no such file."""
    with open(path, "rb") as file:
        start = file.read(256).lstrip().lower()
    return next((what for mark, what in _PLACEHOLDERS.items() if start.startswith(mark)), None)
