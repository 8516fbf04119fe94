"""What the GPU kernels cost on each architecture; needs no GPU, and for window attention nvcc.

    python -m bench.registers [--json FILE]

Compiled ahead of time: registers, spills, shared memory and occupancy, of one streaming
multiprocessor, from the limits in CUDA's programming guide (compute capabilities). A kernel that
spills more than ``--spill`` says or does not fit ends with an error (Triton 3.9 gives two kernels a
frame of 8 and of 16 bytes, 3.8 one on sm_120 of 8). Executed by ``tests/ptx`` in the widths of
stage 3 of Swin-B, on a small map, per token (and adapter), where weights are folded per adapter:
instructions, memory and, for three GPUs, the nanoseconds of a roofline model, with caches that hold
all that is used again and with none, also of the whole backward of that stage. A model is no
measurement: it knows no latencies. With --json a table is written as it comes; one that is not
asked for stays in FILE as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
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

from bench.environment import environment, kept, result_file
from e3va.config import HighwayConfig
from e3va.files import atomic_path
from e3va.kernels import (
    adapters,
    adapters_backward,
    fold,
    stage_exit,
    sublayer_epilogue,
    tap_gradient,
)
from e3va.kernels.common import padded_rank
from e3va.ops.storage import DEFAULT_STORAGE, LARGEST
from e3va.trunks.swin import SWIN_VARIANTS
from tests.ptx.compiler import TritonCompiler, compiles, cuda
from tests.ptx.costs import measure
from tests.ptx.counters import SECTOR, Counts
from tests.ptx.window_attention import kernel_of


class Limits(NamedTuple):
    """Of a streaming multiprocessor: bytes of shared memory that a block may use and that there
    are, threads and blocks."""

    block_shared: int
    shared: int
    threads: int
    blocks: int


ARCHITECTURES = {
    75: Limits(64 << 10, 64 << 10, 1024, 16),
    80: Limits(163 << 10, 164 << 10, 2048, 32),
    86: Limits(99 << 10, 100 << 10, 1536, 16),
    89: Limits(99 << 10, 100 << 10, 1536, 24),
    90: Limits(227 << 10, 228 << 10, 2048, 32),
    100: Limits(227 << 10, 228 << 10, 2048, 32),
    120: Limits(99 << 10, 100 << 10, 1536, 24),
}
DEFAULT_ARCHITECTURES = [75, 80, 86, 89, 90, 120]
REGISTERS = 64 << 10
DRIVER_SHARED = 1 << 10  # bytes of a block's shared memory
ADAPTERS = 36  # K of the deepest stage
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
    storages: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Every kernel for one shape, and for taps kept as ``storages``: registers and spilled
    bytes a thread, bytes of shared memory a block, occupancy."""
    launches = []
    for note, tap, affine, storage in (
        ("", "output", True, "full"),
        (" norm", "norm", True, "full"),
        (" (no norm)", "output", False, "full"),
        (" (no adapter)", "none", True, "full"),
        *((f" {storage}", "output", True, storage) for storage in storages),
        *((f" norm {storage}", "norm", True, storage) for storage in storages),
        *(
            (f" {storage} (no norm)", "output", False, storage)
            for storage in storages
            if storage == DEFAULT_STORAGE
        ),
    ):
        tile = sublayer_epilogue.tiles(dtype, architecture, tap, storage)
        constants = {
            "CHANNELS": channels,
            "RANK": rank,
            "AFFINE": affine,
            "STORED": affine,
            "TAP": tap,
            "STORAGE": storage,
            "RANK_TILE": padded_rank(rank),
            "ROWS": tile.rows,
            "CHANNEL_TILE": tile.channels,
            "BYTE_TILE": tile.coded,
        }
        kernel = sublayer_epilogue.sublayer_epilogue_kernel
        launches.append((f"sublayer_epilogue{note}", kernel, constants, tile.num_warps))
    forms = [(side, state, False) for side, state in (FORMS if storages else FORMS[:2])]
    if DEFAULT_STORAGE in storages:
        forms += [(side, state, True) for side, state in FORMS]
    for side, state, coded in forms:
        note = f" {side}" + (" state" if state else "") + (" coded" if coded else "")
        mixing = {"SIDE": side, "STATE": state, "CODED": coded}
        tile = adapters.forward_tiles(dtype, architecture, rank, side)
        slots = {"SLOTS": 2 if state and coded else ADAPTERS}
        constants = adapter_constants(rank, hidden, tile) | mixing | slots
        launches.append((f"adapters{note}", adapters.adapters_kernel, constants, tile.num_warps))
        tile = adapters_backward.backward_tiles(dtype, architecture, rank, side)
        constants = adapter_constants(rank, hidden, tile) | mixing | {"NEXT": state, "OWN": True}
        kernel = adapters_backward.adapters_backward_kernel
        launches.append((f"adapters_backward{note}", kernel, constants, tile.num_warps))
    gradient = tap_gradient.tiles(dtype, architecture, channels, rank)
    launches += [
        (
            f"tap_gradient {storage}",
            tap_gradient.tap_gradient_kernel,
            {
                "RANK": rank,
                "RANK_TILE": padded_rank(rank),
                "CHANNELS": channels,
                "STORAGE": storage,
                "ROWS": gradient.rows,
                "CHANNEL_TILE": gradient.channels,
            },
            gradient.num_warps,
        )
        for storage in storages
    ]
    constants = {
        "SIDE": 3,
        "RANK": rank,
        "HIDDEN": hidden,
        "DIM": rank // HighwayConfig.branches,
        "RANK_TILE": padded_rank(rank),
        "HIDDEN_TILE": fold.HIDDEN_TILE,
    }
    launches.append(("fold", fold.fold_kernel, constants, fold.NUM_WARPS))
    launches.append(("fold_backward", fold.fold_backward_kernel, constants, fold.NUM_WARPS))
    for note, merging in (("", True), (" (last)", False)):
        constants = {
            "CHANNELS": channels,
            "MERGING": merging,
            "LOST": torch.finfo(dtype).eps,
            "TINY": torch.finfo(dtype).tiny,
            "ROWS": stage_exit.ROWS,
            "CHANNEL_TILE": stage_exit.CHANNEL_TILE,
        }
        kernel = stage_exit.stage_exit_backward_kernel
        launches.append((f"stage_exit_backward{note}", kernel, constants, stage_exit.NUM_WARPS))
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
        "ADAPTERS": ADAPTERS,
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
    wide |= {"D_out", "g", "g_up", "dg", "dQ", "db", "dU", "dg_up", "totals", "mixing_totals"}
    wide |= {"dP", "dD", "sums", "mean", "rstd", "weight", "bias", "merge_weight"}
    types = {f"{name}_ptr": "fp32" for name in wide} | {
        "codes_ptr": "u8",
        "words_ptr": "u32",
        "seed_ptr": "i64",
    }
    counts = "tokens", "rows", "height", "width", "first", "split_rows", "index"
    integers = dict.fromkeys(counts, "i32")
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            folds = kernel in (fold.fold_kernel, fold.fold_backward_kernel)
            kind = "fp32" if folds and not name.endswith("_out_ptr") else TYPES[dtype]
            if kernel is adapters_backward.adapters_backward_kernel and name == "u_ptr":
                kind = "i8" if constants["CODED"] else kind
            signature[name] = f"*{types.get(name, kind)}"
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
    (usage,) = resource_usage(compiled.asm["cubin"]).values()
    return resources(usage, compiled.metadata.shared, 32 * num_warps, architecture)


