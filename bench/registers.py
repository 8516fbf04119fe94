"""Compile the Triton kernels ahead of time, and read registers, spills and shared memory.

    python -m bench.registers [--json FILE]

Needs no GPU. Occupancy is that of one streaming multiprocessor, from the limits in CUDA's
programming guide (compute capabilities). A kernel that spills or does not fit ends with an error.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.environment import environment
from e3va.config import SWIN_VARIANTS, HighwayConfig
from e3va.files import write_json
from e3va.kernels import adapters, sublayer_epilogue, tap_gradient
from e3va.kernels.common import padded_rank
from e3va.ops.taps import DEFAULT_TAPS, LARGEST


class Limits(NamedTuple):
    """Of a streaming multiprocessor: bytes of shared memory that a block may use and that there
    are, and threads."""

    block_shared: int
    shared: int
    threads: int


ARCHITECTURES = {
    75: Limits(64 << 10, 64 << 10, 1024),
    80: Limits(163 << 10, 164 << 10, 2048),
    86: Limits(99 << 10, 100 << 10, 1536),
    89: Limits(99 << 10, 100 << 10, 1536),
    90: Limits(227 << 10, 228 << 10, 2048),
    100: Limits(227 << 10, 228 << 10, 2048),
    120: Limits(99 << 10, 100 << 10, 1536),
}
REGISTERS = 64 << 10
TAPS = 36  # K of the deepest stage
FORMS = ((0, False), (3, True), (7, True))
"""(side of D, whether there is a state): none in the published highway, ours, the largest."""
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def runs_on(architecture: int, dtype: torch.dtype) -> bool:
    """sm_75 has no bfloat16."""
    return architecture >= 80 or dtype != torch.bfloat16


def compile_kernels(
    architecture: int,
    dtype: torch.dtype,
    channels: int,
    rank: int,
    hidden: int,
    formats: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Every kernel for one shape, and for taps compressed to ``formats``: registers and spilled
    bytes a thread, bytes of shared memory a block, occupancy."""
    launches = []
    for note, tap, affine, taps in (
        ("", "output", True, "full"),
        (" norm", "norm", True, "full"),
        (" (no norm)", "output", False, "full"),
        (" (no adapter)", "none", True, "full"),
        *((f" {taps}", "output", True, taps) for taps in formats),
        *((f" norm {taps}", "norm", True, taps) for taps in formats),
        *(
            (f" {taps} (no norm)", "output", False, taps)
            for taps in formats
            if taps == DEFAULT_TAPS
        ),
    ):
        tile = sublayer_epilogue.tiles(dtype, architecture, tap, taps)
        constants = {
            "CHANNELS": channels,
            "RANK": rank,
            "AFFINE": affine,
            "STORED": affine,
            "TAP": tap,
            "FORMAT": taps,
            "RANK_TILE": padded_rank(rank),
            "ROWS": tile.rows,
            "CHANNEL_TILE": tile.channels,
        }
        kernel = sublayer_epilogue.sublayer_epilogue_kernel
        launches.append((f"sublayer_epilogue{note}", kernel, constants, tile.num_warps))
    for side, state in FORMS if formats else FORMS[:2]:
        note = f" {side}" + (" state" if state else "")
        mixing = {"SIDE": side, "STATE": state}
        tile = adapters.forward_tiles(dtype, architecture, rank)
        constants = adapter_constants(rank, hidden, tile) | mixing
        launches.append((f"adapters{note}", adapters.adapters_kernel, constants, tile.num_warps))
        tile = adapters.backward_tiles(dtype, architecture, rank)
        constants = adapter_constants(rank, hidden, tile) | mixing | {"NEXT": state, "OWN": True}
        kernel = adapters.adapters_backward_kernel
        launches.append((f"adapters_backward{note}", kernel, constants, tile.num_warps))
    gradient = tap_gradient.tiles(dtype, architecture, channels, rank)
    launches += [
        (
            f"tap_gradient {taps}",
            tap_gradient.tap_gradient_kernel,
            {
                "RANK": rank,
                "RANK_TILE": padded_rank(rank),
                "CHANNELS": channels,
                "FORMAT": taps,
                "ROWS": gradient.rows,
                "CHANNEL_TILE": gradient.channels,
            },
            gradient.num_warps,
        )
        for taps in formats
    ]
    for name, kernel, constants, num_warps in launches:
        yield {
            "kernel": name,
            "architecture": architecture,
            "dtype": TYPES[dtype],
            "channels": channels,
            "rank": rank,
            "hidden": hidden,
            **compile_kernel(kernel, constants, num_warps, architecture, dtype),
        }


