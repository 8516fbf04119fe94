"""The table of backends, and what attaches to it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import e3va
from e3va.ops import dispatch
from e3va.ops.backends import native, triton
from e3va.ops.backends.registry import IMPLEMENTATIONS, PREFERENCE, register
from e3va.ops.variants import VARIANTS, Draw, SublayerEpilogue, WindowAttention, examples

CPU = torch.device("cpu")


def test_the_table_names_what_there_is():
    assert {op: set(names) for op, names in PREFERENCE.items()} == {
        op: set(found) for op, found in IMPLEMENTATIONS.items()
    }
    assert PREFERENCE.keys() == VARIANTS.keys()
    for names in PREFERENCE.values():  # whatever has no other can be computed
        assert names[-1] == "reference" and set(names) <= set(dispatch.BACKENDS)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_table_alone_decides_what_is_preferred(monkeypatch, first):
    """Not the order of registration."""
    op, names = "adapters", PREFERENCE["adapters"]
    order = (*names[first:], *names[:first])
    found = {name: IMPLEMENTATIONS[op][name]._replace(why_not=lambda *_: None) for name in order}
    monkeypatch.setitem(IMPLEMENTATIONS, op, found)
    with e3va.backend("auto"):
        assert dispatch.explain(op, CPU, torch.float32).backend == "triton"
        monkeypatch.setitem(PREFERENCE, op, names[::-1])
        assert dispatch.explain(op, CPU, torch.float32).backend == "reference"


@pytest.mark.parametrize(
    "op, backend", [("window_attention", "triton"), ("adapters", "cuda"), ("adapter", "native")]
)
def test_what_the_table_does_not_name_is_refused(op, backend):
    with pytest.raises(LookupError, match=f"no backend '{backend}' of '{op}'"):
        register(op, backend)


def test_compiled_kernels_return_what_the_reference_does_and_say_so_on_shapes():
    if native.why_not(CPU, torch.float32):
        pytest.skip("compiled kernels left untested")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for op, variant in examples():
        if "native" in PREFERENCE[op] and getattr(variant, "adapters", 0) < 36:
            run, reference = (IMPLEMENTATIONS[op][name].run for name in ("native", "reference"))
            arguments = variant.arguments(Draw(torch.bfloat16), 1, 3, 5)
            # A seed is handed over as a number: PyTorch 2.11 reads none from a tensor within.
            shapes = tree_map_only(
                torch.Tensor, lambda v: mode.from_tensor(v) if v.dim() else int(v), arguments
            )
            with mode:
                fake = run(*shapes)
            for results in (run(*arguments), reference(*arguments)):
                assert list(map(form, fake)) == list(map(form, results)), (op, variant)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_default_device_changes_nothing(backend):
    if backend == "native" and native.why_not(CPU, torch.float32):
        pytest.skip("compiled kernels left untested")
    for op, variant in examples():
        if getattr(variant, "adapters", 0) < 36:
            run = IMPLEMENTATIONS[op][backend].run
            arguments = variant.arguments(Draw(torch.float32), 1, 3, 5)
            with torch.device("meta"):
                results = run(*arguments)
            assert all(result.device == CPU for result in results), (op, variant)


def form(result):
    return result.shape, result.dtype


def test_what_a_kernel_cannot_do_is_told_before_it_is_tried():
    fits, wide = WindowAttention(32, 2, 12, False), WindowAttention(48, 2, 7, False)
    far = WindowAttention(32, 2, 13, False)
    gpu = torch.device("cuda")
    assert native._window_attention_cannot(gpu, fits) is None
    assert "heads of 32 channels, not of 48" in native._window_attention_cannot(gpu, wide)
    assert "windows up to 12, not of 13" in native._window_attention_cannot(gpu, far)
    assert native._window_attention_cannot(CPU, wide) is None
    assert "ranks up to 128, not of 256" in triton.cannot(
        gpu, SublayerEpilogue(40, None, 256, "norm", "full")
    )
    assert triton.cannot(gpu, fits) is None


@pytest.mark.parametrize(
    ("code", "architecture", "runs"),
    [
        ("sm_80", 80, True),
        ("sm_80", 89, True),
        ("sm_86", 80, False),
        ("sm_80", 90, False),
        ("compute_80", 110, True),
        ("compute_120", 110, False),
        ("sm_90a", 90, True),
        ("sm_100a", 103, False),
        ("compute_90a", 100, False),
        ("sm_100f", 103, True),
        ("compute_100f", 120, False),
        ("x86_64", 80, False),
    ],
)
def test_code_for_a_gpu(code, architecture, runs):
    """Machine code runs within a generation, on later members; PTX from its own one on (CUDA
    programming guide, "Binary compatibility", "PTX compatibility")."""
    assert native._runs(code, architecture) is runs
