"""What the kernels cost, counted while they run on the machine.

    python -m tests.ptx.costs [--architecture 80] [--dtype bfloat16] [--channels 512] …

Exact counts of one execution, per token (and adapter) of the work, where weights are folded per
adapter; no GPU and no model of its speed is involved. :func:`measure` is for other programs:
``bench`` may read its numbers.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch

from tests.ptx.compiler import TritonCompiler, compiles
from tests.ptx.counters import Counts
from tests.ptx.device import Device
from tests.ptx.window_attention import HEAD_DIM, window_attention

TAP_TOKENS = 4096
"""Of the tap whose gradient is computed, in one part: those of a stage's many taps are as long."""

WINDOW = 7
ATTENTION_SIZE = 2 * WINDOW, 2 * WINDOW
"""Of the map of window attention, which is whole windows."""


class Cost(NamedTuple):
    kernel: str
    units: int
    """Tokens, tokens × adapters or, where weights are folded, adapters that ``counts`` are of."""
    counts: Counts


def measure(
    compiler: TritonCompiler,
    architecture: int,
    dtype: torch.dtype,
    channels: int,
    rank: int,
    hidden: int,
    side: int = 3,
    size: tuple[int, int] = (16, 16),
    adapters: int = 2,
) -> Iterator[Cost]:
    """Each kernel on one map of ``size``, as the launchers launch it; the gradient of a tap of
    :data:`TAP_TOKENS`; where nvcc compiles it, window attention on maps of :data:`ATTENTION_SIZE`.

    Args:
        compiler: of the kernels.
        architecture: 80 for sm_80, and so on.
        dtype: of the map.
        channels, rank, hidden: C, α, m.
        side: of D.
        size: (H, W) of the map.
        adapters: K, with a state.
    """
    from e3va.kernels import tap_gradient as tap_gradients
    from e3va.kernels.adapters import adapters as forward
    from e3va.kernels.adapters_backward import adapters_backward as backward
    from e3va.kernels.fold import fold, fold_backward
    from e3va.kernels.stage_exit import stage_exit_backward
    from e3va.kernels.sublayer_epilogue import sublayer_epilogue
    from e3va.ops.storage import LARGEST, STORAGES, compress, keep

    N, K = size[0] * size[1], adapters
    x, y = (torch.randn(N, channels).to(dtype) for _ in range(2))
    norm = torch.ones(channels), torch.zeros(channels)
    P = torch.randn(channels, rank).to(dtype)
    t, dS = torch.randn(K, N, rank).to(dtype), torch.randn(N, K * rank).to(dtype)
    D, gamma = torch.randn(K, rank, side, side), torch.randn(K, rank)
    g = torch.eye(rank // 2).expand(K, 2, -1, -1).contiguous()
    Q, b, U = torch.randn(K, rank, hidden), torch.randn(K, hidden), torch.randn(K, hidden, rank)
    folded, weights = (D, g, Q, U, g), (D, gamma, g, Q, b, U, g, size)

    def counted(note: str, units: int, launcher, *arguments) -> Iterator[Cost]:
        with Device(compiler, architecture, counted=True) as device:
            launcher(*arguments)
        counts = device.counts[f"{launcher.__name__}_kernel"]
        yield Cost(launcher.__name__ + note, units, counts)

    for storage in STORAGES:
        yield from counted(
            f" {storage}",
            N,
            sublayer_epilogue,
            x,
            y,
            *norm,
            1e-5,
            P,
            "output",
            storage,
            torch.tensor(5),
        )
    for kept in ("full", "int8"):
        yield from counted(f" {kept}", N * K, forward, t, None, *weights, kept)
        u = (t, None) if kept == "full" else keep(t, kept)
        yield from counted(f" {kept}", N * K, backward, dS, None, *u, *weights)
    yield from counted("", K, fold, *folded, dtype)
    totals, of_D = torch.randn(K, hidden * (2 * rank + 1)), torch.randn(K, side**2, rank)
    yield from counted("", K, fold_backward, totals, of_D, *folded)
    x, dt = torch.randn(TAP_TOKENS, channels).to(dtype), torch.randn(1, TAP_TOKENS, rank).to(dtype)
    with mock.patch.object(tap_gradients, "splits_of", lambda tokens, programs: 1):
        for storage in LARGEST:
            codes, scale = compress(x, storage, 5)
            yield from counted(
                f" {storage}",
                TAP_TOKENS,
                tap_gradients.tap_gradient,
                codes[None],
                scale[None],
                storage,
                dt,
                channels,
            )
    p, dp = (torch.randn(1, *size, channels).to(dtype) for _ in range(2))
    dgathered = torch.randn(1, *(-(-n // 2) for n in size), 4 * channels).to(dtype)
    norms = torch.zeros(N), torch.ones(N), *norm, torch.ones(4 * channels)
    yield from counted("", N, stage_exit_backward, dp, dgathered, p, *norms, 1e-5)
    if compiles(architecture):
        heads = max(1, channels // HEAD_DIM)
        qkv = torch.randn(1, *ATTENTION_SIZE, 3 * heads * HEAD_DIM)
        biases = torch.randn(qkv.shape[3]), torch.randn((2 * WINDOW - 1) ** 2, heads)
        arguments = [v.to(dtype) for v in (qkv, *biases)]
        for note, shift in (("", 0), (" shifted", WINDOW // 2)):
            named = {"architecture": architecture, "counts": (counts := Counts())}
            window_attention(*arguments, WINDOW, shift, **named)
            yield Cost(f"window_attention{note}", qkv.shape[1:3].numel(), counts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, default=80)
    parser.add_argument("--dtype", default="bfloat16")
    for name, default in (("channels", 512), ("rank", 16), ("hidden", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    shape = options.channels, options.rank, options.hidden
    print("per token or adapter     instructions  tensor  special  sectors  over floor  wavefronts")
    with contextlib.closing(TritonCompiler()) as compiler:
        for kernel, units, counts in measure(compiler, options.architecture, dtype, *shape):
            classes = counts.classes()
            print(
                f"{kernel:24}{counts.instructions / units:14.1f}"
                f"{classes['tensor core'] / units:8.2f}{classes['special function'] / units:9.2f}"
                f"{counts.sectors / units:9.1f}{counts.sectors_over_floor:12.2f}"
                f"{counts.wavefronts / units:12.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
