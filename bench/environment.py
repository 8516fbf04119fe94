"""Where results lie, what each of them carries, and how a run goes on from its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from e3va.environment import environment

__all__ = ["RESULTS", "environment", "kept"]

RESULTS = Path(__file__).parent / "results"


def kept(file: Path | None, part: str | None = None) -> dict[str, Any] | None:
    """The results that ``file`` holds; None: there is no such file. Ends the process with a line
    where they are no dictionary or have none called ``part``."""
    if file is None or not file.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        (report[part] if part else report).items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        sys.exit(f"{file} holds no results to go on from: {error!r}")
    return report
