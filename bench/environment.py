"""Where results lie, what each of them carries, and how a run goes on from its own."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from e3va.environment import environment
from e3va.figures import check_picture

__all__ = ["RESULTS", "environment", "kept", "picture_file", "result_file"]

RESULTS = Path(__file__).parent / "results"


def result_file(text: str) -> Path:
    """An argument that names a file to write, which is tried before hours of work."""
    path = Path(text)
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {path}: {error}") from error


def picture_file(text: str) -> Path:
    """The same, of a picture."""
    try:
        check_picture(Path(text))
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return result_file(text)


def kept(file: Path | None, part: str | None = None) -> dict[str, Any] | None:
    """The results that ``file`` holds; None: there is no such file. Ends the process with a line
    where they are no dictionary or have none called ``part``."""
    if file is None or not file.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        (report[part] if part else report).items()
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        sys.exit(f"{file} holds no results to go on from: {type(error).__name__}: {error}")
    return report
