"""The benchmarks run on whatever there is and write what they promise."""

import functools
import json

import pytest
import torch

pytest.importorskip("timm", reason="the trunk is timed against timm's: pip install 'e3va[test]'")

from bench import competitors, gpu, kernels
from e3va import ops
from e3va.ops import trial, verdicts
from e3va.ops.backends import native
from e3va.ops.backends.registry import PREFERENCE

RATIOS = {
    "highway_fwd_bwd_vs_eager",
    "highway_fwd_bwd_vs_compile",
    "window_attention_vs_eager",
    "window_attention_vs_sdpa",
    "trunk_forward_vs_timm",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs python -m bench.gpu itself")
def test_the_gpu_suite_runs_dry(tmp_path, capsys, monkeypatch):
    # To generate code takes longer than all the rest, and is not ours.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    gpu.main(["--json", str(tmp_path / "gpu.json"), "--plot", str(tmp_path / "gpu.png")])
    report = json.loads((tmp_path / "gpu.json").read_text())
    versions = {"driver", "torch", "cuda", "triton"}
    assert {"device", "commit", *versions} <= set(report["environment"])
    assert set(report["ratios"]) == RATIOS
    assert all(ratio > 0 for ratio in report["ratios"].values())
    assert len(report["cases"]) == len(competitors.OPS)
    if native.why_not(torch.device("cpu"), torch.float32) is None:
        assert {c["op"] for c in report["checks"]} == set(PREFERENCE)
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "dry run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", ["UNIX x86_64 Kernel Module", "UNIX Open Kernel Module for x86_64"]
)
def test_the_driver_is_named(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "DRIVER", tmp_path / "version")
    assert verdicts.driver() == "unknown"
    text = f"NVRM version: NVIDIA {kind}  580.65.06  Sun Jul 27\nGCC version:  gcc version 12.2.0\n"
    verdicts.DRIVER.write_text(text)
    assert verdicts.driver() == "580.65.06"


def test_fewest_bytes_and_lowest_ratios():
    case = competitors.Case("sublayer_epilogue", "swin_b", 2, 2, "bf16")
    tokens = 2 * 50 * 84
    assert competitors.least_bytes(case) == tokens * (8 * 512 + 2 * 16)
    gradient = tokens * 36 * (256 + 4 + 2 * 16)
    assert competitors.least_bytes(case._replace(op="tap_gradient")) == gradient
    # t read, S and u written, and the state before and after; dS and u read, S and dt written, and
    # both gradients of the state.
    assert competitors.least_bytes(case._replace(op="adapters")) == tokens * 2 * 16 * (3 * 36 + 2)
    backward = tokens * 2 * 16 * (4 * 36 + 2)
    assert competitors.least_bytes(case._replace(op="adapters_backward")) == backward
    assert competitors.least_bytes(case._replace(op="window_attention")) is None
    results = [{"op": "trunk_forward", "ratios": {"timm": ratio}} for ratio in (2.0, 1.5, 3.0)]
    results += [{"op": "highway", "ratios": {"eager": 2.0, "compile": 1.2}}]
    results += [{"op": "highway", "ratios": {"eager": 3.0}}]  # not compiled
    assert kernels.summary(results) == {
        "trunk_forward_vs_timm": 1.5,
        "highway_fwd_bwd_vs_eager": 2.0,
        "highway_fwd_bwd_vs_compile": 1.2,
    }


def test_a_wrong_kernel_fails_the_suite(monkeypatch, capsys):
    variant = ops.variants.WindowAttention(32, 2, 3, True)
    right, wrong = trial.Verdict(1e-7, True), trial.Verdict(0.5, False)
    found = [
        trial.Trial("window_attention", "native", "float32", variant, v) for v in (right, wrong)
    ]
    monkeypatch.setattr(trial, "selftest", lambda device: iter(found))
    monkeypatch.setattr(kernels, "main", lambda arguments, checks: None)
    with pytest.raises(SystemExit, match="1 kernels are wrong"):
        gpu.main([])
    assert "WRONG native float32 window_attention, head_dim=32" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["highway", "window_attention"])
@pytest.mark.parametrize("stage", [0, 3])
def test_competitors_compute_the_same(op, stage):
    """A ratio means something only between equals."""
    case = competitors.Case(op, "swin_t", stage, 2, "fp32", (160, 100))
    rivals = competitors.OPS[op](case, "cpu")
    ours, *others = (run() for run in rivals.values())
    for other in others:
        torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-4)


