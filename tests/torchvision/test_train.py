"""Training, its schedule and its resuming."""

import copy
import importlib.util
import json
import logging
from dataclasses import replace

import pytest
import torch
import yaml

from e3va.data.coco import CocoInstances
from tests.data.conftest import coco, coco_tree
from tests.torchvision.conftest import SMALL, SMALL_HEADS, backbone, detector

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from e3va.torchvision import ModelConfig, TrainConfig, mask_rcnn
from e3va.torchvision.checkpoint import load_checkpoint
from e3va.torchvision.model import DETECTORS
from e3va.torchvision.run import Run
from e3va.torchvision.train import schedule, train


def settings(**changes):
    five = {"iterations": 5, "batch_size": 2, "lr": 1e-3, "warmup": 2, "eval_period": 3}
    return TrainConfig(**{**five, "device": "cpu", **changes})


def history(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class Killed(BaseException):
    """Ends a run that has no time to write anything."""


def interrupted(data, reads):
    """The same data, whose reading ends the run after so many items."""

    class Interrupted(CocoInstances):
        left = reads

        def __getitem__(self, index):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return super().__getitem__(index)

    return Interrupted(data.path, data.folder, masks=data.masks)


NEEDS_PEFT = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs PEFT")


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, "e3va") for kind in SMALL_HEADS),
        ("mask_rcnn", "mona"),
        ("mask_rcnn", "bitfit"),
        pytest.param("mask_rcnn", "lora", marks=NEEDS_PEFT),
    ],
)
def test_resumed_run_repeats_the_uninterrupted_one(tmp_path, kind, method):
    data = coco(tmp_path / "data", masks=DETECTORS[kind].masks)
    ap = "mask_ap" if data.masks else "box_ap"
    whole = detector(method, kind)
    before = copy.deepcopy(whole.state_dict())
    result = train(whole, data, data, tmp_path / "whole", settings())
    assert whole.training and result["seconds_per_iter"] > 0 and result["peak_bytes"] > 0
    steps = [entry for entry in history(tmp_path / "whole") if "loss" in entry]
    assert [entry["iteration"] for entry in steps] == [1, 2, 3, 4, 5]
    rates = [1 / 3, 2 / 3, 1, 0.75, 0.25]
    assert [entry["lr"] for entry in steps] == pytest.approx([1e-3 * rate for rate in rates])
    evaluations = [entry for entry in history(tmp_path / "whole") if ap in entry]
    assert [entry["iteration"] for entry in evaluations] == [3, 5]
    assert any("mask" in name for name in result) == data.masks
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    moved = {k for k, v in whole.state_dict().items() if not torch.equal(v, before[k])}
    assert moved <= trained and any(name.startswith("backbone.body") for name in moved)

    with pytest.raises(Killed):
        train(detector(method, kind), interrupted(data, 8), data, tmp_path / "parts", settings())
    assert len(history(tmp_path / "parts")) == 5  # four steps, one of them after the checkpoint
    torch.rand(7)  # the state of the global generator must not matter
    parts = detector(method, kind, seed=1)
    resumed = train(parts, data, data, tmp_path / "parts", settings(), resume=True)
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    assert resumed[ap] == result[ap]
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    # A finished run has nothing left to do.
    again = train(parts, data, data, tmp_path / "parts", settings(), resume=True)
    assert again[ap] == result[ap]
    run = (tmp_path / "parts" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"lr 0\.001, not 0\.002"):
        train(parts, data, data, tmp_path / "parts", settings(lr=2e-3), resume=True)
    assert (tmp_path / "parts" / "config.yaml").read_text() == run


