"""Each opcode against a result that is known otherwise: by hand, by numpy or by float64."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.ptx.opcodes import TABLE
from tests.ptx.snippets import execute, hexadecimal

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


def test_every_opcode_is_tested():
    names = ("test_opcodes", "test_warps", "snippets")
    text = "".join(Path(__file__).with_name(f"{name}.py").read_text() for name in names)
    missing = [name for name in TABLE if not re.search(rf"(?<![\w.]){re.escape(name)}[.; ]", text)]
    assert not missing
