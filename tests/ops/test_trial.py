"""What happens when a kernel meets a device for the first time. The CPU stands for a GPU, and
functions for its kernels."""

import json
import multiprocessing
import time
import warnings

import pytest
import torch

import e3va
from e3va import cli
from e3va.cache import warn_once
from e3va.ops import dispatch, trial
from e3va.ops.backends import native, reference, triton
from e3va.ops.backends.registry import IMPLEMENTATIONS, Implementation
from e3va.ops.taps import compress
from e3va.ops.variants import SEED, VARIANTS, Draw, SublayerEpilogue, WindowAttention, examples

CPU = torch.device("cpu")
OP = "sublayer_epilogue"
VARIANT = SublayerEpilogue(40, "float32", 5, "norm", "int4")


def arguments(dtype=torch.float32, variant=VARIANT):
    return variant.arguments(Draw(dtype, seed=1), 2, 3, 5)


def right(*arguments):
    right.runs += 1
    return reference.sublayer_epilogue(*arguments)


right.runs = 0


def wrong_here(at):
    """The reference with one wrong value in one of its results."""

    def run(*arguments):
        results = reference.sublayer_epilogue(*arguments)
        if results[at].numel():
            results[at].flatten()[-1] += 3
        return results

    return run


def raising(error):
    def run(*arguments):
        raise error

    return run


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Call it with a kernel, its seconds where the reference takes one, and a reference."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "TRIED_ON", {"cpu"})

    def restart():
        dispatch.forget()
        trial._memory.clear()
        warn_once.cache_clear()

    def install(kernel, seconds=0.5, other=reference.sublayer_epilogue):
        def timed(run, device, arguments):
            run(*arguments)
            return 1.0 if run is other else seconds

        monkeypatch.setattr(trial, "_seconds", timed)
        backends = IMPLEMENTATIONS[OP]
        kernel = Implementation(kernel, lambda *_: None, lambda *_: None)
        monkeypatch.setitem(backends, "triton", kernel)
        monkeypatch.setitem(backends, "native", kernel._replace(why_not=lambda *_: "not here"))
        monkeypatch.setitem(backends, "reference", backends["reference"]._replace(run=other))
        restart()

    install.restart = restart
    yield install
    restart()


def chosen():
    return dispatch.explain(OP, CPU, torch.float32, arguments())


def files(tmp_path):
    return sorted((tmp_path / "e3va").glob("*.json"))


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


def test_a_size_is_tried_by_itself(gpu):
    """Small maps are a matter of launches, large ones of bytes."""
    gpu(right)
    sizes = []
    for B, H, W in ((1, 1, 1), (1, 2, 2), (2, 20, 20), (2, 20, 21), (1, 100, 200)):
        x, *rest = VARIANT.arguments(Draw(torch.float32), B, H, W)
        dispatch.run(OP, x, x, *rest)
        sizes.append(len(trial.verdicts(CPU)))
    assert sizes == [1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"verdicts": {"a": {}, "b": 3}}', "\0", '{"verdicts": []}'),
        *("[" * 100_000, "\udcff\udcfe{"),  # nested too deep; no UTF-8
    ],
    ids=lambda text: ascii(text[:8]),
)
def test_a_broken_file_is_made_anew(gpu, tmp_path, text):
    gpu(right)
    chosen()
    (kept,) = files(tmp_path)
    good = json.loads(kept.read_text())["verdicts"]
    kept.write_text(text, errors="surrogateescape")
    gpu.restart()
    with pytest.warns(UserWarning, match="is damaged, its content is made anew"):
        assert chosen().backend == "triton"
    assert json.loads(kept.read_text())["verdicts"].keys() == good.keys()


def test_a_verdict_that_was_tampered_with_is_no_verdict(gpu, tmp_path):
    gpu(wrong_here(0))
    with pytest.warns(UserWarning, match="wrong"):
        chosen()
    (kept,) = files(tmp_path)
    kept.write_text(kept.read_text().replace("false", '"yes"'))
    gpu.restart()
    with pytest.warns(UserWarning, match=r"made anew|wrong"):
        assert chosen().backend == "reference"