def test_a_resumed_run_may_become_longer(tmp_path, caplog):
    """The rest of it follows the longer schedule; what is behind it stays as it was."""
    data = coco(tmp_path / "data")
    long, short = settings(iterations=8, eval_period=None), settings(eval_period=None)
    train(detector(), data, None, tmp_path / "out", short)
    before = history(tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        train(detector(), data, None, tmp_path / "out", long, resume=True)
    expected = [1e-3 * schedule(i, 5, 2) for i in range(5)]
    expected += [1e-3 * schedule(i, 8, 2) for i in range(5, 8)]
    assert history(tmp_path / "out")[:5] == before
    assert [entry["lr"] for entry in history(tmp_path / "out")] == expected
    (message,) = caplog.messages
    assert "8 iterations long instead of 5" in message and "at 0.0005 instead of 0 " in message
    assert Run.read(tmp_path / "out").config.iterations == 8
    with pytest.raises(ValueError, match="8 iterations long, not 5: it can become longer"):
        train(detector(), data, None, tmp_path / "out", short, resume=True)


def test_a_run_with_an_optimizer_in_eight_bits_resumes(tmp_path):
    """To the same weights; and is not the same run as one in 32 bits, nor as one of before there
    was a choice."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: left untested")
    data, out = coco(tmp_path / "data"), tmp_path / "out"
    eight = settings(optimizer="adamw8bit")
    train(whole := detector(), data, None, tmp_path / "whole", eight)
    with pytest.raises(Killed):
        train(detector(), interrupted(data, 7), None, out, replace(eight, checkpoint_period=3))
    train(parts := detector(seed=1), data, None, out, eight, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    with pytest.raises(ValueError, match="with optimizer adamw8bit, not adamw"):
        train(detector(), data, None, out, settings(), resume=True)
    del state["settings"]["optimizer"]
    torch.save(state, out / "checkpoint.pt")
    with pytest.raises(ValueError, match="with optimizer adamw, not adamw8bit"):
        train(detector(), data, None, out, eight, resume=True)


@pytest.mark.parametrize("amp", [None, "bfloat16", "float16"])
def test_runs_of_before_resume(tmp_path, amp):
    """A checkpoint that knows neither optimizer nor trunk_dtype, of an AdamW that was not fused."""
    data, out = coco(tmp_path / "data"), tmp_path / "out"
    config = settings(amp=amp, model=ModelConfig(weights="none.pth"))
    train(whole := detector(), data, None, tmp_path / "whole", config)
    with pytest.raises(Killed):
        train(detector(), interrupted(data, 7), None, out, replace(config, checkpoint_period=3))
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    for setting in ("optimizer", "trunk_dtype"):
        del state["settings"][setting]
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    torch.save(state, out / "checkpoint.pt")
    train(parts := detector(seed=1), data, None, out, config, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_model_that_comes_with_gradients_trains_as_one_without(tmp_path):
    data, models = coco(tmp_path / "data"), [detector(), detector()]
    for parameter in models[1].parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    for index, model in enumerate(models):
        train(model, data, None, tmp_path / str(index), settings(iterations=3))
    assert all(map(torch.equal, *(model.state_dict().values() for model in models)))


def test_settings_that_show_in_no_weight_are_compared(tmp_path):
    data = coco(tmp_path / "data")
    train(detector(), data, None, tmp_path / "out", settings())

    def resume(model):
        train(model, data, None, tmp_path / "out", settings(), resume=True)

    narrow = {**SMALL, **SMALL_HEADS["mask_rcnn"]}
    with pytest.raises(ValueError, match=r"with options .*'int4'.*, not .*'full'"):
        resume(mask_rcnn(backbone(storage="full"), 3, **narrow))
    with pytest.raises(ValueError, match=r"with max_size 96, not 128"):
        resume(mask_rcnn(backbone(), 3, **{**narrow, "max_size": 128}))
    with pytest.raises(ValueError, match=r"with images 4, not 5"):
        five = coco(tmp_path / "five", images=5)
        train(detector(), five, None, tmp_path / "out", settings(), resume=True)


def test_a_longer_run_repeats_itself_when_it_is_resumed(tmp_path):
    data = coco(tmp_path / "data")
    results = []
    for folder, reads in (("whole", 99), ("parts", 4)):
        train(detector(), data, None, tmp_path / folder, settings(iterations=3))
        longer = settings(iterations=7, checkpoint_period=2)
        model = detector()
        try:
            train(model, interrupted(data, reads), None, tmp_path / folder, longer, resume=True)
        except Killed:
            train(model := detector(), data, None, tmp_path / folder, longer, resume=True)
        results.append((history(tmp_path / folder), list(model.state_dict().values())))
    (whole, a), (parts, b) = results
    assert whole == parts and len(whole) == 7
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


def test_validation_data_are_optional(tmp_path):
    data = coco(tmp_path / "data")
    result = train(detector(), data, None, tmp_path / "out", settings())
    assert set(result) == {"trainable_params", "seconds_per_iter", "peak_bytes"}
    assert [entry["iteration"] for entry in history(tmp_path / "out")] == [1, 2, 3, 4, 5]
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pt", detector())["iteration"] == 5
    assert Run.read(tmp_path / "out").data["val"] is None
    # They may come later: what is trained already is evaluated then.
    result = train(detector(), data, data, tmp_path / "out", settings(), resume=True)
    assert result["mask_ap"] >= 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", SMALL_HEADS)
def test_training_with_amp_moves_the_weights_and_resumes(tmp_path, kind, dtype):
    data = coco(tmp_path, masks=DETECTORS[kind].masks)
    config = settings(iterations=3, amp=dtype, eval_period=None)
    model = detector(kind=kind)
    before = copy.deepcopy(model.state_dict())
    train(model, data, data, tmp_path, config)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any("head" in name for name in moved) and any("highway" in name for name in moved)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    train(detector(kind=kind), data, data, tmp_path, config, resume=True)


def test_a_failed_evaluation_loses_nothing_trained(tmp_path):
    data = coco(tmp_path / "data")

    class Unreadable(CocoInstances):
        def image(self, index):
            raise OSError("no such image")

    config = settings(eval_period=None)
    with pytest.raises(OSError, match="no such image"):
        train(detector(), data, Unreadable(data.path, data.folder), tmp_path / "run", config)
    with (tmp_path / "run" / "metrics.json").open("a") as file:
        file.write('{"iteration": 5, "lo')  # a line whose writing was interrupted
    result = train(detector(seed=1), data, data, tmp_path / "run", config, resume=True)
    assert result["mask_ap"] >= 0
    assert [e["iteration"] for e in history(tmp_path / "run")] == [1, 2, 3, 4, 5, 5]
    assert "mask_ap" in history(tmp_path / "run")[-1]


def test_a_new_run_does_not_go_on_from_an_old_ones_checkpoint(tmp_path):
    data = coco(tmp_path / "data")
    train(detector(), data, data, tmp_path, settings(iterations=2, warmup=0))
    broken = detector()
    torch.nn.init.constant_(broken.rpn.head.cls_logits.bias, float("nan"))
    with pytest.raises(FloatingPointError):
        train(broken, data, data, tmp_path, settings(iterations=3))
    assert not (tmp_path / "checkpoint.pt").exists()
    assert Run.read(tmp_path).config.iterations == 3
    assert (
        yaml.safe_load((tmp_path / "config.previous.yaml").read_text())["config"]["iterations"] == 2
    )
    assert load_checkpoint(tmp_path / "checkpoint.previous.pt", detector())["iteration"] == 2


def test_bad_runs_are_refused(tmp_path):
    data = coco(tmp_path / "data")

    def run(train_data=data, model=None, val_data=data):
        train(model or detector(), train_data, val_data, tmp_path / "out", settings())

    path = coco_tree(tmp_path / "empty", images=1)
    empty = CocoInstances(path, tmp_path / "empty", keep_empty=False)
    with pytest.raises(ValueError, match="no image to train on"):
        run(empty)
    path.write_text(path.read_text().replace("wide", "broad"))
    with pytest.raises(ValueError, match=r"different classes.*broad.*wide"):
        run(CocoInstances(path, tmp_path / "empty"))
    with pytest.raises(ValueError, match="no instance to find"):
        bare = json.loads(data.path.read_text()) | {"annotations": []}
        (data.folder / "bare.json").write_text(json.dumps(bare))
        run(val_data=CocoInstances(data.folder / "bare.json", data.folder))
    with pytest.raises(ValueError, match=r"read without masks: a Mask R-CNN needs them"):
        run(CocoInstances(data.path, data.folder, masks=False))
    with pytest.raises(ValueError, match=r"read with masks, but the detector predicts none"):
        run(model=detector(kind="retinanet"))
    assert not (tmp_path / "out").exists()
    broken = detector()
    torch.nn.init.constant_(broken.rpn.head.cls_logits.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="iteration 1"):
        run(model=broken)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_schedule_warms_up_and_ends_near_zero():
    rates = [schedule(i, 10, 3) for i in range(10)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == sorted(rates[3:], reverse=True) and 0 < rates[-1] < 0.06
    assert schedule(0, 1, 0) == 1


def test_a_few_steps_lower_the_loss(tmp_path):
    data = coco(tmp_path / "data", images=8)
    train(detector(), data, None, tmp_path / "out", settings(iterations=40, lr=3e-3, warmup=5))
    losses = [entry["loss"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
