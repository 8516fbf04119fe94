"""Few lines of PTX as a kernel, executed."""

import numpy as np

from tests.ptx.machine import Program
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import parse

WARP = 32


def kernel(body: str, shared: int = 0) -> Program:
    """Registers %p, %h, %r, %f, %d, %q of 1, 16, 32, 32, 64 and 64 bits; %q1: where out is, %q2:
    where the thread's 16 bytes of in are, %r1: the thread."""
    text = f"""
    .entry kernel(.param .u64 out, .param .u64 in) .reqntid 128 {{
    .reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<90>; .reg .f32 %f<90>; .reg .b64 %d<90>;
    .reg .b64 %q<20>;
    .shared .align 128 .b8 tile[{max(16, shared)}];
    ld.param.u64 %q1, [out];
    ld.param.u64 %q2, [in];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %q3, %r1, 16;
    add.s64 %q2, %q2, %q3;
    {body}
    ret;
    }}"""
    return Program(parse(text)["kernel"])


def execute(body: str, source: np.ndarray, out: np.ndarray, threads: int = WARP, **options):
    """``out`` as the kernel leaves it."""
    memory = GlobalMemory()
    addresses = [
        memory.add("out", out, initialised=False),
        memory.add("in", np.ascontiguousarray(source), read_only=True),
    ]
    kernel(body, **options).launch(memory, (1,), threads, addresses)
    return out


def lanes(body: str, source: np.ndarray, words: int = 1, threads: int = WARP, **options):
    """[threads, words] of 32 bits: the first 16 bytes of each thread's row of ``source`` are in
    %r10 … %r13, and the kernel leaves its result in %r20, …"""
    values = np.zeros((threads, 16), np.uint8)
    rows = source.reshape(threads, -1).view(np.uint8)
    values[:, : rows.shape[1]] = rows
    store = f"mad.wide.u32 %q4, %r1, {4 * words}, %q1;" + "".join(
        f"st.global.b32 [%q4+{4 * i}], %r{20 + i};" for i in range(words)
    )
    body = "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%q2];" + body + store
    return execute(body, values, np.zeros((threads, words), np.uint32), threads, **options)


def hexadecimal(value: object) -> str:
    if isinstance(value, np.floating):
        bits = value.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[value.itemsize])
        return f"0x{int(bits):x}"
    return str(int(value))
