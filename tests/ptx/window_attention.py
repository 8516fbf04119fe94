"""Launches the CUDA kernels of ``csrc/cuda/window_attention.cu`` on the machine, as ``launch``
there does on a GPU: the one launcher that Python cannot call without one."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.ptx import compiler
from tests.ptx.machine import Program
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import Entry, parse

HEAD_DIM = 32
MANGLED = {
    torch.float32: "If",
    torch.float16: "I6__half",
    torch.bfloat16: "I13__nv_bfloat16",
}
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of csrc/params.h's Dtype


@functools.cache
def entries(architecture: int) -> dict[str, Entry]:
    return parse(compiler.cuda("window_attention.cu", architecture).decode())


class Kernel(NamedTuple):
    name: str
    """What the mangled one contains."""
    threads: int
    """Of a block."""
    dynamic: int
    """Bytes of shared memory whose size the launch says."""


def kernel_of(dtype: torch.dtype, window: int, plain: bool = False) -> Kernel:
    """The kernel that is launched."""
    if plain or dtype == torch.float32:
        tokens = window * window
        dynamic = 2 * tokens * HEAD_DIM * 4
        return Kernel(f"plain_kernel{MANGLED[dtype]}E", -(-tokens // 32) * 32, dynamic)
    side = 4 if window <= 4 else 8 if window <= 8 else 12
    threads = 96 if side == 12 else 2 * side * side
    return Kernel(f"tensor_core_kernel{MANGLED[dtype]}Li{side}E", threads, 0)


def window_attention(
    qkv: Tensor,  # [B, H, W, 3C]
    qkv_bias: Tensor,  # [3C]
    position_bias: Tensor,  # [(2w-1)², heads]
    window: int,
    shift: int,
    *,
    architecture: int,
    plain: bool = False,
    **options: Any,
) -> Tensor:
    """As the op of this name, with biases in the map's dtype; ``plain``: without tensor cores.
    Options are those of :meth:`tests.ptx.machine.Program.launch`."""
    B, H, W, C3 = qkv.shape
    out = qkv.new_empty(B, H, W, C3 // 3)
    memory = GlobalMemory()
    inputs = {"qkv": qkv, "qkv_bias": qkv_bias, "position_bias": position_bias}
    pointers = [memory.add(name, raw(v), read_only=True) for name, v in inputs.items()]
    pointers.append(memory.add("out", raw(out), initialised=False))
    shape = B, H, W, position_bias.shape[1]
    launch(memory, pointers, shape, window, shift, qkv.dtype, architecture, plain, **options)
    written = memory.buffers[-1].initialised
    assert written.all(), f"{(~written).sum()} bytes of out were not written"
    return out


def launch(
    memory: GlobalMemory,
    pointers: Sequence[int],
    shape: tuple[int, int, int, int],
    window: int,
    shift: int,
    dtype: torch.dtype,
    architecture: int,
    plain: bool,
    **options: Any,
) -> None:
    """Of a map [B, H, W] of ``heads``: the last number of ``shape``."""
    B, H, W, heads = shape
    # WindowAttentionParams of csrc/params.h, then two WindowAxis of csrc/window_index.h.
    params = struct.pack(
        "<4Qi4x7q", *pointers, NUMBERS[dtype], B, H, W, heads, HEAD_DIM, window, shift
    )
    windows = -(-H // window), -(-W // window)
    axes = (
        struct.pack("<5q", size, window, shift, count, count * window)
        for size, count in zip((H, W), windows, strict=True)
    )
    kernel = kernel_of(dtype, window, plain)
    (entry,) = (entry for name, entry in entries(architecture).items() if kernel.name in name)
    blocks = B * windows[0] * windows[1] * heads
    program = Program(entry, kernel.dynamic)
    program.launch(memory, (blocks,), kernel.threads, [params, *axes], **options)


def raw(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, not a copy."""
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
