"""What happens when a kernel meets a device for the first time. The CPU stands for a GPU, and
functions for its kernels."""

import json
import time
import warnings

import pytest
import torch

import e3va
from e3va import cli
from e3va.ops import dispatch, trial
from e3va.ops.backends import native, reference
from e3va.ops.backends.registry import IMPLEMENTATIONS
from e3va.ops.storage import compress
from e3va.ops.variants import SEED, VARIANTS, Draw, SublayerEpilogue, WindowAttention, examples
from tests.ops.trials import CPU, OP, arguments, chosen, files, raising, right, wrong_here


def test_right_and_fast(gpu, tmp_path, capsys):
    gpu(right)
    right.runs = 0
    choice = chosen()
    assert choice.backend == "triton" and "2 times as fast as the reference" in choice.reason
    once = right.runs
    assert once == len(trial.MAPS) + trial.RUNS + 2
    assert chosen() == choice and right.runs == once
    gpu.restart()  # as another process would
    assert chosen() == choice and right.runs == once
    (kept,) = files(tmp_path)
    assert json.loads(kept.read_text())["torch"] == torch.__version__
    cli.main(["info"])
    assert (
        "sublayer_epilogue triton float32 (highest) channels=40, norm=float32"
        in capsys.readouterr().out
    )


def test_the_op_runs_what_was_chosen(gpu):
    gpu(right)
    given = arguments()
    results = dispatch.run(OP, given[0], *given)
    runs = right.runs
    again = dispatch.run(OP, given[0], *given)
    assert right.runs == runs + 1
    expected = reference.sublayer_epilogue(*given)
    for result, same, value in zip(results, again, expected, strict=True):
        assert torch.equal(result, value) and torch.equal(same, value)


