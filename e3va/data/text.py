"""Text files as people's tools write them."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one, which
    PowerShell and .NET write.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is in another encoding; names the file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file at {path}")
    content = Path(path).read_bytes()
    try:
        return content.decode(_MARKS.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}. Save it in that encoding") from None