def test_tracks(tmp_path, monkeypatch, capsys):
    """Two methods on one track, two iterations each: every number is there, and a second call only
    adds the seed that is missing."""
    pytest.importorskip("detectron2", reason="Detectron2 is missing: bench.tracks is not run")
    from bench import tracks

    few = functools.partial(tracks.write_digits, train=4, val=2, tune=2)
    monkeypatch.setattr(tracks, "write_digits", few)
    monkeypatch.setattr(tracks, "TIMED_STEPS", 1)
    file = tmp_path / "tracks.json"
    file.write_text('{"tracks": {"boxes": {}}}')
    options = ["--tracks", "semantic", "--methods", "norm", "e3va", "--iterations", "2"]
    options += ["--rates", "1", "2", "--output", str(tmp_path), "--json", str(file)]
    trained = []
    train = tracks.train
    monkeypatch.setattr(tracks, "train", lambda *a: trained.append(a[1:]) or train(*a))
    tracks.main([*options, "--seeds", "0"])
    assert trained == [(m, 0, rate) for m in ("norm", "e3va") for rate in (1.0, 2.0)]
    trained.clear()
    report = tracks.main([*options, "--seeds", "0", "5"])
    methods = report["tracks"]["semantic"]["methods"]
    assert {run[:2] for run in trained} == {("norm", 5), ("e3va", 5)}
    assert {(method, 5, methods[method]["rate"]) for method in ("norm", "e3va")} <= set(trained)
    assert json.loads(file.read_text()) == report
    assert report["tracks"].keys() == {"boxes", "semantic"}
    assert methods["e3va"]["saved_bytes"] < methods["norm"]["saved_bytes"]
    for numbers in methods.values():
        scores = [r["score"] for r in numbers["runs"] if r["rate"] == numbers["rate"]]
        assert numbers["scores"] == scores and len(scores) == 2
        assert numbers["rate"] == tracks.best_rate(numbers["runs"], [1.0, 2.0])
        assert numbers["mean"] == pytest.approx(sum(numbers["scores"]) / 2)
        for key in ("trainable_params", "saved_bytes", "peak_live_bytes", "seconds_per_iter"):
            assert numbers[key] > 0
    assert "mIoU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds runs of 2 iterations of semantic, not 3"):
        tracks.main([*options, "--iterations", "3"])
    for garbage in ("", "garbage{", "[]", "[" * 100_000, "\udcff" * 1000):
        file.write_text(garbage, errors="surrogateescape")
        with pytest.raises(SystemExit, match="holds no results to go on from") as stop:
            tracks.main(options)
        assert len(str(stop.value)) < 300  # what is wrong, not what it holds
    trained.clear()
    for name, value, problem in (
        ("--rates", "nan", "nan is "),
        ("--rates", "-1", "-1 is "),
        ("--iterations", "0", "0 is "),
        ("--json", str(file / "t.json"), f"cannot write {file / 't.json'}: "),
        ("--json", str(tmp_path), f"cannot write {tmp_path}: "),
    ):
        with pytest.raises(SystemExit):
            tracks.main([*options, name, value])
        assert f"{name}: {problem}" in capsys.readouterr().err
    assert not trained


def test_the_rate_is_the_best_over_the_seeds():
    """A rate that the first seed alone can bear is left."""
    pytest.importorskip("detectron2", reason="Detectron2 is missing: bench.tracks is not run")
    from bench import tracks

    tuned = {0.5: [3, 3, 3], 1.0: [6, 5, 4], 2.0: [9, 1, 0]}
    entry = {"runs": []}
    seeds, rates = [7, 8, 9], list(tuned)
    order = []
    while pair := tracks.next_run(entry["runs"], seeds, rates):
        order.append(pair)
        seed, rate = pair
        tune = tuned[rate][seeds.index(seed)]
        entry["runs"].append({"seed": seed, "rate": rate, "tune": tune, "score": 10 * tune})
    assert order == [(7, 0.5), (7, 1.0), (7, 2.0), (8, 2.0), (8, 1.0), (9, 1.0)]
    tracks.summarise(entry, seeds, rates)
    assert (entry["rate"], entry["scores"], entry["mean"]) == (1.0, [60, 50, 40], 50)
    assert entry["std"] == pytest.approx(10)
    assert tracks.next_run(entry["runs"], seeds[:1], rates) is None
    tracks.summarise(entry, seeds[:1], rates)
    assert (entry["rate"], entry["std"]) == (2.0, None)