def test_right_but_slow(gpu):
    gpu(right, seconds=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = chosen()
    assert choice.backend == "reference" and "0.5 times as fast" in choice.reason


def test_seconds_are_those_of_a_run():
    assert 0.02 <= trial._seconds(time.sleep, CPU, (0.02,)) < 1


@pytest.mark.parametrize("at", range(4), ids=["y", "z", "t", "codes"])
def test_one_wrong_value_is_enough(gpu, at):
    gpu(wrong_here(at))
    with pytest.warns(UserWarning, match=r"sublayer_epilogue is not used .*wrong.*e3va selftest"):
        assert chosen().backend == "reference"
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        assert chosen().backend == "reference"
    gpu.restart()
    with pytest.warns(UserWarning, match="wrong"):  # but another process tells it, too
        assert chosen().backend == "reference"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_wrong(gpu, value):
    def kernel(*arguments):
        results = reference.sublayer_epilogue(*arguments)
        results[0].flatten()[0] = value
        return results

    gpu(kernel)
    with pytest.warns(UserWarning, match="wrong"):
        assert chosen().backend == "reference"


def test_a_result_of_another_shape_is_wrong(gpu):
    gpu(lambda *arguments: tuple(v[:0] for v in reference.sublayer_epilogue(*arguments)))
    with pytest.warns(UserWarning, match=r"wrong|fails"):
        assert chosen().backend == "reference"


def test_one_that_raises(gpu):
    gpu(raising(RuntimeError("no kernel image")))
    with pytest.warns(UserWarning, match="fails here with RuntimeError: no kernel image"):
        choice = chosen()
    assert choice.backend == "reference" and "no kernel image" in choice.reason
    with e3va.backend("triton"):  # who asks for it gets it
        assert chosen() == ("triton", "asked for by name")


def test_out_of_memory(gpu, tmp_path, monkeypatch):
    """A neighbour may have taken it: nothing is kept for later."""
    full = raising(torch.OutOfMemoryError("too large"))
    gpu(right, other=full)
    check = trial.check
    monkeypatch.setattr(trial, "check", lambda *_: trial.Verdict(error=1e-7, right=True))
    choice = chosen()
    assert choice.backend == "triton" and "the reference runs out of memory" in choice.reason
    gpu(full)
    with pytest.warns(UserWarning, match="fails here with OutOfMemoryError"):
        assert chosen().backend == "reference"
    assert not files(tmp_path)
    monkeypatch.setattr(trial, "check", check)
    gpu(right)
    assert chosen().backend == "triton" and len(files(tmp_path)) == 1


def test_a_gpu_that_computes_nothing_any_more(gpu, tmp_path):
    """No backend can help, and the kernel that is tried just now need not be to blame."""
    gpu(raising(torch.AcceleratorError("an illegal memory access was encountered", 700)))
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        chosen()
    assert not files(tmp_path)


def test_no_faster_than_noise(gpu):
    gpu(right, seconds=0.97)
    assert chosen().backend == "reference"


def test_defaults_of_pytorch_change_nothing(gpu, monkeypatch):
    gpu(right)
    monkeypatch.setattr(trial, "_times", lambda *_: (0.5, 1.0))
    given = arguments()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            choice = dispatch.explain(OP, CPU, torch.float32, given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert choice.backend == "triton"


def test_the_last_bit_of_a_norm_decides_few_codes(monkeypatch):
    """Of a norm that is not returned: another summation order is no fault, other codes are."""
    variant = SublayerEpilogue(768, None, 4, "norm", "int4")

    def kernel(x, y, weight, bias, eps, *rest):
        wide = (x + y).double()
        z = torch.nn.functional.layer_norm(wide, wide.shape[-1:], eps=eps).to(x)
        y_out, _, t, *_ = reference.sublayer_epilogue(x, y, weight, bias, eps, *rest)
        return y_out, x.new_empty(0), t, *compress(z, "int4", shift + SEED)

    backends = IMPLEMENTATIONS[OP]
    monkeypatch.setitem(backends, "native", backends["native"]._replace(run=kernel))
    for dtype in trial.TOLERANCE:
        shift = 0
        assert trial.check(OP, "native", CPU, dtype, variant).right
        shift = 1
        assert not trial.check(OP, "native", CPU, dtype, variant).right


def test_the_generator_of_pytorch_is_left_alone(gpu):
    gpu(right)
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    chosen()
    assert torch.equal(torch.rand(5), expected)


def test_by_name_nothing_is_tried(gpu):
    gpu(right)
    right.runs = 0
    with e3va.backend("triton"):
        assert chosen().backend == "triton"
    assert right.runs == 0


@pytest.mark.parametrize("op", VARIANTS)
@pytest.mark.parametrize("dtype", trial.TOLERANCE, ids=str)
def test_the_kernels_of_the_cpu_pass(op, dtype):
    """They are the only ones that can be run everywhere: what is asked of a GPU's is not too
    much."""
    if native.why_not(CPU, dtype):
        pytest.skip(f"compiled kernels left untested: {native.why_not(CPU, dtype)}")
    for variant in {v for name, v in examples() if name == op and getattr(v, "adapters", 0) < 36}:
        assert trial.check(op, "native", CPU, dtype, variant).right


def test_variants_come_back_from_their_arguments():
    for op, variant in examples():
        if getattr(variant, "adapters", 0) < 36:
            assert VARIANTS[op].of(*variant.arguments(Draw(torch.float32), 1, 2, 3)) == variant


def test_selftest(monkeypatch, capsys):
    few = [("window_attention", WindowAttention(32, 2, 3, True))]
    monkeypatch.setattr(trial, "examples", lambda: iter(few))
    if native.why_not(CPU, torch.float32):
        pytest.skip("compiled kernels left untested")
    assert cli.main(["selftest", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "ok    window_attention    native  bfloat16" in out
    assert "3 of 3 kernels are right on cpu" in out
    backends = IMPLEMENTATIONS["window_attention"]
    broken = backends["native"]._replace(run=lambda qkv, *_: qkv[..., : qkv.shape[-1] // 3] + 0)
    monkeypatch.setitem(backends, "native", broken)
    assert cli.main(["selftest", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "WRONG window_attention" in out and "0 of 3 kernels are right" in out
