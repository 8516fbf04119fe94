"""The Triton kernels as they are compiled for GPUs, against the oracles that they are tested with
under Triton's interpreter. Every check of ``tests/ptx`` is in force."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are not executed")

from e3va.ops.storage import LARGEST, STORAGES
from e3va.ops.sublayer_epilogue import TAPPED
from tests.kernels import (
    test_adapters,
    test_stage_exit,
    test_sublayer_epilogue,
    test_tap_gradient,
)
from tests.oracles import UGLY_MAPS

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT, HALF, BFLOAT = DTYPES


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    for module in (test_adapters, test_stage_exit, test_sublayer_epilogue, test_tap_gradient):
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


@pytest.mark.parametrize(
    "architecture, dtype, tap, storage", list(cases(EPILOGUES, TAPPED, STORAGES))
)
def test_sublayer_epilogue_runs(device, architecture, dtype, tap, storage):
    with device(architecture):
        arguments = test_sublayer_epilogue.make_arguments((1, 3, 7), 42, 5, dtype)
        test_sublayer_epilogue.check(arguments, tap, storage)


ADAPTERS = (
    (75, HALF, (3, "carry")),
    (80, BFLOAT, (3, "carry")),
    (80, FLOAT, (0, "zero")),
    (89, HALF, (0, "none")),
    (90, BFLOAT, (3, "none")),
    (100, HALF, (0, "none")),
    (120, BFLOAT, (0, "zero")),
)


@pytest.mark.parametrize("architecture, dtype, form", list(cases(ADAPTERS, test_adapters.FORMS)))
def test_adapters_run(device, architecture, dtype, form):
    """Forward and backward."""
    with device(architecture):
        test_adapters.check((2, 3, 7), 2, 6, 12, dtype, *form, again=0)


CODED = ((75, HALF, (3, "carry")), (80, BFLOAT, (0, "none")), (90, BFLOAT, (3, "carry")))


@pytest.mark.parametrize("architecture, dtype, form", list(cases(CODED, test_adapters.FORMS)))
def test_adapters_that_keep_codes_run(device, architecture, dtype, form):
    with device(architecture):
        test_adapters.check((2, 3, 7), 2, 6, 12, dtype, *form, "int8", again=0)


GRADIENTS = (
    (75, HALF, "int4"),
    (80, FLOAT, "int8"),
    (80, BFLOAT, "fp8"),
    (86, HALF, "fp8"),
    (90, BFLOAT, "int4"),
    (100, BFLOAT, "int4"),
    (120, HALF, "int8"),
)


@pytest.mark.parametrize("architecture, dtype, storage", list(cases(GRADIENTS, LARGEST)))
def test_tap_gradient_runs(device, architecture, dtype, storage):
    with device(architecture):
        test_tap_gradient.check(2, 45, 37, 5, dtype, storage)


EXITS = (
    (75, HALF, True),
    (80, BFLOAT, True),
    (80, FLOAT, False),
    (86, HALF, True),
    (89, FLOAT, True),
    (90, BFLOAT, True),
    (100, HALF, True),
    (120, BFLOAT, False),
)


@pytest.mark.parametrize("architecture, dtype, merging", list(cases(EXITS, (True, False))))
def test_stage_exit_backward_runs(device, architecture, dtype, merging):
    with device(architecture):
        test_stage_exit.check((2, 3, 7), 42, dtype, merging)


def test_threads_agree_on_sums_of_products(device):
    """Where each thread holds one row; see ``sum_of_rows``."""
    with device(80):
        test_stage_exit.check((1, 4, 6), 32, BFLOAT, True)
        test_adapters.check((1, 4, 6), 2, 16, 32, FLOAT, 3, "carry", again=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_any_schedule(device, seed):
    """Whichever warps run first."""
    with device(80, seed=seed):
        arguments = test_sublayer_epilogue.make_arguments((1, 3, 7), 42, 5, BFLOAT)
        test_sublayer_epilogue.check(arguments, "norm", "int4")
        test_adapters.check((1, 3, 7), 1, 5, 12, BFLOAT, 3, "carry", again=0)
        test_tap_gradient.check(1, 45, 37, 5, BFLOAT, "int4")
        test_stage_exit.check((1, 3, 7), 70, BFLOAT, True)


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("offset", [0, 1])
def test_any_specialisation(device, tokens, offset):
    """Of arguments that are 1 or divisible by 16, and of tensors that are not aligned, or lie as a
    GPU allocates them: what Triton's JIT makes a kernel of its own for."""

    def moved(tensor):
        room = tensor.new_empty(tensor.numel() + offset)
        room[offset:] = tensor.flatten()
        return room[offset:].view(tensor.shape)

    with device(80):
        arguments = test_sublayer_epilogue.make_arguments((1, tokens, 1), 64, 4, BFLOAT)
        moved_arguments = [moved(v) if torch.is_tensor(v) else v for v in arguments]
        test_sublayer_epilogue.check(moved_arguments, "output", "int8")
        shape = 1, tokens, 1
        test_adapters.check(shape, 1, 16, 32, BFLOAT, 3, "carry", again=0, spoil=moved)
        test_tap_gradient.check(1, tokens, 64, 16, BFLOAT, "int8", moved)
        test_stage_exit.check(shape, 64, BFLOAT, True, moved)


