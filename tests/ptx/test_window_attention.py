"""The CUDA kernels of window attention as nvcc compiles them, against the reference in float64."""

import itertools
import re

import pytest
import torch

from e3va.ops.backends import reference
from tests.oracles import TOLERANCE, relative_error
from tests.ptx import compiler
from tests.ptx.memory import APART, GlobalMemory, Misaligned, OutOfBounds, Race
from tests.ptx.parser import parse
from tests.ptx.window_attention import HEAD_DIM, launch, raw, window_attention

pytestmark = pytest.mark.skipif(
    compiler.nvcc() is None, reason="there is no nvcc: the CUDA kernels are not executed"
)
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16

MAPS = (
    (1, 1, 1, 1, 7, 3),  # one token
    (2, 5, 9, 2, 7, 3),
    (1, 10, 3, 1, 4, 0),
    (1, 13, 7, 1, 12, 6),
    (1, 2, 3, 1, 1, 0),
)
"""B, H, W, heads, window, shift."""
CHOSEN = (
    (75, HALF, False, MAPS[1]),
    (80, BFLOAT, False, MAPS[0]),
    (80, BFLOAT, False, MAPS[1]),
    (80, FLOAT, True, MAPS[2]),
    (86, BFLOAT, False, MAPS[2]),
    (89, HALF, False, MAPS[3]),
    (90, BFLOAT, True, MAPS[1]),
    (120, BFLOAT, False, MAPS[4]),
)


def cases():
    for case in itertools.product(ARCHITECTURES, (FLOAT, HALF, BFLOAT), (False, True), MAPS):
        architecture, dtype, plain, size = case
        if not plain and (dtype == FLOAT or (architecture, dtype) == (75, BFLOAT)):
            continue  # not on tensor cores
        name = f"sm_{architecture}-{str(dtype)[6:]}-{'plain-' * plain}{'x'.join(map(str, size))}"
        yield pytest.param(*case, marks=() if case in CHOSEN else pytest.mark.long, id=name)


def make_arguments(B, H, W, heads, window, dtype):
    C = heads * HEAD_DIM
    shapes = (B, H, W, 3 * C), (3 * C,), ((2 * window - 1) ** 2, heads)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


@pytest.mark.parametrize("architecture, dtype, plain, size", list(cases()))
def test_window_attention_runs(architecture, dtype, plain, size):
    *shape, window, shift = size
    arguments = make_arguments(*shape, window, dtype)
    out = window_attention(*arguments, window, shift, architecture=architecture, plain=plain)
    expected = reference.window_attention(*(v.double() for v in arguments), window, shift)
    assert relative_error(out, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "nth, find, replacement, fault",
    [
        (0, r"bar\.red\.or\.pred\s+(%p\d+), \S+, (%p\d+);", r"mov.pred \1, \2;", Race),
        (0, r"bar\.sync\s+0;", "", Race),
        (0, r"(mma\.sync\S+\s*\{[^}]*\}, \{ ?)(%r\d+), (%r\d+)", r"\1\3, \2", AssertionError),
        (0, r"(ldmatrix\S+)\.trans", r"\1", AssertionError),
        (0, r"(ld\.global\.nc\.v4\.\w+\s+\{[^}]*\}, \[%rd\d+)\]", r"\1+8]", Misaligned),
        (-1, r"(st\.global\.v4\.\w+\s+\[%rd\d+)\]", r"\1+4096]", OutOfBounds),
        (-1, r"@!?%p\d+ bra\s+\S+;(?=[^@]*st\.global)", "", OutOfBounds),
    ],
    ids=["first barrier", "second barrier", "factors", "rows for columns", "load", "store", "mask"],
)
def test_a_planted_fault(nth, find, replacement, fault, monkeypatch):
    """Is found by a check, or by what comes out."""
    entry = re.compile(r"^\.entry .*?^\}", re.M | re.S)

    def plant(kernel):
        match = list(re.finditer(find, kernel[0]))
        if not match:  # another one of the module
            return kernel[0]
        match = match[nth]
        return kernel[0][: match.start()] + match.expand(replacement) + kernel[0][match.end() :]

    ptx = entry.sub(plant, compiler.cuda("window_attention.cu", 80).decode())
    monkeypatch.setattr("tests.ptx.window_attention.entries", lambda architecture: parse(ptx))
    arguments = make_arguments(1, 5, 9, 1, 7, BFLOAT)
    with pytest.raises(fault):
        out = window_attention(*arguments, 7, 3, architecture=80)
        expected = reference.window_attention(*(v.double() for v in arguments), 7, 3)
        assert relative_error(out, expected) <= TOLERANCE[BFLOAT]


@pytest.mark.parametrize("plain", [False, True])
def test_far_out(plain):
    """The last image of a batch of more than 2³¹ elements: of its memory no more exists."""
    H, W, window, shift = 5, 9, 7, 3
    arguments = make_arguments(1, H, W, 1, window, BFLOAT)
    expected = window_attention(*arguments, window, shift, architecture=80, plain=plain)
    B = (1 << 31) // (H * W * HEAD_DIM) + 5
    out = torch.empty_like(expected)
    memory, starts = GlobalMemory(), []
    for i, tensor in enumerate((*arguments, out)):
        start = APART * (i + 1)
        images = B - 1 if tensor.dim() == 4 else 0  # before the last one
        memory.add(
            f"tensor {i}",
            raw(tensor),
            address=start + images * tensor.nbytes,
            initialised=tensor is not out,
            read_only=tensor is not out,
        )
        starts.append(start)
    windows = 2 * (B - 1), 2 * (B - 1) + 1
    launch(memory, starts, (B, H, W, 1), window, shift, BFLOAT, 80, plain, blocks=windows)
    assert torch.equal(out, expected)


def test_any_schedule():
    arguments = make_arguments(1, 5, 9, 1, 7, BFLOAT)
    ours, theirs = (
        window_attention(*arguments, 7, 3, architecture=80, seed=seed) for seed in (None, 1)
    )
    assert torch.equal(ours, theirs)
