"""Figures: drawn without a display, and written whole or not at all."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from e3va.files import atomic_path


def pyplot() -> Any:
    """``matplotlib.pyplot``, which opens no window.

    Raises:
        ImportError: matplotlib is missing.
    """
    _matplotlib().use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


@functools.cache
def font_file(letters: frozenset[str] = frozenset()) -> Path:
    """A font that has ``letters``: DejaVu Sans, which matplotlib brings, for Latin, Greek and
    Cyrillic, or the first of this system's; DejaVu Sans, if none has them all.

    Raises:
        ImportError: matplotlib is missing.
    """
    own = Path(_matplotlib().get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    wanted = {ord(letter) for letter in letters if not letter.isspace()}
    if wanted <= _letters_of(own):
        return own
    from matplotlib import font_manager

    system = map(Path, sorted(font_manager.findSystemFonts()))
    return next((font for font in system if wanted <= _letters_of(font)), own)


def _letters_of(font: Path) -> set[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(str(font)).get_charmap())
    except (OSError, RuntimeError):  # no font, or of a kind that FreeType does not read
        return set()


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format of ``path``'s suffix, and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot().close(figure)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'e3va[train]'") from error
    return matplotlib
