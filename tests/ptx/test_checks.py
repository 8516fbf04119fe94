"""Each check finds what it is for, and lets pass what is right."""

import numpy as np
import pytest

from tests.ptx.counters import Counts
from tests.ptx.machine import Program
from tests.ptx.memory import (
    Collision,
    Deadlock,
    Divergence,
    Fault,
    GlobalMemory,
    Misaligned,
    OutOfBounds,
    Race,
    Uninitialised,
    WriteToInput,
)
from tests.ptx.opcodes import NotModelled
from tests.ptx.parser import parse

THREADS = 64
ADDRESS = "mov.b32 %r2, tile; shl.b32 %r3, %r1, 2; add.s32 %r2, %r2, %r3;"
"""%r2: where the thread's own word of shared memory is."""


def run(body: str, blocks: int = 1, seed: int | None = None) -> np.ndarray:
    """%q1, %q2: the thread's own words of out and in; %q3, %q4: where these begin; %r1: the thread,
    %r9: the block."""
    text = f"""
    .visible .entry kernel(.param .u64 kernel_param_0, .param .u64 .ptr .align 1 kernel_param_1)
    .reqntid {THREADS}
    {{
    .reg .pred %p<9>; .reg .b32 %r<30>; .reg .b64 %q<9>;
    .shared .align 16 .b8 tile[1024];
    ld.param.u64 %q3, [kernel_param_0];
    ld.param.u64 %q4, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r9, %ctaid.x;
    mad.lo.s32 %r8, %r9, {THREADS}, %r1;
    mul.wide.u32 %q5, %r8, 4;
    add.s64 %q1, %q3, %q5;
    add.s64 %q2, %q4, %q5;
    {body}
    ret;
    }}"""
    out = np.zeros(THREADS * blocks, np.uint32)
    memory = GlobalMemory()
    addresses = [
        memory.add("out", out, initialised=False),
        memory.add("in", np.arange(THREADS * blocks, dtype=np.uint32), read_only=True),
    ]
    program = Program(parse(text)["kernel"])
    program.launch(memory, (blocks,), THREADS, addresses, seed=seed)
    return out


NEIGHBOUR = "xor.b32 %r4, %r2, 128;"
"""%r4: the word of the thread 32 further on or back, of another warp."""

RIGHT = {
    "copy": "ld.global.b32 %r5, [%q2]; st.global.b32 [%q1], %r5;",
    "exchange": ADDRESS
    + NEIGHBOUR
    + "st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r5, [%r4]; st.global.b32 [%q1], %r5;",
    "many readers": ADDRESS
    + "st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r5, [tile+4];"
    + "bar.sync 0; st.shared.b32 [%r2], %r5;",
    "one value of two warps": "st.shared.b32 [tile], 7; ld.shared.b32 %r5, [tile];",
    "threads that meet again": "and.b32 %r5, %r1, 1; setp.eq.s32 %p1, %r5, 0; @%p1 bra EVEN;"
    "add.s32 %r6, %r1, 1; bra.uni MET; EVEN: add.s32 %r6, %r1, 2; MET: bar.sync 0;"
    "shfl.sync.bfly.b32 %r7, %r6, 2, 31, -1;",
    "a loop of as many rounds as the lane says": "mov.b32 %r5, 0; and.b32 %r6, %r1, 31;"
    "AGAIN: setp.ge.s32 %p1, %r5, %r6; @%p1 bra DONE; add.s32 %r5, %r5, 1; bra.uni AGAIN;"
    "DONE: bar.sync 0; shfl.sync.idx.b32 %r7, %r5, 31, 31, -1; st.global.b32 [%q1], %r7;",
    "threads that have returned": "setp.lt.u32 %p1, %r1, 40; @%p1 ret; bar.sync 0;",
    "half a pair that nobody reads": "mov.b64 %q6, {%r1, %r7}; mov.b64 {%r5, _}, %q6;",
    "asynchronous copy": ADDRESS
    + "cp.async.ca.shared.global [%r2], [%q2], 4; cp.async.commit_group;"
    + "cp.async.wait_group 0; ld.shared.b32 %r5, [%r2]; st.global.b32 [%q1], %r5;",
}

