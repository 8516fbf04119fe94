"""Writes the tables of results of README and docs from the files that hold them.

    python -m bench.tables

A table stands between a line ``<!-- NAME -->`` and the next ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.environment import RESULTS
from bench.train_step import MIB, average, saving

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
Step = dict[str, Any]
"""What bench.train_step tells of the steps of a method."""

ENGINES = {"detectron2": "Detectron2", "torchvision": "torchvision"}


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


def real() -> str:
    """The methods on real images, one seed each."""
    found = json.loads((RESULTS / "tracks_real.json").read_text())["tracks"]
    lines = [_row("", "", "score", "trained", "saved"), "|---" * 5 + "|"]
    for name, track in found.items():
        for method, result in track["methods"].items():
            trained = f"{result['trainable_params'] / 1e6:.3f} M"
            saved = f"{result['saved_bytes'] / MIB:.1f} MiB"
            score = f"{track['metric']} {result['mean']:.1f}"
            lines.append(_row(f"`{name}`", f"`{method}`", score, trained, saved))
    return "\n".join(lines)


def costs(file: str = "train_step.json") -> str:
    """Bytes of a whole step of every setup at their peak, by method, and E³VA's saving."""
    key = "total_bytes"
    return _steps(file, key, lambda step, _: f"{step[key] / MIB:.0f}", "MiB")


def times() -> str:
    """Seconds of a real step by method, over those of stock, and E³VA's saving."""
    file, key = "train_step_cpu.json", "seconds_per_step"
    return _steps(file, key, lambda step, stock: f"{step[key] / stock[key]:.2f}", "× `stock`")


def _steps(file: str, key: str, cell: Callable[[Step, Step], str], unit: str) -> str:
    setups = json.loads((RESULTS / file).read_text())["setups"]
    names = {method: None for methods in setups.values() for method in methods}
    titles = [f"`{method}`" for method in names]
    lines = [_row(unit, *titles, "saved"), "|---" * (2 + len(titles)) + "|"]
    for setup, methods in setups.items():
        found = (methods.get(method) for method in names)
        cells = [cell(result, methods["stock"]) if result else "–" for result in found]
        percent = saving(methods, key)
        saved = "–" if percent is None else f"{percent:.1f} %"
        lines.append(_row(f"`{setup}`", *cells, saved))
    return "\n".join([*lines, "", f"{average(setups, key)}."])


def cards() -> str:
    """The most images of the standard size, and the shorter side of the largest image, by card."""
    found = json.loads((RESULTS / "cards.json").read_text())
    names = list(found["usable_bytes"])
    lines = [_row("", "", *names), "|---" * (2 + len(names)) + "|"]
    for setup, methods in found["setups"].items():
        for method, by_card in methods.items():
            cells = []
            for name in names:
                batch, size = by_card[name]["largest_batch"], by_card[name]["largest_size"]
                cells.append(f"{batch} · {min(size)}" if size else "–")
            lines.append(_row(f"`{setup}`", f"`{method}`", *cells))
    return "\n".join(lines)


def plans() -> str:
    """What was planned of ten steps, and what they took."""
    cases = json.loads((RESULTS / "plan.json").read_text())["cases"]
    lines = [_row("", "", "images", "planned", "real", "error"), "|---" * 6 + "|"]
    for case in cases:
        planned, real = case["planned_bytes"], case["real_bytes"]
        height, width = case["size"]
        parts = "" if case["images"] == case["batch"] else f" of {case['batch']}"
        images = f"{case['images']}{parts} × {height}×{width}"
        found = f"{planned / MIB:.1f}", f"{real / MIB:.1f}"
        error = f"{100 * abs(planned / real - 1):.2f} %"
        lines.append(_row(f"`{case['config']}`", f"`{case['method']}`", images, *found, error))
    return "\n".join(lines)


def kernels() -> str:
    """How many times as fast the CPU kernels are as what they replace, in two dtypes."""
    rows = {
        "frozen trunk, forward, against timm's": ("trunk_forward", "timm"),
        "window attention, stage 3, against roll, pad, mask": ("window_attention", "eager"),
        "… around SDPA": ("window_attention", "sdpa"),
        "highway, stage 3, forward and backward, against one adapter at a time": (
            "highway",
            "eager",
        ),
        "… through torch.compile": ("highway", "compile"),
        "`sublayer_epilogue` alone, against eager": ("sublayer_epilogue", "eager"),
        "`adapters` alone, against eager": ("adapters", "eager"),
        "`adapters_backward` alone, against eager": ("adapters_backward", "eager"),
        "`tap_gradient` alone, against eager": ("tap_gradient", "eager"),
    }
    dtypes = ("fp32", "bf16")
    ratios = _ratios("kernels_cpu.json", "dtype")
    lines = [_row("", *dtypes), "|---" * (1 + len(dtypes)) + "|"]
    for title, (op, other) in rows.items():
        lines.append(_row(title, *(f"{ratios[op, dtype][other]:.2f}" for dtype in dtypes)))
    return "\n".join(lines)


