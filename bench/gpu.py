"""All that a GPU is to show, in one run: correctness of every kernel, then its speed.

    python -m bench.gpu [--json FILE] [--plot FILE]

Uses the Triton and CUDA kernels, also where "auto" does not choose them yet. Without a GPU it is a
dry run of tiny shapes on the CPU, with the backends that run there. Every result is compared with
float64 on the CPU; the run goes on after a wrong one and fails at its end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import e3va
from bench import kernels
from e3va.files import write_json
from e3va.ops import dispatch, reference
from e3va.ops.taps import TAPS, compress

# Relative error (norm over norm) against float64: some 4 units of the dtype's rounding.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# (B, H, W, C, heads): stages of Swin-T, -B and -L, and sizes that no tile divides.
SHAPES = [(1, 50, 84, 96, 3), (2, 25, 42, 512, 16), (1, 13, 21, 1536, 48), (1, 1, 1, 192, 6)]
DRY_SHAPES = [(2, 13, 21, 96, 3), (1, 1, 1, 192, 6)]
ADAPTERS = 3


def checks(device: torch.device) -> Iterator[dict[str, Any]]:
    """Relative errors of every op, in every dtype that has kernels here."""
    for dtype in TOLERANCE:
        for shape in SHAPES if device.type == "cuda" else DRY_SHAPES:
            for op, found, expected in results(shape, dtype, device):
                found, expected = found.double().cpu(), expected.double()
                error = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
                yield {
                    "op": op,
                    "backend": dispatch.explain(op, device, dtype).backend,
                    "dtype": str(dtype).removeprefix("torch."),
                    "shape": shape,
                    "error": error,
                    "right": error <= TOLERANCE[dtype],
                }


def results(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(op, what it gives here, what float64 gives) for each result of each op."""
    B, H, W, C, heads = shape
    rank, hidden = 16, C // 2
    torch.manual_seed(0)

    def weight(*size: int) -> Tensor:
        return torch.randn(*size) * size[-2] ** -0.5 if len(size) > 1 else torch.randn(size)

    def both(op: str, exact: Any, arguments: tuple[Any, ...]) -> Iterator[tuple[str, Any, Any]]:
        here = dispatch.run(op, like.to(device), *_map(arguments, lambda v: v.to(device)))
        there = exact(*_map(arguments, lambda v: v.double() if v.is_floating_point() else v))
        one = isinstance(here, Tensor)
        for found, expected in zip(*(([here], [there]) if one else (here, there)), strict=True):
            if found.numel():
                yield op, found, expected

    like = torch.empty(0, dtype=dtype)
    x, y = (torch.randn(B, H, W, C).to(dtype) for _ in range(2))
    P, Q, b, U = (
        weight(ADAPTERS, *size) for size in ((C, rank), (rank, hidden), (hidden,), (hidden, rank))
    )
    # Codes of a norm would differ where its rounding does.
    for tap, taps in (*(("output", taps) for taps in TAPS), ("norm", "full")):
        yield from both(
            "sublayer_epilogue",
            reference.sublayer_epilogue,
            (x, y, weight(C), weight(C), 1e-5, P[0], tap, taps, 5),
        )
    t, carry = (torch.randn(*n, B * H * W, rank).to(dtype) for n in ((ADAPTERS,), ()))
    dS = torch.randn(B * H * W, ADAPTERS * rank).to(dtype)
    u = torch.randn(ADAPTERS, B * H * W, rank).to(dtype)
    for side, gamma in ((0, None), (3, torch.randn(ADAPTERS, rank)), (7, None)):
        D = torch.randn(ADAPTERS, rank, side, side) / side if side else None
        weights = (D, gamma, Q, b, U, (H, W))
        before = None if gamma is None else carry
        yield from both("adapters", reference.adapters, (t, before, *weights))
        yield from both("adapters_backward", reference.adapters_backward, (dS, before, u, *weights))
    maps = [torch.randn(B * H * W, C).to(dtype) for _ in range(ADAPTERS)]
    for taps in TAPS:
        kept, scale = maps, []
        if taps != "full":
            kept, scale = map(list, zip(*(compress(tap, taps, 5) for tap in maps), strict=True))
        yield from both("tap_gradient", reference.tap_gradient, (kept, scale, taps, t, C))
    for window, shift in ((7, 0), (7, 3), (12, 0), (12, 6)):
        qkv = torch.randn(B, H, W, 3 * C).to(dtype)
        table = torch.randn((2 * window - 1) ** 2, heads)
        yield from both(
            "window_attention",
            reference.window_attention,
            (qkv, torch.randn(3 * C), table, window, shift),
        )


def _map(values: Any, change: Any) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, list | tuple):
        return type(values)(_map(value, change) for value in values)
    return values


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, default=kernels.PLOT, help="of the ratios")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = ["--seconds", "1", "--dtypes", "bf16", "--plot", str(options.plot)]
    if options.json:
        speed += ["--json", str(options.json)]
    if device.type == "cpu":
        print("no GPU: a dry run of tiny shapes")
        speed = [*speed, "--tiny", "--seconds", "0"]
    with e3va.backend("triton,native,reference"):
        checked = list(checks(device))
        wrong = [c for c in checked if not c["right"]]
        for c in wrong:
            print(f"WRONG {c['op']} {c['backend']} {c['dtype']} {c['shape']}: {c['error']:.1e}")
        print(f"{len(checked) - len(wrong)} of {len(checked)} results are right")
        report = kernels.main(speed)
    if options.json:
        write_json(options.json, {**report, "checks": checked})
    if wrong:
        sys.exit(f"{len(wrong)} results are wrong")


if __name__ == "__main__":
    main()