def adapter_constants(rank: int, hidden: int, tile: adapters.Tiles) -> dict[str, Any]:
    return {
        "TAPS": TAPS,
        "RANK": rank,
        "HIDDEN": hidden,
        "RANK_TILE": padded_rank(rank),
        "ROWS": tile.rows,
        "HIDDEN_TILE": tile.hidden,
    }


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    num_warps: int,
    architecture: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    # The trunk stores its norms in fp32; parameters are in it, unless they are multiplied, and so
    # are the sums of their gradients and of the state.
    wide = {"norm_weight", "norm_bias", "scale", "D", "gamma", "b", "state", "dstate"}
    wide |= {"dP", "dD", "sums"}
    types = {f"{name}_ptr": "fp32" for name in wide} | {
        "codes_ptr": "u8",
        "words_ptr": "u32",
        "seed_ptr": "i64",
    }
    integers = dict.fromkeys(("tokens", "height", "width", "first", "split_rows", "index"), "i32")
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{types.get(name, TYPES[dtype])}"
        else:
            signature[name] = {"eps": "fp32", **integers}[name]
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps},
    )
    usage = resource_usage(compiled.asm["cubin"])
    limits = ARCHITECTURES[architecture]
    shared, threads = compiled.metadata.shared, 32 * num_warps
    registers = -(-usage["REG"] // 8) * 8 * threads  # handed out by eights
    blocks = min(
        REGISTERS // registers, limits.shared // (shared + 1024), limits.threads // threads
    )
    return {
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": shared,
        "fits": shared <= limits.block_shared,
        "occupancy": blocks * threads / limits.threads,
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the one kernel in a cubin: REG, STACK, LOCAL, SHARED, …"""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)
    return {name: int(value) for name, value in found}


def shapes(formats: Sequence[str]) -> list[tuple[int, int, int, Sequence[str]]]:
    """(C, α, m, compressed taps): each width of a Swin in the paper's shape, the widest with the
    extreme ranks, and with taps in ``formats``."""
    config = HighwayConfig()
    widths = sorted({dim for swin in SWIN_VARIANTS.values() for dim in swin.dims})
    *narrow, widest = [(width, config.rank, config.hidden(width)) for width in widths]
    return [
        *((*shape, ()) for shape in narrow),
        (*widest, formats),
        *((widths[-1], rank, widths[-1], formats) for rank in (4, 64)),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES))
    for name in ("--channels", "--ranks"):
        parser.add_argument(name, nargs="+", type=int, help="these only (default: all)")
    formats = {"nargs": "*", "choices": LARGEST, "default": list(LARGEST)}
    parser.add_argument("--taps", **formats, help="of compressed taps these only (default: all)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    print(f"{'kernel':33} sm dtype    C   r    m  registers spilled  shared occupancy", flush=True)
    results = []
    for architecture in options.architectures:
        for dtype in TYPES:
            for shape in shapes(options.taps) if runs_on(architecture, dtype) else ():
                if options.channels and shape[0] not in options.channels:
                    continue
                if options.ranks and shape[1] not in options.ranks:
                    continue
                for r in compile_kernels(architecture, dtype, *shape):
                    results.append(r)
                    print(
                        f"{r['kernel']:33}{architecture:3}  {r['dtype']}{r['channels']:5}"
                        f"{r['rank']:4}{r['hidden']:5}{r['registers']:11}{r['spilled']:8}"
                        f"{r['shared']:8}{r['occupancy']:10.0%}",
                        flush=True,
                    )
    if options.json:
        report = {"environment": environment(), "kernels": results}
        write_json(options.json, report)
    bad = [r for r in results if r["spilled"] or not r["fits"]]
    if bad:
        sys.exit(f"{len(bad)} of {len(results)} spill or do not fit: {bad[0]}")


if __name__ == "__main__":
    main()