def test_a_home_that_cannot_be_written(gpu, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    gpu(right)
    with pytest.warns(UserWarning, match="cannot be kept in .*XDG_CACHE_HOME"):
        choice = chosen()
    once = right.runs
    assert choice.backend == "triton"
    assert chosen() == choice and right.runs == once


def test_verdicts_are_of_one_state_of_the_kernels(gpu, monkeypatch, tmp_path):
    gpu(right)
    chosen()
    identity = trial._identity(CPU)
    for name in identity:
        other = identity | {name: "another"}
        monkeypatch.setattr(trial, "_identity", lambda device, other=other: other)
        assert trial.verdicts(CPU) == {}
    assert len(files(tmp_path)) == 1


def _one_of_two(folder, barrier, results):
    import os

    os.environ["XDG_CACHE_HOME"] = folder
    dispatch.TRIED_ON = {"cpu"}
    runs = []

    def kernel(*arguments):
        runs.append(1)
        time.sleep(0.01)
        return reference.sublayer_epilogue(*arguments)

    backends = IMPLEMENTATIONS[OP]
    backends["triton"] = Implementation(kernel, lambda *_: None, lambda *_: None)
    backends["native"] = backends["triton"]._replace(why_not=lambda *_: "not here")
    barrier.wait()
    verdict = trial.verdict(OP, "triton", CPU, torch.float32, arguments(), 0)
    results.put((len(runs), verdict))


def test_two_processes_at_once_agree(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_one_of_two, args=(str(tmp_path), barrier, results))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    (runs, verdict), (runs_too, verdict_too) = (results.get(timeout=120) for _ in range(2))
    for process in processes:
        process.join()
    assert verdict == verdict_too
    assert sorted((runs, runs_too))[0] == 0 < max(runs, runs_too)


def test_another_process_that_never_lets_go(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "WAIT", 0.1)
    gpu(right)
    path = trial._path(CPU)
    path.parent.mkdir()
    lock = trial.FileLock(path.with_suffix(".lock"))
    with lock, pytest.warns(UserWarning, match="locked: kernels are tried without waiting"):
        assert chosen().backend == "triton"
    assert not files(tmp_path)
    gpu.restart()
    chosen()
    gpu.restart()
    once = right.runs
    with lock:  # what is known needs no lock
        assert chosen().backend == "triton" and right.runs == once


def test_a_user_without_a_home(gpu, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    gpu(right)
    with pytest.warns(UserWarning, match="cannot be kept in"):
        assert chosen().backend == "triton"


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
    assert "ok    window_attention   native  bfloat16" in out
    assert "3 of 3 kernels are right on cpu" in out
    backends = IMPLEMENTATIONS["window_attention"]
    broken = backends["native"]._replace(run=lambda qkv, *_: qkv[..., : qkv.shape[-1] // 3] + 0)
    monkeypatch.setitem(backends, "native", broken)
    assert cli.main(["selftest", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "WRONG window_attention" in out and "0 of 3 kernels are right" in out


def test_what_a_kernel_cannot_do_is_told_before_it_is_tried(monkeypatch):
    fits, wide = WindowAttention(32, 2, 12, False), WindowAttention(48, 2, 7, False)
    far = WindowAttention(32, 2, 13, False)
    gpu = torch.device("cuda")
    assert native._window_attention_cannot(gpu, fits) is None
    assert "heads of 32 channels, not of 48" in native._window_attention_cannot(gpu, wide)
    assert "windows up to 12, not of 13" in native._window_attention_cannot(gpu, far)
    assert native._window_attention_cannot(CPU, wide) is None
    assert "ranks up to 128, not of 256" in triton.cannot(gpu, VARIANT._replace(rank=256))
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