def test_the_jit_specialises(device):
    """It takes another kernel for tensors that are not aligned."""
    loads = []
    for offset in (0, 1):
        with device(80, counted=True) as gpu:
            arguments = test_sublayer_epilogue.make_arguments((1, 3, 7), 64, 4, BFLOAT)
            x = torch.zeros(1 + arguments[0].numel(), dtype=BFLOAT)[offset:][: 21 * 64]
            x.copy_(arguments[0].flatten())
            x = x.view(1, 3, 7, 64)
            test_sublayer_epilogue.check((x, *arguments[1:]), "output", "full")
        counted = gpu.counts["sublayer_epilogue_kernel"].loads
        # It also stands for what is absent.
        (of_x,) = (access for names, access in counted.items() if "x_ptr" in names.split("/"))
        loads.append(of_x.requests)
    assert loads[1] >= 4 * loads[0]


@pytest.mark.parametrize("tap", TAPPED)
def test_odd_width(device, tap):
    """Lanes that hold the same row hold the same sums: all of them store theirs to one place."""
    with device(80):
        arguments = test_sublayer_epilogue.make_arguments((1, 3, 7), 37, 5, BFLOAT)
        test_sublayer_epilogue.check(arguments, tap, "int4")


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*UGLY_MAPS, (1, 9, 15)], ids=str)
def test_any_map(device, architecture, dtype, shape):
    if (architecture, dtype) == (75, BFLOAT):
        pytest.skip("sm_75 has no bfloat16")
    with device(architecture):
        for tap, storage in itertools.product(TAPPED, ("full", "int4")):
            arguments = test_sublayer_epilogue.make_arguments(shape, 24, 5, dtype)
            test_sublayer_epilogue.check(arguments, tap, storage)
        for form in test_adapters.FORMS:
            test_adapters.check(shape, 2, 5, 12, dtype, *form, again=0)
        for merging in (True, False):
            test_stage_exit.check(shape, 24, dtype, merging)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, rank", [(96, 16), (128, 4), (256, 64), (768, 16), (1536, 16)])
def test_published_widths(device, architecture, dtype, channels, rank):
    if (architecture, dtype) == (75, BFLOAT):
        pytest.skip("sm_75 has no bfloat16")
    with device(architecture):
        for tap, storage in itertools.product(TAPPED, STORAGES):
            arguments = test_sublayer_epilogue.make_arguments((1, 3, 7), channels, rank, dtype)
            test_sublayer_epilogue.check(arguments, tap, storage)
        test_adapters.check((1, 5, 9), 2, rank, channels // 2, dtype, 3, "carry", again=0)
        for storage in LARGEST:
            test_tap_gradient.check(1, 150, channels, rank, dtype, storage)
        test_stage_exit.check((1, 5, 9), channels, dtype, True)