def h100() -> str:
    """How many times as fast as PyTorch the GPU kernels are on each stage of Swin-B."""
    rows = {
        "window attention": ("window_attention", "eager"),
        "`adapters`": ("adapters", "eager"),
        "`adapters_backward`": ("adapters_backward", "eager"),
        "`tap_gradient`": ("tap_gradient", "eager"),
        "`sublayer_epilogue`": ("sublayer_epilogue", "eager"),
        "highway, forward and backward": ("highway", "eager"),
        "… against torch.compile": ("highway", "compile"),
    }
    stages = (0, 1, 2)
    ratios = _ratios("gpu_h100.json", "stage")
    lines = [_row("", *(f"stage {s + 1}" for s in stages)), "|---" * (1 + len(stages)) + "|"]
    for title, (op, other) in rows.items():
        lines.append(_row(title, *(f"{ratios[op, stage][other]:.1f}" for stage in stages)))
    return "\n".join(lines)


def modelled() -> str:
    """What the GPU kernels execute, and the times of a roofline model, without those that work
    once for an adapter; a stage's backward last."""
    executed = json.loads((RESULTS / "registers.json").read_text())["executed"]
    rows = executed["rows"]
    found = {(row["kernel"], row["architecture"]): row for row in rows}
    gpus = {row["architecture"]: row["gpu"] for row in rows if "gpu" in row}
    names = {kernel: None for kernel, _ in found if not kernel.startswith("fold")}
    titles = ["instructions, sm_80", *(f"{gpu}, ns" for gpu in gpus.values())]
    lines = [_row("", *titles), "|---" * (1 + len(titles)) + "|"]
    for name in names:
        models = (found[name, architecture] for architecture in gpus)
        times = (f"{m['model_ns_cached']:.2f} – {m['model_ns_uncached']:.2f}" for m in models)
        kernel, _, kept = name.partition(" ")
        instructions = f"{found[name, 80]['instructions']:.0f}"
        lines.append(_row(f"`{kernel}` {kept}".strip(), instructions, *times))
    stages = (executed["stage_backward_ms"][gpu] for gpu in gpus.values())
    times = (f"{cached:.3f} – {uncached:.3f} ms" for cached, uncached in stages)
    lines.append(_row("backward of stage 3, batch 8", "–", *times))
    return "\n".join(lines)


def _ratios(name: str, key: str) -> dict[tuple[str, object], dict[str, float]]:
    """Of each op of Swin-B in a result file of bench.kernels, by what tells its cases apart."""
    cases = json.loads((RESULTS / name).read_text())["cases"]
    return {(c["op"], c[key]): c["ratios"] for c in cases if c["variant"] == "swin_b"}


def precision() -> str:
    """What a trunk in fewer bits does to the features of each stage, and to the demo's mask AP."""
    found = json.loads((RESULTS / "precision_cpu.json").read_text())
    titles = {
        "fp32": "fp32",
        "bf16": "bf16",
        "int8": "int8 (weights and activations)",
        "fp8": "fp8 (weights alone, on a CPU)",
    }
    stages = [f"stage {stage}" for stage in range(1, 5)]
    lines = [_row("trunk", *stages, "mask AP"), "|---" * (2 + len(stages)) + "|"]
    for name, title in titles.items():
        errors = found["feature_error"].get(name)
        cells = [f"{error:.1%}".replace("%", " %") for error in errors] if errors else ["0"] * 4
        lines.append(_row(title, *cells, f"{found['demo'][name]['mask_ap']:.1f}"))
    return "\n".join(lines)


def demo() -> str:
    """What `python -m e3va.demo` found, and where: its report.json."""
    found = json.loads((RESULTS / "demo.json").read_text())
    titles = ("box AP", "mask AP", "mask AP50", "trained", "saved", "peak live", "s/iteration")
    lines = [_row("", *titles), "|---" * (1 + len(titles)) + "|"]
    for method, r in found["methods"].items():
        cells = [f"{r[score]:.1f}" for score in ("box_ap", "mask_ap", "mask_ap50")]
        cells.append(f"{r['trainable_params'] / 1e6:.3f} M")
        cells += [f"{r[size] / MIB:.1f} MiB" for size in ("saved_bytes", "peak_live_bytes")]
        lines.append(_row(f"`{method}`", *cells, f"{r['seconds_per_iter']:.3f}"))
    where = found["environment"]
    threads = f"{where['threads']} thread" + "s" * (where["threads"] > 1)
    lines += [
        "",
        f"{found['iterations']} iterations each, by {ENGINES[found['engine']]}, on {threads} of an "
        f"{where['device']}; {found['seconds'] / 60:.0f} minutes in all.",
    ]
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


TABLES: dict[str, Callable[[], str]] = {
    "cards": cards,
    "plans": plans,
    "costs": costs,
    "costs_of_two": partial(costs, "train_step_batch2.json"),
    "times": times,
    "demo": demo,
    "kernels": kernels,
    "h100": h100,
    "modelled": modelled,
    "precision": precision,
    "tracks": tracks,
    "real": real,
}


def rendered(text: str) -> str:
    """A page's ``text`` with its tables as the result files have them.

    Raises:
        KeyError: no such table.
    """

    def table(found: re.Match[str]) -> str:
        begin, end = found["begin"], found["end"]
        return f"{begin}\n\n{TABLES[found['name']]()}\n\n{end}"

    pattern = r"(?P<begin><!-- (?P<name>\w+) -->)\n.*?(?P<end><!-- end -->)"
    return re.sub(pattern, table, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text()
        if (new := rendered(text)) != text:
            page.write_text(new)
