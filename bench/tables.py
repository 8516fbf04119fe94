"""Writes README's tables of results from the files that hold them.

    python -m bench.tables

A table stands between a line ``<!-- NAME -->`` and the next ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from bench.environment import RESULTS

README = Path(__file__).parents[1] / "README.md"


def tracks() -> str:
    """Every method on the digits tracks, at the config's learning rate and at the best of those
    that have been run."""
    found = json.loads((RESULTS / "tracks_digits.json").read_text())["tracks"]
    names = {method: None for track in found.values() for method in track["methods"]}
    titles = [t for track in found.values() for t in (track["metric"], "at its best rate")]
    lines = [_row("", *titles, "trained", "saved"), "|---" * (3 + len(titles)) + "|"]
    for method in names:
        scores = []
        for track in found.values():
            result = track["methods"].get(method)
            if result is None:
                scores += ["–", "–"]
                continue
            best = f"{_score(result['runs'], result['rate'])} ({result['rate']:g} ×)"
            scores += [_score(result["runs"], 1.0), best]
        cost = found["instances"]["methods"][method]
        trained = f"{cost['trainable_params'] / 1e6:.3f} M"
        saved = f"{cost['saved_bytes'] / 2**20:.1f} MiB"
        lines.append(_row(f"`{method}`", *scores, trained, saved))
    return "\n".join(lines)


def _score(runs: list[dict[str, float]], rate: float) -> str:
    """Mean and deviation over the seeds; one seed has no deviation."""
    scores = [run["score"] for run in runs if run["rate"] == rate]
    if not scores:
        return "–"
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


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