WINDOWS = 4, 8, 12
"""The largest that a kernel of window attention takes."""


def compile_attention(architecture: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every kernel of window attention, as :func:`compile_kernels`; none if no nvcc compiles it."""
    if not compiles(architecture):
        return
    used = resource_usage(cuda("window_attention.cu", architecture, "cubin"))
    launches = {" plain": kernel_of(dtype, WINDOWS[-1], plain=True)}
    if dtype != torch.float32:  # on tensor cores
        launches |= {f" {window}": kernel_of(dtype, window) for window in WINDOWS}
    for note, kernel in launches.items():
        (usage,) = (usage for name, usage in used.items() if kernel.name in name)
        # The driver's own part is counted from sm_90 on, and is added for all.
        shared = usage["SHARED"] - (DRIVER_SHARED if architecture >= 90 else 0) + kernel.dynamic
        yield {
            "kernel": f"window_attention{note}",
            "architecture": architecture,
            "dtype": TYPES[dtype],
            **resources(usage, shared, kernel.threads, architecture),
        }


def resources(
    usage: dict[str, int], shared: int, threads: int, architecture: int
) -> dict[str, Any]:
    """What a kernel takes that ``usage`` is of, with ``shared`` bytes and ``threads`` a block."""
    limits = ARCHITECTURES[architecture]
    registers = -(-usage["REG"] // 8) * 8 * threads  # handed out by eights
    blocks = min(
        REGISTERS // registers,
        limits.shared // (shared + DRIVER_SHARED),
        limits.threads // threads,
        limits.blocks,
    )
    return {
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": shared,
        "fits": shared <= limits.block_shared,
        "occupancy": blocks * threads / limits.threads,
    }


def resource_usage(cubin: bytes) -> dict[str, dict[str, int]]:
    """What cuobjdump says of each kernel in a cubin: REG, STACK, LOCAL, SHARED, …"""
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
    return {
        name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        for name, usage in re.findall(r"Function (\S+):\s*(.*)", text)
    }


def shapes(storages: Sequence[str]) -> list[tuple[int, int, int, Sequence[str]]]:
    """(C, α, m, compressed taps): each width of a Swin in the paper's shape, the widest with the
    extreme ranks, and with taps kept as ``storages``."""
    config = HighwayConfig()
    widths = sorted({dim for swin in SWIN_VARIANTS.values() for dim in swin.dims})
    *narrow, widest = [(width, config.rank, config.hidden(width)) for width in widths]
    return [
        *((*shape, ()) for shape in narrow),
        (*widest, storages),
        *((widths[-1], rank, widths[-1], storages) for rank in (4, 64)),
    ]


class Gpu(NamedTuple):
    """Peaks from the vendor's data sheets: clock under load in GHz, GB/s, and dense TFLOPS of
    tensor cores in 16 bits, summed in fp32."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    tensor: float


GPUS = {
    90: Gpu("H100 SXM", 132, 1.83, 3350, 989),
    89: Gpu("RTX 4060", 24, 2.46, 272, 30),
    86: Gpu("RTX 3060", 28, 1.78, 360, 25),
}


def roofline(counts: Counts, gpu: Gpu, cached: bool) -> float:
    """Nanoseconds, as modelled. Every sector that is asked for comes from memory; if ``cached``,
    each different one comes once. Four schedulers a multiprocessor issue an instruction each cycle.
    The slowest of memory, issue and tensor cores decides."""
    sectors = counts.distinct_sectors if cached else counts.sectors
    operations = 0.0
    for opcode, count in counts.opcodes.items():
        if shape := re.search(r"mma\S*\.m(\d+)n(\d+)k(\d+)", opcode):
            m, n, k = map(int, shape.groups())
            warps = 4 if opcode.startswith("wgmma") else 1  # that issue one together
            operations += 2 * m * n * k * count / warps
    return max(
        sectors * SECTOR / gpu.bandwidth,
        counts.instructions / (4 * gpu.multiprocessors * gpu.clock),
        operations / (1e3 * gpu.tensor),
    )


STAGE_TOKENS, BATCH = 50 * 84, 8  # of stage 3, for images of 800×1344
STAGE_BACKWARD = {
    "adapters_backward int8": BATCH * STAGE_TOKENS * ADAPTERS,
    f"tap_gradient {DEFAULT_STORAGE}": BATCH * STAGE_TOKENS * ADAPTERS,
    "stage_exit_backward": BATCH * STAGE_TOKENS,
    "fold": ADAPTERS,
    "fold_backward": ADAPTERS,
}
"""Kernel: its units. PyTorch's sums of what the parts add, which a cache may hold, are left out."""


def stage_backward(costs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Of each GPU that has the ``costs`` of all kernels, the milliseconds of the backward of stage
    3 of Swin-B at batch 8, as modelled: [with caches, with none]."""
    found: dict[str, list[float]] = {}
    for gpu in GPUS.values():
        rows = {c["kernel"]: c for c in costs if c.get("gpu") == gpu.name}
        if rows.keys() >= STAGE_BACKWARD.keys():
            found[gpu.name] = [
                round(sum(n * rows[kernel][model] for kernel, n in STAGE_BACKWARD.items()) / 1e6, 3)
                for model in ("model_ns_cached", "model_ns_uncached")
            ]
    return found


def execute_kernels(
    compiler: TritonCompiler, architecture: int, size: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Of every kernel what an execution on a map of that size counts, per unit of
    :class:`tests.ptx.costs.Cost`."""
    dtype = torch.bfloat16 if runs_on(architecture, torch.bfloat16) else torch.float16
    shape = 512, 16, 256
    for kernel, units, counts in measure(compiler, architecture, dtype, *shape, size=size):
        classes = counts.classes()
        cost = {
            "kernel": kernel,
            "architecture": architecture,
            "dtype": TYPES[dtype],
            "instructions": counts.instructions / units,
            "tensor": classes["tensor core"] / units,
            "special": classes["special function"] / units,
            "sectors_over_floor": counts.sectors_over_floor,
            "wavefronts": counts.wavefronts / units,
        }
        if gpu := GPUS.get(architecture):
            cost["gpu"] = gpu.name
            cost["model_ns_cached"] = roofline(counts, gpu, cached=True) / units
            cost["model_ns_uncached"] = roofline(counts, gpu, cached=False) / units
        yield {name: round(v, 4) if isinstance(v, float) else v for name, v in cost.items()}


def worst(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel, architecture and dtype the most that a shape takes."""
    found: dict[tuple, dict[str, Any]] = {}
    for r in results:
        key = r["kernel"], r["architecture"], r["dtype"]
        row = found.setdefault(
            key, dict(zip(("kernel", "architecture", "dtype"), key, strict=True))
        )
        for name in ("registers", "spilled", "shared"):
            row[name] = max(row.get(name, 0), r[name])
        row["occupancy"] = round(min(row.get("occupancy", 1.0), r["occupancy"]), 3)
    return list(found.values())


def write_report(path: Path, report: dict[str, Any]) -> None:
    """JSON with one line for each row of a table."""
    parts = []
    for name, table in report.items():
        head = json.dumps({key: value for key, value in table.items() if key != "rows"})
        rows = ",\n".join(map(json.dumps, table["rows"]))
        parts.append(f'"{name}": {head[:-1]}, "rows": [\n{rows}\n]}}')
    with atomic_path(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architectures", nargs="+", type=int, choices=ARCHITECTURES, default=DEFAULT_ARCHITECTURES
    )
    parser.add_argument("--dtypes", nargs="+", choices=TYPES.values(), default=list(TYPES.values()))
    for name in ("--channels", "--ranks"):
        parser.add_argument(name, nargs="+", type=int, help="these only (default: all)")
    choices = {"nargs": "*", "choices": LARGEST, "default": list(LARGEST)}
    parser.add_argument("--storages", **choices, help="of compressed taps (default: all)")
    tables = "compiled", "executed"
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    size = {"nargs": 2, "type": int, "default": (16, 16), "metavar": ("H", "W")}
    parser.add_argument("--size", **size, help="of the map that is executed (16 16)")
    parser.add_argument("--json", type=result_file, help="write the results, as they come, to this")
    parser.add_argument(
        "--spill", type=int, default=0, metavar="BYTES", help="that a thread may spill (default 0)"
    )
    options = parser.parse_args(arguments)
    if min(options.size) < 1:
        parser.error(f"--size must be positive, got {options.size[0]} {options.size[1]}")
    report, where = kept(options.json) or {}, environment()
    known = {
        name
        for name in tables
        if isinstance(report.get(name), dict) and isinstance(report[name].get("rows"), list)
    }
    if others := report.keys() - known:
        sys.exit(f"{options.json} holds other results, {', '.join(sorted(others))}: name another")
    results: list[dict[str, Any]] = []

    def keep(table: str, rows: list[dict[str, Any]], **of: Any) -> None:
        report[table] = {"environment": where, **of, "rows": rows}
        if options.json:
            write_report(options.json, report)

    chosen = [
        shape
        for shape in shapes(options.storages)
        if not options.channels or shape[0] in options.channels
        if not options.ranks or shape[1] in options.ranks
    ]
    if "compiled" in options.tables and not chosen:
        parser.error(f"of --channels and --ranks there is none of {[s[:2] for s in shapes(())]}")
    for architecture in options.architectures:
        if not compiles(architecture):
            print(f"no nvcc compiles for sm_{architecture}: window attention is left out")
    if "compiled" in options.tables:
        dtypes = [dtype for dtype, name in TYPES.items() if name in options.dtypes]
        for rows in print_resources(options.architectures, dtypes, chosen):
            results += rows
            keep("compiled", worst(results), channels_rank_hidden=[s[:3] for s in chosen])
    if "executed" in options.tables:
        costs: list[dict[str, Any]] = []
        for cost in print_costs(options.architectures, tuple(options.size)):
            costs.append(cost)
            stages = stage_backward(costs)
            keep("executed", costs, size=options.size, stage_backward_ms=stages)
        for gpu, (cached, uncached) in stages.items():
            times = f"{cached:.3f} to {uncached:.3f} ms on {gpu} (model)"
            print(f"backward of stage 3 at batch {BATCH}: {times}")
    bad = [r for r in results if r["spilled"] > options.spill or not r["fits"]]
    if bad:
        sys.exit(f"{len(bad)} of {len(results)} spill or do not fit: {bad[0]}")


def print_resources(
    architectures: Sequence[int],
    dtypes: Sequence[torch.dtype],
    chosen: Sequence[tuple[int, int, int, Sequence[str]]],
) -> Iterator[list[dict[str, Any]]]:
    """What each kernel takes, shape by shape, when it is printed."""
    names = "sm dtype    C    r    m  registers spilled  shared occupancy"
    print(f"{'kernel':33} {names}", flush=True)
    for architecture, dtype in itertools.product(architectures, dtypes):
        if not runs_on(architecture, dtype):
            continue
        made = [compile_kernels(architecture, dtype, *shape) for shape in chosen]
        for kernels in (*made, compile_attention(architecture, dtype)):
            rows = []
            for r in kernels:
                rows.append(r)
                shape = "".join(f"{r.get(of, ''):5}" for of in ("channels", "rank", "hidden"))
                print(
                    f"{r['kernel']:33}{architecture:3}  {r['dtype']}{shape}{r['registers']:11}"
                    f"{r['spilled']:8}{r['shared']:8}{r['occupancy']:10.0%}",
                    flush=True,
                )
            yield rows


def print_costs(architectures: Sequence[int], size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """The costs of each kernel, when they are printed."""
    print(f"{'per token or adapter':27} sm dtype instr. tensor special sectors wavefronts  model")
    with contextlib.closing(TritonCompiler()) as compiler:
        for architecture in architectures:
            for c in execute_kernels(compiler, architecture, size):
                model = ""
                if "gpu" in c:
                    model = f"{c['model_ns_cached']:8.2f} to {c['model_ns_uncached']:.2f} ns on "
                    model += f"{c['gpu']} (model)"
                print(
                    f"{c['kernel']:27}{architecture:3}  {c['dtype']}{c['instructions']:7.0f}"
                    f"{c['tensor']:7.1f}{c['special']:8.1f}{c['sectors_over_floor']:8.2f}"
                    f"{c['wavefronts']:11.1f}{model}",
                    flush=True,
                )
                yield c


if __name__ == "__main__":
    main()
