"""Words of messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def quoted(names: Iterable[str]) -> str:
    """Names, which may hold commas, in a row."""
    return ", ".join(map(repr, names))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What of ``known`` is closest to a mistyped word, whatever its case, as the end of a message;
    empty where nothing is close."""
    by_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_case, n=1)
    return f": did you mean {by_case[close[0]]}?" if close else ""
