"""The Triton kernels as they are compiled for GPUs, against the oracles that they are tested with
under Triton's interpreter. Every check of ``tests/ptx`` is in force."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are not executed")

from e3va.config import TAPPED
from e3va.ops.taps import LARGEST, TAPS
from tests.kernels import test_adapters, test_sublayer_epilogue, test_tap_gradient

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT, HALF, BFLOAT = DTYPES


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    for module in (test_adapters, test_sublayer_epilogue, test_tap_gradient):
        monkeypatch.setattr(module, "DEVICE", "cpu")


def cases(chosen, *axes):
    """The chosen cases, and all others of sm × dtype × axes for those who have the time."""
    for case in itertools.product(ARCHITECTURES, DTYPES, *axes):
        if case[:2] == (75, BFLOAT):
            continue  # it has none
        marks = () if case in chosen else pytest.mark.long
        name = "-".join(str(value).removeprefix("torch.") for value in case)
        yield pytest.param(*case, marks=marks, id=f"sm_{name}")


EPILOGUES = (
    (75, FLOAT, "output", "int8"),
    (75, HALF, "norm", "int4"),
    (80, FLOAT, "norm", "fp8"),
    (80, HALF, "norm", "full"),
    (80, BFLOAT, "output", "int4"),
    (86, BFLOAT, "norm", "int4"),
    (89, HALF, "output", "int8"),
    (90, BFLOAT, "output", "full"),
    (90, FLOAT, "output", "int4"),
    (100, BFLOAT, "norm", "int8"),
    (120, BFLOAT, "norm", "fp8"),
    (120, HALF, "output", "int4"),
)


@pytest.mark.parametrize("architecture, dtype, tap, taps", list(cases(EPILOGUES, TAPPED, TAPS)))
def test_sublayer_epilogue_runs(device, architecture, dtype, tap, taps):
    with device(architecture):
        arguments = test_sublayer_epilogue.make_arguments((1, 3, 7), 42, 5, dtype)
        test_sublayer_epilogue.check(arguments, tap, taps)


ADAPTERS = (
    (75, HALF, (3, "carry")),
    (80, BFLOAT, (3, "carry")),
    (80, FLOAT, (0, "zero")),
    (89, HALF, (0, "none")),
    (90, BFLOAT, (3, "none")),
    (120, BFLOAT, (0, "zero")),
)


@pytest.mark.parametrize("architecture, dtype, form", list(cases(ADAPTERS, test_adapters.FORMS)))
def test_adapters_run(device, architecture, dtype, form):
    """Forward and backward."""
    with device(architecture):
        test_adapters.check((2, 3, 7), 2, 5, 12, dtype, *form, again=0)


GRADIENTS = (
    (75, HALF, "int4"),
    (80, FLOAT, "int8"),
    (80, BFLOAT, "fp8"),
    (86, HALF, "fp8"),
    (90, BFLOAT, "int4"),
    (120, HALF, "int8"),
)


@pytest.mark.parametrize("architecture, dtype, taps", list(cases(GRADIENTS, LARGEST)))
def test_tap_gradient_runs(device, architecture, dtype, taps):
    with device(architecture):
        test_tap_gradient.check(2, 45, 37, 5, dtype, taps)
