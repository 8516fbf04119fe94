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
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'e3va[train]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format of ``path``'s suffix, and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot().close(figure)
