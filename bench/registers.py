"""Compile the Triton kernels ahead of time, and read registers, spills and shared memory.

    python -m bench.registers [--json FILE]

Needs no GPU. Occupancy is that of one streaming multiprocessor, from the limits in CUDA's
programming guide (compute capabilities). A kernel that spills or does not fit ends with an error.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from e3va.kernels.sublayer_epilogue import padded_rank, sublayer_epilogue_kernel, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.environment import environment
from e3va.config import SWIN_VARIANTS, HighwayConfig
from e3va.files import atomic_path


class Limits(NamedTuple):
    """Of a streaming multiprocessor: bytes of shared memory that a block may use and that there
    are, and threads."""

    block_shared: int
    shared: int
    threads: int


ARCHITECTURES = {
    75: Limits(64 << 10, 64 << 10, 1024),
    80: Limits(163 << 10, 164 << 10, 2048),
    90: Limits(227 << 10, 228 << 10, 2048),
    100: Limits(227 << 10, 228 << 10, 2048),
    120: Limits(99 << 10, 100 << 10, 1536),
}
REGISTERS = 64 << 10
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def runs_on(architecture: int, dtype: torch.dtype) -> bool:
    """sm_75 has no bfloat16."""
    return architecture >= 80 or dtype != torch.bfloat16


def compile_sublayer_epilogue(
    architecture: int, dtype: torch.dtype, channels: int, rank: int, hidden: int, norm: bool
) -> dict[str, Any]:
    """Registers and spilled bytes a thread, bytes of shared memory a block, occupancy."""
    tile = tiles(dtype, architecture)
    constants = {
        "CHANNELS": channels,
        "RANK": rank,
        "HIDDEN": hidden,
        "NORM": norm,
        "RANK_TILE": padded_rank(rank),
        "ROWS": tile.rows,
        "CHANNEL_TILE": tile.channels,
        "HIDDEN_TILE": tile.hidden,
    }
    signature = {}
    for name in sublayer_epilogue_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("norm_"):
            signature[name] = "*fp32"  # as the trunk stores it
        elif name.endswith("_ptr"):
            signature[name] = f"*{TYPES[dtype]}"
        else:
            signature[name] = {"tokens": "i32", "eps": "fp32"}[name]
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        sublayer_epilogue_kernel,
        signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": tile.num_warps},
    )
    usage = resource_usage(compiled.asm["cubin"])
    limits = ARCHITECTURES[architecture]
    shared, threads = compiled.metadata.shared, 32 * tile.num_warps
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


def cases(architectures: list[int]) -> list[dict[str, Any]]:
    """Each stage of each Swin at the paper's rank, and the extreme ranks at the widest stage."""
    config = HighwayConfig()
    widths = sorted({dim for swin in SWIN_VARIANTS.values() for dim in swin.dims})
    shapes = [(width, config.rank, config.hidden(width)) for width in widths]
    shapes += [(widths[-1], rank, widths[-1]) for rank in (4, 64)]
    return [
        {
            "architecture": architecture,
            "dtype": dtype,
            "channels": channels,
            "rank": rank,
            "hidden": hidden,
            "norm": norm,
        }
        for architecture in architectures
        for dtype in TYPES
        if runs_on(architecture, dtype)
        for channels, rank, hidden in shapes
        for norm in (True, False)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--channels", nargs="+", type=int, help="these only (default: all)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    results = []
    print("kernel             sm  dtype     C   r    m  norm  regs spilled  shared  occupancy")
    for case in cases(options.architectures):
        if options.channels and case["channels"] not in options.channels:
            continue
        result = compile_sublayer_epilogue(**case)
        case["dtype"] = TYPES[case["dtype"]]
        results.append({"kernel": "sublayer_epilogue", **case, **result})
        print(
            f"sublayer_epilogue {case['architecture']:3}   {case['dtype']} {case['channels']:5}"
            f"{case['rank']:4}{case['hidden']:5}  {'yes' if case['norm'] else 'no':4}"
            f"{result['registers']:6}{result['spilled']:8}{result['shared']:8}"
            f"{result['occupancy']:10.0%}",
            flush=True,
        )
    if options.json:
        with atomic_path(options.json) as path:
            report = {"environment": {**environment(), "triton": triton.__version__}}
            path.write_text(json.dumps({**report, "kernels": results}, indent=1) + "\n")
    bad = [r for r in results if r["spilled"] or not r["fits"]]
    if bad:
        sys.exit(f"{len(bad)} of {len(results)} spill or do not fit: {bad[0]}")


if __name__ == "__main__":
    main()
