"""Writes README's tables of results from the files that hold them.

    python -m bench.tables

A table stands between a line ``<!-- NAME -->`` and the next ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.environment import RESULTS

README = Path(__file__).parents[1] / "README.md"


def tracks() -> str:
    """Every method on the digits tracks: mean and deviation over the seeds that have been run."""
    found = json.loads((RESULTS / "tracks_digits.json").read_text())["tracks"]
    names = {method: None for track in found.values() for method in track["methods"]}
    titles = [f"{track['metric']}, {track['iterations']} iterations" for track in found.values()]
    lines = [_row("", *titles, "trained", "saved"), "|---" * (3 + len(found)) + "|"]
    for method in names:
        scores = [_score(track["methods"].get(method)) for track in found.values()]
        cost = found["instances"]["methods"][method]
        trained = f"{cost['trainable_params'] / 1e6:.3f} M"
        saved = f"{cost['saved_bytes'] / 2**20:.1f} MiB"
        lines.append(_row(f"`{method}`", *scores, trained, saved))
    return "\n".join(lines)


def _score(result: dict[str, Any] | None) -> str:
    """Mean and deviation, and the rate that they are of; one seed has no deviation."""
    if result is None:
        return "–"
    spread = "" if result["std"] is None else f" ± {result['std']:.1f}"
    return f"{result['mean']:.1f}{spread} ({result['rate']:g} ×)"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


TABLES: dict[str, Callable[[], str]] = {"tracks": tracks}


def rendered(text: str) -> str:
    """``text`` with its tables as the result files have them."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        whole = f"{begin}\n\n{table()}\n\n{end}"
        text, found = re.subn(rf"{begin}\n.*?{end}", lambda _, w=whole: w, text, flags=re.S)
        if found != 1:
            raise ValueError(f"README has {found} places for the table {name}, not one")
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