WRONG = {
    "index off by one": (OutOfBounds, "ld.global.b32 %r5, [%q2+4];"),
    "before the start": (OutOfBounds, "ld.global.b32 %r5, [%q2+-4];"),
    "far away": (OutOfBounds, "st.global.b32 [%r8], %r1;".replace("%r8", "%q5")),
    "beyond shared memory": (OutOfBounds, ADDRESS + "st.shared.b32 [%r2+1000], %r1;"),
    "two bytes off": (Misaligned, "ld.global.b32 %r5, [%q2+2];"),
    "a vector of words": (Misaligned, "ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%q2];"),
    "shared, two bytes off": (Misaligned, ADDRESS + "st.shared.b32 [%r2+2], %r1;"),
    "read of an output": (Uninitialised, "ld.global.b32 %r5, [%q1];"),
    "read of shared memory": (Uninitialised, ADDRESS + "ld.shared.b32 %r5, [%r2];"),
    "read of a register": (
        Fault,
        "bra.uni OVER; mov.b32 %r6, 1; OVER: add.s32 %r5, %r6, 1;",
    ),
    "write to an input": (WriteToInput, "st.global.b32 [%q2], %r1;"),
    "two blocks": (Collision, "st.global.b32 [%q3], 7;"),
    "two values at once": (Collision, "st.global.b32 [%q3], %r1;"),
    "no barrier before a read": (
        Race,
        ADDRESS + NEIGHBOUR + "st.shared.b32 [%r2], %r1; ld.shared.b32 %r5, [%r4];",
    ),
    "no barrier before a write": (
        Race,
        ADDRESS
        + NEIGHBOUR
        + "st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r5, [%r4];"
        + "st.shared.b32 [%r2], %r1;",
    ),
    "no barrier between many readers and a write": (
        Race,
        ADDRESS
        + "st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r5, [tile+4];"
        + "st.shared.b32 [%r2], %r5;",
    ),
    "values of two warps": (Race, "shr.u32 %r5, %r1, 5; st.shared.b32 [tile], %r5;"),
    "read while a copy is under way": (
        Race,
        ADDRESS
        + "st.shared.b32 [%r2], 0; cp.async.ca.shared.global [%r2], [%q2], 4;"
        + "ld.shared.b32 %r5, [%r2];",
    ),
    "wait for all but the last": (
        Race,
        ADDRESS
        + "st.shared.b32 [%r2], 0; cp.async.ca.shared.global [%r2], [%q2], 4;"
        + "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r5, [%r2];",
    ),
    "wait for the first of two copies": (
        Race,
        ADDRESS
        + "cp.async.ca.shared.global [%r2], [%q2], 4; cp.async.commit_group;"
        + "cp.async.ca.shared.global [%r2+256], [%q2], 4; cp.async.commit_group;"
        + "cp.async.wait_group 1; ld.shared.b32 %r5, [%r2]; ld.shared.b32 %r5, [%r2+256];",
    ),
    "another warp's copy without a barrier": (
        Race,
        ADDRESS
        + NEIGHBOUR
        + "cp.async.ca.shared.global [%r2], [%q2], 4; cp.async.wait_all; ld.shared.b32 %r5, [%r4];",
    ),
    "copy to what another warp reads": (
        Race,
        ADDRESS
        + NEIGHBOUR
        + "st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r5, [%r4];"
        + "cp.async.ca.shared.global [%r2], [%q2], 4; cp.async.wait_all;",
    ),
    "a copy that nobody waits for": (
        Race,
        ADDRESS + "cp.async.ca.shared.global [%r2], [%q2], 4; cp.async.commit_group;",
    ),
    "half a warp shuffles": (
        Divergence,
        "and.b32 %r5, %r1, 1; setp.eq.s32 %p1, %r5, 0;@%p1 shfl.sync.bfly.b32 %r6, %r1, 2, 31, -1;",
    ),
    "half a warp at a barrier": (
        Divergence,
        "and.b32 %r5, %r1, 1; setp.eq.s32 %p1, %r5, 0; @%p1 bra END; bar.sync 0; END:"
        " mov.b32 %r6, 0;",
    ),
    "barriers in two branches": (
        Deadlock,
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra OTHER; bar.sync 0; bra.uni END; OTHER: bar.sync 0;"
        " add.s32 %r5, %r1, 1; END: mov.b32 %r6, 0;",
    ),
    "no end": (Deadlock, "AGAIN: bra.uni AGAIN;"),
    "an opcode that is not modelled": (NotModelled, "vote.sync.any.pred %p1, %p1, -1;"),
    "a modifier that is not modelled": (NotModelled, "add.sat.s32 %r5, %r1, 1;"),
    "a barrier of some threads": (NotModelled, "bar.sync 1, 32;"),
}


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("body", RIGHT.values(), ids=RIGHT)
def test_right(body, seed):
    run(body, 2, seed)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("fault, body", WRONG.values(), ids=WRONG)
