"""How what trials have shown is kept, and shared by processes."""

import json
import math
import multiprocessing
import time

import pytest
import torch

from e3va.ops import dispatch, verdicts
from e3va.ops.backends import reference
from e3va.ops.backends.registry import IMPLEMENTATIONS, Implementation
from e3va.ops.variants import Draw
from tests.ops.trials import CPU, OP, VARIANT, arguments, chosen, files, right, wrong_here


def test_a_size_is_tried_by_itself(gpu):
    """Small maps are a matter of launches, large ones of bytes."""
    gpu(right)
    sizes = []
    for B, H, W in ((1, 1, 1), (1, 2, 2), (2, 20, 20), (2, 20, 21), (1, 100, 200)):
        x, *rest = VARIANT.arguments(Draw(torch.float32), B, H, W)
        dispatch.run(OP, x, x, *rest)
        sizes.append(len(verdicts.known(CPU)))
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


@pytest.mark.parametrize(
    "name, value", [("seconds", 0.0), ("error", math.nan), ("failure", 7), ("failure", "x")]
)
def test_a_verdict_that_no_trial_gives_is_made_anew(gpu, tmp_path, name, value):
    gpu(right)
    chosen()
    (kept,) = files(tmp_path)
    report = json.loads(kept.read_text())
    (verdict,) = report["verdicts"].values()
    verdict[name] = value
    kept.write_text(json.dumps(report))
    gpu.restart()
    with pytest.warns(UserWarning, match="is damaged, its content is made anew"):
        assert chosen().backend == "triton"


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
    identity = verdicts._identity(CPU)
    for name in identity:
        other = identity | {name: "another"}
        monkeypatch.setattr(verdicts, "_identity", lambda device, other=other: other)
        assert verdicts.known(CPU) == {}
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
    verdict = verdicts.verdict(OP, "triton", CPU, torch.float32, arguments(), 0)
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
    monkeypatch.setattr(verdicts, "WAIT", 0.1)
    gpu(right)
    path = verdicts._path(CPU)
    path.parent.mkdir()
    lock = verdicts.FileLock(path.with_suffix(".lock"))
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
