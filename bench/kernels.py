"""The fused ops against what they replace: time, as ratios, on the device that is found.

    python -m bench.kernels [--json FILE] [--plot FILE]

On a CPU: stage 3 of Swin-B at 800×1344 and the whole trunk, batch 1. On a GPU: stages 1–3 of
Swin-T, -B and -L at batch 1, 2 and 8, through torch.compile Swin-B at batch 1 alone. Competitors
of one case run interleaved; times are medians. A ratio above 1 means that ours is faster; the
summary holds the lowest of all cases.

sublayer_epilogue, adapters, adapters_backward, tap_gradient: the ops alone, against eager PyTorch;
on a GPU with the share of the measured copy bandwidth that they reach over the fewest bytes that
they could move.
highway: residual adds, norms and all adapters of a stage, forward and backward, against the same
with one adapter at a time in eager PyTorch and through torch.compile. window_attention: against
Swin's roll, pad, partition and mask around eager attention, and around SDPA. trunk_forward: the
frozen Swin against timm's with the same weights under no_grad.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.competitors import DTYPES, OPS, OURS, Case, Competitors, least_bytes
from bench.environment import environment, picture_file, result_file
from e3va.figures import pyplot, save
from e3va.files import write_json

PLOT = Path("output/bench/kernels.png")

# Cases --------------------------------------------------------------------------------------------


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by copying half a GiB."""
    source = torch.empty(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [_seconds(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * source.nbytes / statistics.median(seconds)


LIGHT = ("sublayer_epilogue", "window_attention")
"""Ops that hold no taps of a whole stage."""

RATIOS = {
    "highway_fwd_bwd_vs_eager": ("highway", "eager"),
    "highway_fwd_bwd_vs_compile": ("highway", "compile"),
    "window_attention_vs_eager": ("window_attention", "eager"),
    "window_attention_vs_sdpa": ("window_attention", "sdpa"),
    "trunk_forward_vs_timm": ("trunk_forward", "timm"),
}


def cases(device: str) -> Iterator[Case]:
    """What is measured on a device by default."""
    if device == "cpu":
        for dtype in ("fp32", "bf16"):
            for op in OPS:
                if op != "trunk_forward":
                    yield Case(op, "swin_b", 2, 1, dtype, compiled=op == "highway")
            yield Case("trunk_forward", "swin_b", None, 1, dtype)
        return
    for batch in (1, 2, 8):
        for variant in ("swin_b", "swin_t", "swin_l"):
            compiled = variant == "swin_b" and batch == 1
            for op in OPS:
                # Of Swin-L at batch 8 the taps of a stage would not fit a small GPU.
                if op == "trunk_forward" or (op not in LIGHT and batch > 2):
                    continue
                for stage in range(3):
                    yield Case(op, variant, stage, batch, "bf16", compiled=compiled)
            yield Case("trunk_forward", variant, None, batch, "bf16", compiled=compiled)


# Measuring ----------------------------------------------------------------------------------------


def measure(competitors: Competitors, device: str, seconds: float) -> dict[str, float]:
    """Median seconds of each, interleaved over some ``seconds`` and at least three rounds."""
    for run in competitors.values():
        run()  # compiles, and warms up
    times: dict[str, list[float]] = {name: [] for name in competitors}
    began = time.perf_counter()
    while len(times[OURS]) < 3 or time.perf_counter() - began < seconds:
        for name, run in competitors.items():
            times[name].append(_seconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=5, rep=20, return_mode="median") / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def summary(results: list[dict[str, Any]]) -> dict[str, float]:
    """The lowest ratio of all cases, for each pair that was measured."""
    ratios = {}
    for name, (op, other) in RATIOS.items():
        # On a GPU not all cases compete with torch.compile.
        found = [r["ratios"][other] for r in results if r["op"] == op and other in r["ratios"]]
        if found:
            ratios[name] = min(found)
    return ratios


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratios, one group for each case."""
    bars = [
        (f"{r['op']} {r['variant']} {_where(r)} {r['dtype']} vs {other}", ratio)
        for r in results
        for other, ratio in r["ratios"].items()
    ]
    figure, axes = pyplot().subplots(figsize=(8, 1 + 0.25 * len(bars)), layout="constrained")
    axes.barh([name for name, _ in bars], [ratio for _, ratio in bars])
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast")
    save(figure, path)


def _where(result: dict[str, Any]) -> str:
    stage = "" if result["stage"] is None else f"stage {result['stage'] + 1} "
    return f"{stage}batch {result['batch']}"


def main(arguments: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """``more``: what else the report is to hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="these only")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=10.0, help="for a case (default 10)")
    parser.add_argument("--tiny", action="store_true", help="a dry run of tiny shapes")
    parser.add_argument("--json", type=result_file, help="write to this file, after each case")
    parser.add_argument(
        "--plot", type=picture_file, default=str(PLOT), help=f".png, .svg or .pdf ({PLOT})"
    )
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    todo = [c for c in cases(device) if c.op in options.ops and c.dtype in options.dtypes]
    if options.tiny:
        todo = [c._replace(variant="swin_t", batch=1, image=(224, 256)) for c in todo]
    bandwidth = copy_bandwidth(device) if device == "cuda" else math.nan
    results: list[dict[str, Any]] = []
    report = {"environment": environment(), "ratios": {}, "cases": results, **more}
    for case in tqdm(todo, unit="case"):
        torch.manual_seed(0)
        torch.compiler.reset()
        seconds = measure(OPS[case.op](case, device), device, options.seconds)
        ratios = {name: t / seconds[OURS] for name, t in seconds.items() if name != OURS}
        results.append({**case._asdict(), "seconds": seconds, "ratios": ratios})
        if device == "cuda" and (least := least_bytes(case)):
            results[-1]["bandwidth_share"] = least / seconds[OURS] / bandwidth
        shown = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in ratios.items())
        if "bandwidth_share" in results[-1]:
            shown += f", {results[-1]['bandwidth_share']:.0%} of copy bandwidth"
        tqdm.write(
            f"{case.op:17} {case.variant} {_where(results[-1]):16} {case.dtype}: {shown}"
            f" ({1e3 * seconds[OURS]:.2f} ms)"
        )
        report["ratios"] = summary(results)
        if options.json:
            write_json(options.json, report)
    for name, ratio in report["ratios"].items():
        print(f"{name:28} {ratio:.2f}")
    plot(results, options.plot)
    print(f"the ratios are drawn in {options.plot}")
    return report


if __name__ == "__main__":
    main()