def test_wrong(fault, body, seed, monkeypatch):
    """Whatever the order in which warps run."""
    monkeypatch.setattr("tests.ptx.machine.STEPS", 1000)
    with pytest.raises(fault):
        run(body, 1 + (fault is Collision), seed)


def test_grids_that_no_gpu_launches():
    program = Program(parse(".entry kernel() { ret; }")["kernel"])
    program.launch(GlobalMemory(), (1 << 20, 1, 1), 32, [], blocks=[(1 << 20) - 1])
    with pytest.raises(Fault, match="no GPU"):
        program.launch(GlobalMemory(), (1, 1 << 20, 1), 32, [], blocks=[0])


def test_results():
    assert (run(RIGHT["copy"], 2) == np.arange(2 * THREADS)).all()
    thread = np.arange(THREADS)
    assert (run(RIGHT["exchange"]) == (thread ^ 32)).all()


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("writers", [0, 1, 32, THREADS])
def test_a_thread_that_passes_over_an_instruction_has_no_number(writers, seed):
    """In the register that it writes, whichever warp comes first."""
    body = f"setp.lt.u32 %p1, %r1, {writers}; @%p1 mov.b32 %r5, 7; st.global.b32 [%q1], %r5;"
    expected = np.where(np.arange(THREADS) < writers, 7, 0xFFFFFFFF)
    assert (run(body, seed=seed) == expected).all()


def test_buffers_do_not_overlap():
    memory = GlobalMemory()
    start = memory.add("a", np.zeros(4, np.uint32))
    memory.add("b", np.zeros(4, np.uint32), address=start + 16)
    with pytest.raises(ValueError, match="c overlaps a"):
        memory.add("c", np.zeros(4, np.uint32), address=start + 12)


def test_counts():
    """Of loads of 4 bytes, 128 apart, and of a store of a row; two warps."""
    text = """
    .entry kernel(.param .u64 out, .param .u64 in) .reqntid 64 {
    .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %q<9>; .shared .align 16 .b8 tile[8192];
    ld.param.u64 %q1, [out];
    ld.param.u64 %q2, [in];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %q3, %r1, 128;
    add.s64 %q4, %q2, %q3;
    ld.global.f32 %f1, [%q4];
    ex2.approx.f32 %f2, %f1;
    mul.lo.s32 %r2, %r1, 8;
    st.shared.f32 [%r2], %f2;
    mul.wide.u32 %q3, %r1, 4;
    add.s64 %q4, %q1, %q3;
    st.global.f32 [%q4], %f2;
    ret;
    }"""
    memory, counts = GlobalMemory(), Counts()
    out, source = np.zeros(64, np.float32), np.zeros(64 * 32, np.float32)
    addresses = [memory.add("out", out), memory.add("in", source)]
    Program(parse(text)["kernel"]).launch(memory, (1,), 64, addresses, counts=counts)
    assert counts.loads["in"] == (2, 256, 64) and counts.stores["out"] == (2, 256, 8)
    assert counts.sectors == 72 and counts.sectors_over_floor == 72 * 32 / 512
    assert counts.distinct_sectors == 72
    assert counts.wavefronts == 4  # every other bank, twice
    assert counts.instructions == 2 * 12
    assert counts.classes() == {
        "memory": 10, "special function": 2, "arithmetic": 10, "control": 2
    }  # fmt: skip
    both = counts + counts
    assert both.sectors == 144 and both.distinct_sectors == 72
    assert both.instructions == 48 and both.loads["in"] == (4, 512, 128)
