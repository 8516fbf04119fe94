"""Faults planted into the compiled Triton kernels are found: by a check, or by what comes out."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are not executed")

from tests.kernels import test_adapters, test_tap_gradient
from tests.ptx.compiler import load
from tests.ptx.device import Device
from tests.ptx.memory import Collision, OutOfBounds, Race, WriteToInput


class Planting:
    """A compiler whose code is changed: ``find`` where it occurs for the ``nth`` time, to
    ``replacement``; of one kernel."""

    def __init__(self, compiler, kernel, find, replacement, nth=0):
        self.compiler, self.kernel = compiler, kernel
        self.find, self.replacement, self.nth = find, replacement, nth

    def compile(self, module, kernel, architecture, **arguments):
        compiled = self.compiler.compile(module, kernel, architecture, **arguments)
        if kernel != self.kernel:
            return compiled
        match = list(re.finditer(self.find, compiled.ptx))[self.nth]
        changed = match.expand(self.replacement)
        ptx = compiled.ptx[: match.start()] + changed + compiled.ptx[match.end() :]
        return load(ptx, compiled.shared, compiled.threads, compiled.parameters)


def occurrences(compiler, kernel, find, check):
    """How often ``find`` occurs in the kernel that ``check`` runs."""

    class Counting(Planting):
        count = 0

        def compile(self, module, kernel, architecture, **arguments):
            compiled = self.compiler.compile(module, kernel, architecture, **arguments)
            if kernel == self.kernel:
                Counting.count = len(re.findall(self.find, compiled.ptx))
            return compiled

    with Device(Counting(compiler, kernel, find, ""), 80):
        check()
    return Counting.count


def run_adapters():
    """Of several tiles of m and of the tokens, so that loops go round."""
    torch.manual_seed(0)
    test_adapters.check((1, 9, 9), 1, 5, 80, torch.bfloat16, 0, "none", again=0)


def run_tap_gradient():
    torch.manual_seed(0)
    test_tap_gradient.check(1, 150, 37, 5, torch.bfloat16, "int8")


RUNS = {
    "adapters_kernel": run_adapters,
    "adapters_backward_kernel": run_adapters,
    "tap_gradient_kernel": run_tap_gradient,
}
BARRIER = r"bar\.sync\s+0;"


@pytest.mark.parametrize("kernel", ["adapters_backward_kernel", "tap_gradient_kernel"])
def test_a_removed_barrier(compiler, kernel):
    """Most are found. One that is not guards nothing by itself: another one follows before the
    memory is used again, or only asynchronous copies to other places lie between."""
    found, count = 0, occurrences(compiler, kernel, BARRIER, RUNS[kernel])
    for nth in range(count):
        try:
            with Device(Planting(compiler, kernel, BARRIER, "", nth), 80):
                RUNS[kernel]()
        except Race:
            found += 1
    assert count >= 2 and found > count / 2, f"{found} of {count}"


PLANTED = {
    "swapped factors": (
        "adapters_backward_kernel",
        r"(mma\.sync\S+\s*\{[^}]*\}, \{ ?)(%r\d+), (%r\d+)",
        r"\1\3, \2",
        AssertionError,
    ),
    "swapped halves of a product": (
        "adapters_backward_kernel",
        r"(mma\.sync\S+\s*\{[^}]*\}, \{[^}]*\}, \{ ?)(%r\d+), (%r\d+)",
        r"\1\3, \2",
        AssertionError,
    ),
    "a sum that begins elsewhere": (
        "tap_gradient_kernel",
        r"(mov\.b32\s+%r\d+, )0f00000000;",
        r"\g<1>0f3F800000;",
        AssertionError,
    ),
    "another sign": (
        "adapters_kernel",
        r"0fBF800000",
        "0f3F800000",
        AssertionError,
    ),
    "an index off by one": (
        "adapters_kernel",
        r"(st\.global\.b16 \[ %rd\d+ \+ )0",
        r"\g<1>-2",
        (AssertionError, OutOfBounds),
    ),
    "a mask that lets everything pass": (
        "adapters_backward_kernel",
        r"@%p\d+ (st\.global)",
        r"\1",
        (Collision, OutOfBounds),
    ),
    "a write to an input": (
        "tap_gradient_kernel",
        r"(ld\.param\.b64\s+%rd\d+, \[tap_gradient_kernel_param_)3\]",
        r"\g<1>2]",
        WriteToInput,
    ),
    "a wait for fewer copies": (
        "tap_gradient_kernel",
        r"cp\.async\.wait_group\s+\d",
        "cp.async.wait_group 9",
        Race,
    ),
}


@pytest.mark.parametrize("kernel, find, replacement, fault", PLANTED.values(), ids=PLANTED)
def test_a_planted_fault(compiler, kernel, find, replacement, fault):
    with pytest.raises(fault), Device(Planting(compiler, kernel, find, replacement), 80):
        RUNS[kernel]()


def test_an_output_that_is_read(device):
    """What PyTorch allocated and nobody wrote is uninitialised to a kernel."""
    from e3va.kernels import tap_gradient
    from tests.ptx.memory import Uninitialised

    codes, dt = torch.zeros(1, 5, 24, dtype=torch.int8), torch.randn(1, 5, 4)
    with device(80), pytest.raises(Uninitialised, match="scale"):
        tap_gradient.tap_gradient(codes, torch.empty(1, 5), "int8", dt, 24)
    with device(80):
        scale = torch.empty(1, 5)
        scale.fill_(1.0)
        tap_gradient.tap_gradient(codes, scale, "int8", dt, 24)
