"""Each opcode against a result that is known otherwise: by hand, by numpy or by float64."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.ptx.machine import Program
from tests.ptx.memory import GlobalMemory
from tests.ptx.opcodes import TABLE
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


def hexadecimal(value: object) -> str:
    if isinstance(value, np.floating):
        bits = value.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[value.itemsize])
        return f"0x{int(bits):x}"
    return str(int(value))


REGISTER = {1: "p", 16: "h", 32: "r", 64: "d"}


def evaluate(instruction: str, *operands: object, result: str) -> object:
    """What ``instruction`` makes of the operands, each of which a register of its width gets
    first. ``result``: a numpy type."""
    body, names = "", []
    for i, operand in enumerate(operands):
        if isinstance(operand, (bool, np.bool_)):
            name, width = f"%p{i + 2}", "pred"
        elif isinstance(operand, str):  # as it stands
            names.append(operand)
            continue
        else:
            bits = 8 * operand.itemsize
            name, width = f"%{REGISTER[bits]}{i + 10}", f"b{bits}"
        body += f"mov.{width} {name}, {hexadecimal(operand)};\n"
        names.append(name)
    dtype = np.dtype(result)
    if dtype.kind == "b":
        body += f"{instruction} %p1, {', '.join(names)}; selp.b32 %r9, 1, 0, %p1;"
        body += "st.global.b32 [%q1], %r9;"
        return bool(execute(body, np.zeros(512, np.uint8), np.zeros(1, np.uint32))[0])
    bits = 8 * dtype.itemsize
    target = f"%{REGISTER[bits]}9"
    body += f"{instruction} {target}, {', '.join(names)};\nst.global.b{bits} [%q1], {target};"
    return execute(body, np.zeros(512, np.uint8), np.zeros(1, dtype))[0]


f32, f16, u32, s32, u64, s64 = (
    np.float32, np.float16, np.uint32, np.int32, np.uint64, np.int64
)  # fmt: skip
EVERY = u32(0xFFFFFFFF)


def bf16(value: float) -> np.uint16:
    """Of a number that bfloat16 holds."""
    return np.uint16(int(np.float32(value).view(u32)) >> 16)


def pair(low: float, high: float) -> np.uint64:
    return np.array([low, high], f32).view(u64)[0]


def halves(low: float, high: float) -> np.uint32:
    return np.array([low, high], f16).view(u32)[0]


def brains(low: float, high: float) -> np.uint32:
    return u32(int(bf16(low)) | int(bf16(high)) << 16)


TINY = f32(2.0**-140)
NAN, INFINITY = f32(np.nan), f32(np.inf)
ONE_ULP = f32(2.0**-23)
ODD = f32(1 + 2.0**-12)

KNOWN = [
    ("mov.b32", [u32(7)], u32(7)),
    ("mov.pred", [True], True),
    ("cvta.to.global.u64", [u64(7)], u64(7)),
    # integers
    ("add.s32", [s32(-5), s32(3)], s32(-2)),
    ("add.u32", [EVERY, u32(2)], u32(1)),
    ("add.s16x2", [u32(0xFFFF0005), u32(0x00020003)], u32(0x00010008)),
    ("sub.s64", [s64(3), s64(1 << 40)], s64(3 - (1 << 40))),
    ("mul.lo.s32", [s32(1 << 30), s32(6)], s32(-(1 << 31))),
    ("mul.hi.u32", [EVERY, u32(16)], u32(15)),
    ("mul.wide.s32", [s32(-2), s32(1 << 30)], s64(-(1 << 31))),
    ("mul.wide.u32", [EVERY, u32(2)], u64(0x1FFFFFFFE)),
    ("mad.lo.s32", [s32(3), s32(-4), s32(5)], s32(-7)),
    ("mad.wide.s32", [s32(-3), s32(4), s64(1 << 40)], s64((1 << 40) - 12)),
    ("div.s32", [s32(-7), s32(2)], s32(-3)),
    ("div.u32", [EVERY, u32(2)], u32(0x7FFFFFFF)),
    ("rem.s32", [s32(-7), s32(2)], s32(-1)),
    ("rem.u32", [EVERY, u32(10)], u32(5)),
    ("min.s32", [s32(-7), s32(2)], s32(-7)),
    ("max.u32", [EVERY, u32(2)], EVERY),
    ("max.relu.s32", [s32(-7), s32(-2)], s32(0)),
    ("abs.s32", [s32(-7)], s32(7)),
    ("neg.s32", [s32(-7)], s32(7)),
    # bits
    ("and.b32", [u32(12), u32(10)], u32(8)),
    ("or.b64", [u64(12), u64(10)], u64(14)),
    ("xor.b32", [u32(12), u32(10)], u32(6)),
    ("not.b32", [u32(1)], u32(0xFFFFFFFE)),
    ("and.pred", [True, False], False),
    ("not.pred", [False], True),
    ("shl.b32", [u32(3), u32(31)], u32(1 << 31)),
    ("shl.b32", [u32(3), u32(32)], u32(0)),
    ("shr.u32", [EVERY, u32(40)], u32(0)),
    ("shr.s32", [s32(-8), u32(1)], s32(-4)),
    ("shr.s32", [s32(-8), u32(99)], s32(-1)),
    ("bfe.u32", [u32(0xABCD), u32(4), u32(8)], u32(0xBC)),
    ("bfe.s32", [s32(0x80), u32(4), u32(4)], s32(-8)),
    ("bfe.u32", [EVERY, u32(0), u32(0)], u32(0)),
    ("prmt.b32", [u32(0x33221100), u32(0x77665544), u32(0x7531)], u32(0x77553311)),
    ("prmt.b32", [u32(0x80), u32(0), u32(0x0008)], u32(0x808080FF)),  # its sign, repeated
    ("lop3.b32", [u32(12), u32(10), u32(6), "0x96"], u32(12 ^ 10 ^ 6)),
    ("lop3.b32", [u32(12), u32(10), u32(6), "0xE8"], u32(14)),  # the majority
    # floats
    ("add.f32", [f32(1), f32(2.0**-24)], f32(1)),  # a tie: to even
    ("add.f32", [f32(1) + ONE_ULP, f32(2.0**-24)], f32(1) + 2 * ONE_ULP),
    ("add.rn.ftz.f32", [TINY, f32(0)], f32(0)),
    ("add.f16", [f16(2048), f16(1)], f16(2048)),
    ("add.bf16", [bf16(256), bf16(1)], bf16(256)),
    ("add.f32x2", [pair(1, 2), pair(3, 5)], pair(4, 7)),
    ("add.f16x2", [halves(1, 2), halves(3, 5)], halves(4, 7)),
    ("add.rn.f32.f16", [f16(1.5), f32(2.0**-20)], f32(1.5 + 2.0**-20)),
    ("sub.rn.f32.bf16", [bf16(1.5), f32(2.0**-20)], f32(1.5 - 2.0**-20)),
    ("sub.bf16x2", [brains(1, 2), brains(3, 5)], brains(-2, -3)),
    ("mul.f32", [f32(1) + ONE_ULP, f32(1) + ONE_ULP], f32(1) + 2 * ONE_ULP),
    ("mul.f32x2", [pair(2, -3), pair(3, 5)], pair(6, -15)),
    ("fma.rn.f32", [f32(1) + ONE_ULP, f32(1) + ONE_ULP, -f32(1) - 2 * ONE_ULP], f32(2.0**-46)),
    # More than half-way between two floats, but not in float64: either sign.
    ("fma.rn.f32", [ODD, ODD, f32(2.0**-70)], f32(1 + 2.0**-11 + 2.0**-23)),
    ("fma.rn.f32", [-ODD, ODD, f32(-(2.0**-70))], f32(-1 - 2.0**-11 - 2.0**-23)),
    ("fma.rn.f32", [-ODD, ODD, f32(2.0**-70)], f32(-1 - 2.0**-11)),
    ("fma.rn.f32x2", [pair(2, -3), pair(3, 5), pair(1, 1)], pair(7, -14)),
    ("fma.rm.f32", [f32(1), f32(1), -f32(2.0**-80)], np.nextafter(f32(1), f32(0))),
    ("fma.rn.bf16", [bf16(1), bf16(256), bf16(1)], bf16(256)),
    ("fma.rn.bf16", [bf16(1 + 2.0**-7), bf16(1 + 2.0**-7), bf16(2.0**-60)], bf16(1 + 2.0**-6)),
    ("fma.rn.f16", [f16(1), f16(2048), f16(1)], f16(2048)),
    ("fma.rn.bf16x2", [brains(2, -3), brains(3, 5), brains(1, 1)], brains(7, -14)),
    ("fma.rn.f32.f16", [f16(3), f16(5), f32(2.0**-10)], f32(15 + 2.0**-10)),
    ("div.rn.f32", [f32(1), f32(3)], f32(1) / f32(3)),
    ("div.full.f32", [f32(1), f32(0)], INFINITY),
    ("rcp.rn.f32", [f32(3)], f32(1 / 3)),
    ("sqrt.rn.f32", [f32(2)], f32(2**0.5)),
    ("rsqrt.approx.ftz.f32", [f32(4)], f32(0.5)),
    ("ex2.approx.f32", [f32(-3)], f32(0.125)),
    ("ex2.approx.ftz.f32", [f32(-130)], f32(0)),
    ("ex2.approx.ftz.f32", [f32(-np.inf)], f32(0)),
    ("lg2.approx.f32", [f32(8)], f32(3)),
    ("max.f32", [NAN, f32(2)], f32(2)),
    ("max.NaN.f32", [NAN, f32(2)], NAN),
    ("min.f32", [f32(3), f32(2)], f32(2)),
    ("abs.f32", [f32(-3)], f32(3)),
    ("abs.bf16x2", [brains(-2, 3)], brains(2, 3)),
    ("neg.f32", [f32(3)], f32(-3)),
    # conversions
    ("cvt.rn.bf16.f32", [f32(1 + 2.0**-8)], bf16(1)),  # a tie: to even
    ("cvt.rn.bf16.f32", [f32(1 + 3 * 2.0**-8)], bf16(1 + 2.0**-6)),
    ("cvt.rn.f16.f32", [f32(70000)], f16(np.inf)),
    ("cvt.f32.bf16", [bf16(-1.5)], f32(-1.5)),
    ("cvt.f32.f16", [f16(-1.5)], f32(-1.5)),
    ("cvt.rn.bf16x2.f32", [f32(2), f32(1)], brains(1, 2)),  # the first in the high half
    ("cvt.rn.f16x2.f32", [f32(2), f32(1)], halves(1, 2)),
    ("cvt.sat.f32.f32", [f32(-2)], f32(0)),
    ("cvt.rzi.s32.f32", [f32(-1.5)], s32(-1)),
    ("cvt.rni.s32.f32", [f32(2.5)], s32(2)),
    ("cvt.rmi.s32.f32", [f32(-1.5)], s32(-2)),
    ("cvt.rpi.s32.f32", [f32(1.5)], s32(2)),
    ("cvt.rzi.s32.f32", [f32(1e10)], s32((1 << 31) - 1)),
    ("cvt.rzi.u32.f32", [f32(-3)], u32(0)),
    ("cvt.rn.f32.s32", [s32(-(1 << 24) - 1)], f32(-(1 << 24))),
    ("cvt.rn.f32.u32", [EVERY], f32(2.0**32)),
    ("cvt.s64.s32", [s32(-2)], s64(-2)),
    ("cvt.u64.u32", [EVERY], u64(0xFFFFFFFF)),
    ("cvt.u32.u64", [u64(1 << 32 | 5)], u32(5)),
    # comparison and choice
    ("setp.lt.s32", [s32(-1), s32(0)], True),
    ("setp.lt.u32", [EVERY, u32(0)], False),
    ("setp.eq.f32", [NAN, NAN], False),
    ("setp.ne.f32", [NAN, f32(1)], False),
    ("setp.neu.f32", [NAN, f32(1)], True),
    ("setp.gtu.f32", [NAN, f32(1)], True),
    ("setp.nan.f32", [NAN, f32(1)], True),
    ("setp.num.f32", [NAN, f32(1)], False),
    ("setp.gt.bf16", [bf16(2), bf16(-3)], True),
    ("selp.b32", [u32(5), u32(6), False], u32(6)),
]


@pytest.mark.parametrize("instruction, operands, expected", KNOWN, ids=lambda v: str(v)[:40])
def test_known_result(instruction, operands, expected):
    result = evaluate(instruction, *operands, result=np.asarray(expected).dtype)
    assert np.array_equal(result, expected, equal_nan=np.asarray(expected).dtype.kind == "f")


# What threads do together


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


LANE = np.arange(WARP, dtype=np.uint32)


@pytest.mark.parametrize(
    "mode, by, clamp, expected",
    [
        ("bfly", 5, 31, LANE ^ 5),
        ("idx", 9, 31, np.full(WARP, 9)),
        ("up", 3, 0, np.where(LANE < 3, LANE, LANE - 3)),
        ("down", 3, 31, np.where(LANE + 3 > 31, LANE, LANE + 3)),
        ("bfly", 1, 0x1C1F, LANE ^ 1),  # in segments of four
        ("idx", 1, 0x1C1F, LANE // 4 * 4 + 1),
    ],
)
def test_shuffle(mode, by, clamp, expected):
    body = f"shfl.sync.{mode}.b32 %r20|%p1, %r10, {by}, {clamp}, -1; mov.b32 %r21, 0;"
    body += "@%p1 mov.b32 %r21, 1;"
    found, inside = lanes(body, LANE * 7, words=2).T
    assert (found == expected * 7).all()
    if mode in ("up", "down"):
        assert (inside == (expected != LANE)).all()


def test_reduction_and_election():
    body = "redux.sync.add.s32 %r20, %r10, -1; redux.sync.max.u32 %r21, %r10, -1;"
    body += "elect.sync %r22|%p1, -1; selp.b32 %r23, 1, 0, %p1; bar.warp.sync -1;"
    total, largest, _, elected = lanes(body, LANE * 7, words=4).T
    assert (total == 7 * 31 * 16).all() and (largest == 7 * 31).all()
    assert elected[0] == 1 and elected.sum() == 1


def test_vote_at_a_barrier():
    body = "setp.eq.u32 %p1, %r1, 70; bar.red.or.pred %p2, 0, %p1; bar.red.and.pred %p3, 0, %p1;"
    body += "selp.b32 %r20, 1, 0, %p2; selp.b32 %r21, 1, 0, %p3;"
    any_, all_ = lanes(body, np.zeros((128, 1), np.uint32), words=2, threads=128).T
    assert any_.all() and not all_.any()


def test_packing():
    body = "mov.b64 %d1, {%r10, %r11}; shr.u64 %d1, %d1, 16; mov.b64 {%r20, _}, %d1;"
    body += "mov.b32 {%h1, %h2}, %r10; mov.b32 %r21, {%h2, %h1};"
    source = np.array([[0x44332211, 0x88776655]] * WARP, np.uint32)
    assert (lanes(body, source, words=2) == [0x66554433, 0x22114433]).all()


def test_shared_memory_and_predicates():
    """A thread reads what its neighbour of another warp wrote; the odd ones do not."""
    body = """
    mov.b32 %r2, tile;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
    st.shared.b32 [%r4], %r10;
    bar.sync 0;
    xor.b32 %r5, %r4, 128;
    and.b32 %r6, %r1, 1;
    setp.eq.s32 %p1, %r6, 1;
    mov.b32 %r20, 5;
    @%p1 bra DONE;
    ld.shared::cta.b32 %r20, [%r5];
    DONE:
    """
    thread = np.arange(64, dtype=np.uint32)
    found = lanes(body, thread * 3, threads=64, shared=256)[:, 0]
    assert (found == np.where(thread % 2, 5, (thread ^ 32) * 3)).all()


def test_narrow_loads_and_stores():
    body = """
    mov.b32 %r2, tile; shl.b32 %r3, %r1, 2; add.s32 %r2, %r2, %r3;
    st.shared::cta.b16 [%r2], %h1; st.shared.u8 [%r2+2], %r10;
    ld.shared.s8 %r20, [%r2+2]; ld.shared.u8 %r21, [%r2+2];
    """
    found = lanes("mov.b16 %h1, 7;" + body, np.full(WARP, 0xFE, np.uint32), words=2, shared=128)
    assert (found == [0xFFFFFFFE, 0xFE]).all()


def test_loop():
    body = """
    mov.b32 %r20, 0; mov.b32 %r5, 0;
    AGAIN: add.s32 %r20, %r20, %r5; add.s32 %r5, %r5, 1;
    setp.le.s32 %p1, %r5, %r1;
    @%p1 bra.uni AGAIN;
    """
    assert (lanes(body, LANE)[:, 0] == LANE * (LANE + 1) // 2).all()


def test_asynchronous_copy():
    """Of 16 bytes; to odd threads zeros are copied."""
    body = """
    mov.b32 %r2, tile; shl.b32 %r3, %r1, 4; add.s32 %r2, %r2, %r3;
    and.b32 %r4, %r1, 1; setp.eq.s32 %p1, %r4, 1; selp.b32 %r5, 0, 16, %p1;
    cp.async.cg.shared.global [%r2], [%q2], 16, %r5;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r20, [%r2+4];
    cp.async.ca.shared.global [%r2], [%q2+4], 4;
    cp.async.wait_all;
    ld.shared.b32 %r21, [%r2];
    """
    source = np.stack([LANE, LANE + 100], 1)
    first, second = lanes(body, source, words=2, shared=512).T
    assert (first == np.where(LANE % 2, 0, LANE + 100)).all() and (second == LANE + 100).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_through_shared_memory(trans):
    """stmatrix, read plainly; then ldmatrix gives back what each lane had."""
    body = f"""
    mov.b32 %r2, tile; shl.b32 %r3, %r1, 4; add.s32 %r2, %r2, %r3;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2], {{%r10, %r11, %r12, %r13}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r2];
    ld.shared.v4.b32 {{%r24, %r25, %r26, %r27}}, [%r2];
    """
    source = np.arange(WARP * 8, dtype=np.uint16).reshape(WARP, 8)
    found = lanes(body, source, words=8, shared=512)
    assert (found[:, :4] == source.view(np.uint32)).all()
    rows = np.ascontiguousarray(found[:, 4:]).view(np.uint16)  # of matrix i: 8i …
    for i in range(4):
        for g in range(8):
            for t in range(4):
                pair = source[4 * g + t, 2 * i : 2 * i + 2]
                matrix = rows[8 * i : 8 * i + 8]
                place = matrix[2 * t : 2 * t + 2, g] if trans else matrix[g, 2 * t : 2 * t + 2]
                assert (place == pair).all()


def bits16(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind, depth", [("f16", 8), ("f16", 16), ("bf16", 16)])
def test_tensor_core(kind, depth):
    """Fragments lie as csrc/cuda/tensor_cores.cuh says. Small integers: nothing is rounded."""
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-8, 9, n) for n in ((16, depth), (depth, 8), (16, 8)))
    A, B = bits16(a, kind), bits16(b, kind)
    rows = [[] for _ in range(WARP)]
    for lane, row in enumerate(rows):
        g, t = divmod(lane, 4)
        for half in range(depth // 8):
            row += [*A[g, 8 * half + 2 * t :][:2], *A[g + 8, 8 * half + 2 * t :][:2]]
    left = ", ".join(f"%r{10 + i}" for i in range(depth // 4))
    # b and c come as constants, one lane after the other.
    body = "mov.b32 %r30, 0; mov.b32 %r31, 0;" + "".join(
        f"mov.f32 %f{i + 1}, 0f00000000;" for i in range(4)
    )
    for lane in range(WARP):
        g, t = divmod(lane, 4)
        body += f"setp.eq.u32 %p1, %r1, {lane};"
        for half in range(depth // 8):
            low, high = (int(v) for v in B[8 * half + 2 * t :, g][:2])
            body += f"@%p1 mov.b32 %r{30 + half}, {low | high << 16};"
        for i, (row, column) in enumerate([(g, 0), (g, 1), (g + 8, 0), (g + 8, 1)]):
            value = hexadecimal(np.float32(c[row, 2 * t + column]))
            body += f"@%p1 mov.b32 %f{i + 1}, {value};"
    right = ", ".join(f"%r{30 + i}" for i in range(depth // 8))
    body += f"""
    mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32
        {{%f5, %f6, %f7, %f8}}, {{{left}}}, {{{right}}}, {{%f1, %f2, %f3, %f4}};
    """ + "".join(f"mov.b32 %r{20 + i}, %f{5 + i};" for i in range(4))
    found = lanes(body, np.array(rows, np.uint16), words=4).view(np.float32)
    expected = a @ b + c
    for lane in range(WARP):
        g, t = divmod(lane, 4)
        for half in range(2):
            assert (found[lane, 2 * half :][:2] == expected[g + 8 * half, 2 * t :][:2]).all()


@pytest.mark.parametrize("swizzle", [0, 128])
def test_tensor_core_of_four_warps(swizzle):
    """wgmma of a [64, 16] and b [16, 8] in shared memory, by rows and by columns: of 16 values, as
    matrices of 8 × 8, or in rows of 128 bytes whose pieces of 16 are exchanged."""
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 9, n) for n in ((64, 16), (16, 8)))
    tile = np.zeros(16384, np.uint16)
    for matrix, start in ((a, 0), (b.T, 8192)):
        for row in range(len(matrix)):
            for k in range(16):
                if swizzle:
                    piece = k // 8 ^ row % 8
                    at = row * 128 + piece * 16 + k % 8 * 2
                else:
                    at = row // 8 * 256 + k // 8 * 128 + row % 8 * 16 + k % 8 * 2
                tile[(start + at) // 2] = bits16(matrix[row, k], "f16")
    leading, stride = (1, 1024 >> 4) if swizzle else (128 >> 4, 256 >> 4)
    description = leading << 16 | stride << 32 | (1 << 62 if swizzle else 0)
    copy = "".join(
        f"ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%q2+{at}];"
        f"st.shared.v4.b32 [%r6+{at}], {{%r2, %r3, %r4, %r5}};"
        for at in range(0, 16384, 2048)
    )
    body = f"""
    mov.b32 %r6, tile; shl.b32 %r7, %r1, 4; add.s32 %r6, %r6, %r7;
    {copy}
    bar.sync 0;
    fence.proxy.async.shared::cta;
    wgmma.fence.sync.aligned;
    mov.b64 %d1, {description}; add.s64 %d2, %d1, {8192 >> 4};
    mov.pred %p1, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {{%f1, %f2, %f3, %f4}}, %d1, %d2, %p1, 1, 1, 0, 0;
    mov.pred %p1, 1;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {{%f1, %f2, %f3, %f4}}, %d1, %d2, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    shl.b32 %r7, %r1, 4; cvt.u64.u32 %q4, %r7; add.s64 %q4, %q1, %q4;
    st.global.v4.f32 [%q4], {{%f1, %f2, %f3, %f4}};
    """
    out = np.zeros((128, 4), np.float32)
    found = execute(body, tile, out, threads=128, shared=16384)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        g, t = divmod(lane, 4)
        for half in range(2):
            row = 16 * warp + g + 8 * half
            assert (found[thread, 2 * half :][:2] == 2 * (a @ b)[row, 2 * t :][:2]).all()


def test_tensor_memory():
    """a [64, 16] in tensor memory, times b [16, 8] in shared memory, twice; four warps."""
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 9, n) for n in ((64, 16), (16, 8)))
    source = np.zeros((128, 16), np.uint8)
    # Row 16w + i of a: lanes i (first half of the columns) and 16 + i of warp w.
    pieces = bits16(a, "bf16").reshape(4, 16, 2, 8).transpose(0, 2, 1, 3)
    source[:] = np.ascontiguousarray(pieces).view(np.uint8).reshape(128, 16)
    tile = np.zeros((2, 8, 8), np.uint16)  # of b: k // 8, column, k % 8
    for k in range(16):
        tile[k // 8, :, k % 8] = bits16(b[k], "bf16")
    fill = "".join(
        f"mov.b32 %r2, {int(word)}; st.shared.b32 [tile+{64 + 4 * i}], %r2;"
        for i, word in enumerate(tile.view(np.uint32).ravel())
    )
    description = (
        1 << 46 | (128 >> 4) << 16 | (256 >> 4) << 32
    )  # matrices of 8 × 8, 128 bytes apart
    formats = 1 << 4 | 1 << 7 | 1 << 10 | (8 >> 3) << 17 | (64 >> 4) << 24
    body = f"""
    setp.lt.u32 %p1, %r1, 32;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [tile], 32;
    @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    setp.eq.u32 %p2, %r1, 0;
    @%p2 mbarrier.init.shared::cta.b64 [tile+8], 1;
    @%p2 bra FILL;
    bra.uni FILLED;
    FILL: {fill}
    FILLED: bar.sync 0;
    ld.shared.b32 %r3, [tile];
    shr.u32 %r4, %r1, 5; shl.b32 %r4, %r4, 21; add.s32 %r4, %r4, %r3;
    tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r4+16], 4, {{%r10, %r11, %r12, %r13}};
    tcgen05.wait::st.sync.aligned;
    mov.b32 %r5, tile; add.s32 %r5, %r5, 64; shr.u32 %r5, %r5, 4;
    cvt.u64.u32 %d1, %r5; or.b64 %d1, %d1, {description};
    add.s32 %r6, %r3, 16;
    mov.pred %p3, 0;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p2 tcgen05.mma.cta_group::1.kind::f16 [%r3], [%r6], %d1, {formats}, %p3;
    mov.pred %p3, 1;
    @%p2 tcgen05.mma.cta_group::1.kind::f16 [%r3], [%r6], %d1, {formats}, %p3;
    @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [tile+8];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p4, [tile+8], 0;
    @!%p4 bra.uni WAIT;
    tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {{%r20, %r21, %r22, %r23}}, [%r4], 4;
    tcgen05.wait::ld.sync.aligned;
    bar.sync 0;
    @%p2 mbarrier.inval.shared::cta.b64 [tile+8];
    @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32;
    """
    found = lanes(body, source, words=4, threads=128, shared=1024).view(np.float32)
    expected = (2 * (a @ b)).reshape(4, 16, 2, 4).transpose(0, 2, 1, 3).reshape(128, 4)
    assert (found == expected).all()


def test_every_opcode_is_tested():
    text = Path(__file__).read_text()
    missing = [name for name in TABLE if not re.search(rf"(?<![\w.]){re.escape(name)}[.; ]", text)]
    assert not missing