def test_a_training_that_diverges_scores_nothing(tmp_path, monkeypatch):
    pytest.importorskip("detectron2", reason="Detectron2 is missing: bench.tracks is not run")
    from bench import tracks

    track = tracks.TRACKS["semantic"]
    data = tracks.write_digits(tmp_path / "digits", seed=0, train=8, val=2, tune=2)
    setting = tracks.Setting(track, data, 2, tmp_path)
    run = tracks.train(setting, "norm", 3, float("inf"))
    assert run == {"seed": 3, "rate": float("inf"), "score": 0.0, "tune": 0.0}


def test_storage(tmp_path, monkeypatch, capsys):
    pytest.importorskip("detectron2", reason="Detectron2 is missing: bench.storage is not run")
    from bench import storage

    few = functools.partial(storage.write_digits, train=4, val=2)
    monkeypatch.setattr(storage, "write_digits", few)
    options = ["--storages", "full", "int4", "--seeds", "3", "--iterations", "1"]
    file = tmp_path / "storage.json"
    report = storage.main([*options, "--output", str(tmp_path), "--json", str(file)])
    assert json.loads(file.read_text()) == report
    assert all(len(result["mask_ap"]) == 1 for result in report["storages"].values())
    assert report["storages"]["int4"]["saved_bytes"] < report["storages"]["full"]["saved_bytes"]
    assert "mask AP" in capsys.readouterr().out


