"""Where results lie, and what each of them carries."""

from pathlib import Path

from e3va.environment import environment

__all__ = ["RESULTS", "environment"]

RESULTS = Path(__file__).parent / "results"
