"""Text files as people's tools write them."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import Any

from e3va.files import placeholder

_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one, which
    PowerShell and .NET write.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is in another encoding, or stands where it should be; names the file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file at {path}")
    if what := placeholder(path):
        raise ValueError(f"{path} is {what}")
    content = Path(path).read_bytes()
    try:
        return content.decode(_MARKS.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}. Save it in that encoding") from None


LARGEST_YAML = 1 << 20
"""Characters of a YAML file: nobody writes more by hand, and parsing them takes minutes."""


def load_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a YAML file: lists and dictionaries of text, so that a class called yes is no
    boolean.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: PyYAML is missing.
        ValueError: it is no YAML file, larger than :data:`LARGEST_YAML`, or in an encoding that
            :func:`read_text` does not know.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError(f"{path} needs PyYAML: pip install 'e3va[train]'") from error
    text = read_text(path)
    if len(text) > LARGEST_YAML:
        raise ValueError(f"{path} has {len(text)} characters: too large for what it should hold")
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