def test_tables_of_steps(tmp_path, monkeypatch):
    """Bytes in MiB, seconds over those of stock, what is saved of full's; and methods not run."""
    from bench import tables

    def steps(**values):
        return {m: {"total_bytes": v * 2**20, "seconds_per_step": v} for m, v in values.items()}

    setups = {"a": steps(stock=4, full=8, e3va=3), "b": steps(stock=2, full=5)}
    for name in ("train_step.json", "train_step_cpu.json"):
        (tmp_path / name).write_text(json.dumps({"setups": setups}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    head, _, *rows, _, last = tables.costs().splitlines()
    assert head == "| MiB | `stock` | `full` | `e3va` | saved |"
    assert rows == ["| `a` | 4 | 8 | 3 | 62.5 % |", "| `b` | 2 | 5 | – | – |"]
    assert last.startswith("Memory") and "not measured" in last
    head, _, *rows, _, last = tables.times().splitlines()
    assert head == "| × `stock` | `stock` | `full` | `e3va` | saved |"
    assert rows == ["| `a` | 1.00 | 2.00 | 0.75 | 62.5 % |", "| `b` | 1.00 | 2.50 | – | – |"]
    assert last.startswith("Time") and last.endswith("the paper says 26.2 %.")


EXECUTED = {
    "kernel": "b",
    "architecture": 90,
    "dtype": "bf16",
    "instructions": 2.0,
    "tensor": 0.0,
    "special": 0.0,
    "sectors_over_floor": 1.0,
    "wavefronts": 0.0,
    "gpu": "H100 SXM",
    "model_ns_cached": 1.5,
    "model_ns_uncached": 2.5,
}


def test_costs_of_kernels_are_kept_as_they_come(tmp_path, monkeypatch, capsys):
    registers = pytest.importorskip("bench.registers", reason="triton is not installed")
    row = {"kernel": "a", "architecture": 80, "dtype": "fp16", "channels": 96, "rank": 16}
    row |= {"hidden": 48, "registers": 40, "spilled": 8, "shared": 0, "occupancy": 0.5}

    def compile_kernels(architecture, dtype, channels, *shape):
        if channels == 128:
            raise KeyboardInterrupt
        yield row | {"fits": True}

    monkeypatch.setattr(registers, "compile_kernels", compile_kernels)
    monkeypatch.setattr(registers, "compile_attention", lambda *of: iter(()))
    monkeypatch.setattr(registers, "execute_kernels", lambda *of: iter([EXECUTED]))
    executed = ["--architectures", "90", "--tables", "executed", "--size", "8", "9"]
    for _ in range(2):
        registers.main([*executed, "--json", str(tmp_path / "r.json")])
    first = json.loads((tmp_path / "r.json").read_text())
    assert first["executed"]["rows"] == [EXECUTED] and first["executed"]["size"] == [8, 9]
    assert "1.50 to 2.50 ns on H100 SXM (model)" in capsys.readouterr().out
    words = ["--architectures", "80", "--dtypes", "fp16", "--tables", "compiled"]
    with pytest.raises(KeyboardInterrupt):
        registers.main([*words, "--json", str(tmp_path / "r.json")])
    for name, table in (("tracks", "{}"), ("executed", "3"), ("compiled", '{"rows": 5}')):
        (tmp_path / "other.json").write_text(f'{{"{name}": {table}}}')
        with pytest.raises(SystemExit, match=rf"other\.json holds other results, {name}"):
            registers.main([*words, "--json", str(tmp_path / "other.json")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(r["kernel"], r["registers"]) for r in report["compiled"]["rows"]] == [("a", 40)]
    assert report["compiled"]["environment"]["commit"]
    assert [96, 16, 48] in report["compiled"]["channels_rank_hidden"]
    assert report["executed"] == first["executed"]
    for wrong in (["--size", "0", "5"], ["--channels", "3"], ["--json", str(tmp_path)]):
        with pytest.raises(SystemExit, match="2"):
            registers.main([*words, *wrong])
        assert wrong[0] in capsys.readouterr().err.splitlines()[-1]
    words += ["--channels", "96"]
    registers.main([*words, "--spill", "8"])
    with pytest.raises(SystemExit, match="1 of 1 spill or do not fit"):
        registers.main([*words, "--spill", "7"])


def test_backward_of_a_stage_is_the_sum_of_its_kernels():
    registers = pytest.importorskip("bench.registers", reason="triton is not installed")
    # 8 maps of 50×84, read through 36 adapters
    ns = {"adapters_backward int8": 0.25, "tap_gradient int4": 0.125, "stage_exit_backward": 2.0}
    ns |= {"fold": 1e3, "fold_backward": 3e3, "adapters int8": 1e6}
    costs = [EXECUTED | {"kernel": name, "model_ns_cached": n} for name, n in ns.items()]
    for cost in costs:
        cost["model_ns_uncached"] = 2 * cost["model_ns_cached"]
    cached = (33600 * 36 * 0.375 + 33600 * 2 + 36 * 4e3) / 1e6
    found = registers.stage_backward(costs)
    assert found == {"H100 SXM": pytest.approx([cached, 2 * cached], abs=1e-3)}
    other = [cost | {"gpu": "RTX 4060"} for cost in costs[1:]]
    assert registers.stage_backward(costs + other) == found


def test_costs_of_kernels(tmp_path):
    registers = pytest.importorskip("bench.registers", reason="triton is not installed")
    from tests.ptx.counters import Access, Counts

    key = {"kernel": "a", "architecture": 80, "dtype": "fp16"}
    results = [
        {**key, "registers": 40, "spilled": 0, "shared": 1024, "occupancy": 0.5},
        {**key, "registers": 32, "spilled": 0, "shared": 2048, "occupancy": 0.25},
        {**key, "dtype": "fp32", "registers": 8, "spilled": 0, "shared": 0, "occupancy": 1.0},
    ]
    rows = registers.worst(results)
    expected = {**key, "registers": 40, "spilled": 0, "shared": 2048, "occupancy": 0.25}
    assert rows == [expected, results[2]]
    report = {"compiled": {"environment": {"threads": 1}, "rows": rows}}
    registers.write_report(tmp_path / "r.json", report)
    assert json.loads((tmp_path / "r.json").read_text()) == report
    gpu = registers.Gpu("one", 1, 1.0, 32.0, 4.096e-3)
    counts = Counts()
    counts.opcodes["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = 8
    assert registers.roofline(counts, gpu, cached=False) == pytest.approx(8e3)  # by tensor cores
    counts.loads["x"] = Access(1, 32, 10**4)
    assert registers.roofline(counts, gpu, cached=False) == pytest.approx(1e4)  # by memory
    assert registers.roofline(counts, gpu, cached=True) == pytest.approx(8e3)
    counts.opcodes["add.f32"] = 10**5
    for cached in (False, True):
        assert registers.roofline(counts, gpu, cached) == pytest.approx((10**5 + 8) / 4)  # by issue


@pytest.mark.parametrize("module", [kernels, gpu])
def test_a_picture_that_cannot_be_drawn_is_refused_before_work(
    module, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(trial, "selftest", lambda device: pytest.fail("it worked"))
    monkeypatch.setattr(kernels, "measure", lambda *of: pytest.fail("it worked"))
    (tmp_path / "file").touch()
    for path, problem in (
        (tmp_path / "a.xyz", "a picture's name ends with "),
        (tmp_path / "file/a.png", f"cannot write {tmp_path / 'file/a.png'}: "),
    ):
        with pytest.raises(SystemExit, match="2"):
            module.main(["--plot", str(path)])
        assert problem in capsys.readouterr().err
    monkeypatch.setattr(kernels, "PLOT", tmp_path / "file/default.png")
    with pytest.raises(SystemExit, match="2"):
        module.main([])
    assert "file/default.png" in capsys.readouterr().err
