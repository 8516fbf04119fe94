"""Ctrl-C, at any moment: nothing is lost, and the resumed run is the uninterrupted one."""

import contextlib
import json
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from e3va.backbone import Backbone
from e3va.cli import main
from e3va.runs.interrupt import held_back, interrupted_by_sigterm
from e3va.runs.progress import Bar
from tests.runs.factories import write_coco

PERIODS = {
    "detectron2": ["TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "3"],
    "torchvision": ["eval_period", "2", "checkpoint_period", "3"],
}
FINAL = {"detectron2": "model_final.pth", "torchvision": "model_final.pt"}


@pytest.fixture(autouse=True)
def handlers():
    """Python's own, which it does not set where the shell has put the tests into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    other = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, other)


@contextlib.contextmanager
def signalled(number, at, training):
    """A signal in the forward pass number ``at``, from 1, of those in training or in evaluation."""
    count = 0

    def stop(module, inputs):
        nonlocal count
        if isinstance(module, Backbone) and module.training == training:
            count += 1
            if count == at:
                signal.raise_signal(number)

    hook = register_module_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def weights(folder, engine):
    return torch.load(folder / FINAL[engine], weights_only=True)["model"]


@pytest.mark.parametrize("engine", PERIODS)
def test_a_run_that_is_stopped_again_and_again_repeats_the_whole_one(
    engine, tmp_path, capsys, monkeypatch
):
    if engine == "detectron2":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    # Its forward pass, which is on shapes alone, is none of those that are counted.
    monkeypatch.setattr(f"e3va.{engine}.engine.warn", lambda told, device: None)
    data = str(write_coco(tmp_path / "data"))
    new = ["train", data, "--engine", engine, "--model", "swin_digits", "--iterations", "4"]
    assert main([*new, "--output", str(tmp_path / "whole"), *PERIODS[engine]]) == 0

    parts = tmp_path / "parts"
    again = ["train", str(parts), "--resume"]
    first = [*new, "--output", str(parts), *PERIODS[engine]]
    moments = [
        (first, signal.SIGTERM, 1, True, 1),  # the first step, which is done to its end
        (again, signal.SIGINT, 2, False, 2),  # the evaluation after the second
        (again, signal.SIGTERM, 1, False, 2),  # the same, while it is made up
        (again, signal.SIGINT, 1, True, 3),
        (again, signal.SIGINT, 3, False, 4),  # the last evaluation
    ]
    for words, number, at, training, done in moments:
        capsys.readouterr()
        with signalled(number, at, training):
            assert main(words) == 130
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == f"interrupted: go on by e3va train {parts} --resume"
        assert max(line["iteration"] for line in lines(parts)) == done
    assert main(again) == 0
    assert lines(parts) == lines(tmp_path / "whole")
    mine, whole = weights(parts, engine), weights(tmp_path / "whole", engine)
    assert mine.keys() == whole.keys()
    assert all(torch.equal(mine[name], whole[name]) for name in whole)
    before = (parts / "metrics.json").read_bytes()
    assert main(again) == 0  # it had finished: nothing is trained or scored again
    assert (parts / "metrics.json").read_bytes() == before


@pytest.fixture(params=["SIGINT", "SIGTERM"])
def number(request):
    """A signal."""
    return getattr(signal, request.param)


def test_signals_are_held_back_to_the_end_of_the_block(number):
    with interrupted_by_sigterm():
        reached = False
        with pytest.raises(KeyboardInterrupt), held_back():
            signal.raise_signal(number)
            reached = True
        assert reached and signal.getsignal(number) is signal.default_int_handler
        with pytest.raises(ValueError, match="mine"), held_back():
            signal.raise_signal(number)
            raise ValueError("mine")
        assert signal.getsignal(number) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_who_ignores_a_signal_goes_on_ignoring_it(number):
    signal.signal(number, signal.SIG_IGN)
    with interrupted_by_sigterm(), held_back():
        signal.raise_signal(number)
    assert signal.getsignal(number) is signal.SIG_IGN


def test_other_threads_get_no_signals():
    passed = []

    def work():
        with interrupted_by_sigterm(), held_back():
            passed.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert passed


def test_a_process_ends_though_its_loader_lives(tmp_path):
    """PyTorch ends the workers by SIGTERM, and waits for them."""
    script = tmp_path / "loads.py"
    script.write_text(
        "import sys\n"
        "from torch.utils.data import DataLoader\n"
        "from e3va.runs.interrupt import held_back, ignore_interrupts, interrupted_by_sigterm\n"
        "with interrupted_by_sigterm():\n"
        "    with held_back():\n"
        "        loader = DataLoader([1] * 99, num_workers=1, worker_init_fn=ignore_interrupts)\n"
        "        sys.kept = iter(loader)\n"
        "        next(sys.kept)\n"
        "    sys.exit('done')\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stderr.endswith("done\n")


def test_no_stop_is_made_of_a_step_that_fails():
    """Its weights are half new: they would replace a good checkpoint."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from e3va.detectron2.run import _Step

    step = _Step()
    step._bar = Bar(0, 1)
    with pytest.raises(RuntimeError, match="mine"):
        step._stack.enter_context(held_back())
        signal.raise_signal(signal.SIGINT)
        try:
            raise RuntimeError("mine")
        finally:
            step.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
