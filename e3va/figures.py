"""Figures: drawn without a display, and written whole or not at all."""

from __future__ import annotations

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


def font_file() -> Path:
    """DejaVu Sans, which matplotlib brings: Latin, Greek and Cyrillic letters.

    Raises:
        ImportError: matplotlib is missing.
    """
    return Path(_matplotlib().get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


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
