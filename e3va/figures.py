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
    """The font that lacks the fewest of ``letters``: DejaVu Sans, which matplotlib brings, has all
    of Latin, Greek and Cyrillic; where it has not, the fonts of this system are looked through.

    Raises:
        ImportError: matplotlib is missing.
    """
    own = Path(_matplotlib().get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    wanted = {ord(letter) for letter in letters if not letter.isspace()}
    if wanted <= _letters_of(own):
        return own
    from matplotlib import font_manager

    fonts = [own, *map(Path, sorted(font_manager.findSystemFonts()))]
    return min(fonts, key=lambda font: len(wanted - _letters_of(font)))


@functools.cache
def _letters_of(font: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(str(font))
    except (OSError, RuntimeError):  # no font, or of a kind that FreeType does not read
        return frozenset()
    return frozenset(face.get_charmap()) if face.scalable else frozenset()


def check_picture(path: Path) -> None:
    """That a figure can be written in the format of ``path``'s suffix.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: it knows no such format; lists those that it does.
    """
    _matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"}  # which needs LaTeX
    if path.suffix.lower().removeprefix(".") not in known:
        raise ValueError(
            f"{path}: a picture's name ends with .{', .'.join(sorted(known))}, not with "
            f"{path.suffix or 'none of them'}"
        )


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
