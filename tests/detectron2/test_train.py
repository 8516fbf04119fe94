"""Steps, accumulated gradients, averaged weights, and the command line."""

import argparse
import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from torch import nn

import train_net
from e3va import trunk_config
from e3va.detectron2 import Trainer, WeightAverage
from e3va.detectron2.step import StepTrainer
from e3va.trunks import FrozenSwin
from tests.detectron2.factories import (
    AVERAGEABLE,
    DIGITS,
    PACKAGED,
    SAME_SIZE,
    assert_close,
    assert_same,
    moves,
    overrides,
    read,
    state,
    step,
    write_coco,
)


def arguments(opts, *, eval_only=False, resume=False):
    return argparse.Namespace(config_file=DIGITS, opts=opts, eval_only=eval_only, resume=resume)


def test_train_evaluate_resume(tmp_path):
    """Three iterations from given trunk weights, then evaluation alone, then two iterations."""
    trunk = dict(FrozenSwin(trunk_config("swin_digits")).named_parameters())
    save_file(trunk, tmp_path / "trunk.safetensors")
    train, test = write_coco(tmp_path / "train"), write_coco(tmp_path / "test")
    opts = overrides(
        tmp_path, train, "MODEL.TRUNK.WEIGHTS", tmp_path / "trunk.safetensors", test=test
    )
    out = tmp_path / "out"

    trained = train_net.main(arguments(opts))
    assert set(trained) == {"bbox", "segm"}
    saved = torch.load(out / "model_final.pth", weights_only=True)
    prefix = "backbone.bottom_up.net."
    assert saved["trunk"]["source"] == str(tmp_path / "trunk.safetensors")
    assert not [name for name in saved["model"] if name.startswith(f"{prefix}trunk.")]
    assert all(saved["model"][f"{prefix}highway.stages.{s}.V"].any() for s in range(4))
    assert saved["iteration"] == 2

    config = (out / "config.yaml").read_text()
    weights = ["MODEL.WEIGHTS", str(out / "model_final.pth")]
    evaluated = train_net.main(arguments(opts + weights, eval_only=True))
    for task in trained:
        assert evaluated[task] == pytest.approx(trained[task], nan_ok=True)
    assert (out / "config.yaml").read_text() == config  # which predict is given

    train_net.main(arguments([*opts, "SOLVER.MAX_ITER", "5"], resume=True))
    assert "Starting training from iteration 3" in (out / "log.txt").read_text()
    resumed = torch.load(out / "model_final.pth", weights_only=True)
    assert resumed["iteration"] == 4
    steps = resumed["trainer"]["_trainer"]["optimizer"]["state"][0]["step"]
    assert steps == 5


def test_only_what_was_trained_is_evaluated(tmp_path):
    def fails(message, *more, resume=False):
        opts = overrides(tmp_path, write_coco(tmp_path / "data"), *more)
        with pytest.raises(ValueError, match=message):
            train_net.main(arguments(opts, eval_only=True, resume=resume))

    fails("--eval-only needs MODEL.WEIGHTS")
    fails(f"a checkpoint in {tmp_path}", resume=True)
    trunk = dict(FrozenSwin(trunk_config("swin_digits")).named_parameters())
    save_file(trunk, tmp_path / "trunk.safetensors")
    fails("of another model: .* are missing", "MODEL.WEIGHTS", tmp_path / "trunk.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_cpu(tiny, dtype):
    trainer = Trainer(tiny("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype))
    assert isinstance(trainer._trainer, StepTrainer)
    seen = []
    bottom_up = trainer.model.backbone.bottom_up
    bottom_up.register_forward_hook(lambda *args: seen.extend(p.dtype for p in args[2].values()))
    trunk = {n: p.clone() for n, p in bottom_up.net.trunk.named_parameters()}
    V = bottom_up.net.highway.stages[0].V.detach().clone()
    for _ in range(8):  # steps are skipped until the loss scale of float16 no longer overflows
        assert np.isfinite(step(trainer)["total_loss"][0])
        if not torch.equal(bottom_up.net.highway.stages[0].V, V):
            break
    else:
        pytest.fail("the highway never moved")
    assert set(seen) == {getattr(torch, dtype)}
    assert all(torch.equal(p, trunk[n]) for n, p in bottom_up.net.trunk.named_parameters())
    scaler = trainer._trainer.state_dict()["grad_scaler"]
    assert bool(scaler) == (dtype == "float16")  # bfloat16 needs no scaling


def test_resume_in_another_precision(tiny):
    """Only float16 has a loss scale to save and restore."""
    amp = "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE"
    configs = tiny(), tiny(*amp, "bfloat16"), tiny(*amp, "float16")
    trainers = [Trainer(cfg)._trainer for cfg in configs]
    trainers[2]._scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for source in trainers:
        source.iter = 0
        for target in trainers:
            target.load_state_dict(source.state_dict())
    resumed = Trainer(configs[2])._trainer
    resumed.load_state_dict(trainers[2].state_dict())
    assert resumed._scaler.get_scale() == 128.0


def test_images_without_annotations_may_be_trained_on(tiny):
    cfg = tiny("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "SOLVER.IMS_PER_BATCH", 4)
    trainer = Trainer(cfg)
    batch = next(iter(trainer.data_loader))
    assert min(len(sample["instances"]) for sample in batch) == 0
    assert np.isfinite(step(trainer)["total_loss"][0])


@pytest.mark.parametrize("clip", ["full_model", "norm"])
def test_accumulation_changes_nothing_but_memory(packaged, clip):
    more = [*AVERAGEABLE, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip]
    more += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01]
    wanted, sizes = moves(packaged(*more, sizes=SAME_SIZE))
    assert sizes == [4]
    for parts in (2, 4):
        got, sizes = moves(packaged(*more, "SOLVER.ACCUMULATE", parts, sizes=SAME_SIZE))
        assert sizes == [4 // parts] * parts
        assert_close(wanted, got, 1e-3)


def test_accumulation_in_float16(packaged):
    """Gradients are unscaled once, before they are clipped."""
    amp = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"]
    clip = ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.1]
    cfg = packaged(*AVERAGEABLE, *amp, *clip, "SOLVER.ACCUMULATE", 2, sizes=SAME_SIZE)
    trainer = Trainer(cfg)
    trainer._trainer._scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    norms = []

    def keep_norm(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(nn.utils.get_total_norm(gradients).item())

    trainer.optimizer.register_step_post_hook(keep_norm)
    trainer.max_iter = 2
    trainer.train()
    assert norms == pytest.approx([0.1, 0.1], rel=1e-3)


@pytest.mark.parametrize(("parts", "spoiled"), [(1, 0), (2, 0), (2, 1)])
def test_a_loss_that_is_not_finite_changes_nothing(packaged, parts, spoiled):
    """Neither weights nor the optimizer's state, though that would step along the backward."""
    more = "SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.IMS_PER_BATCH", 4
    trainer = Trainer(packaged(*more, "SOLVER.ACCUMULATE", parts))
    assert trainer._trainer._early
    step(trainer)
    forwards = []

    def spoil(model, images, losses):
        forwards.append(images)
        if len(forwards) - 1 == spoiled:
            return {name: loss * float("nan") for name, loss in losses.items()}
        return None

    trainer.model.register_forward_hook(spoil)
    before = [state(trainer.model), copy.deepcopy(trainer.optimizer.state_dict())]
    with pytest.raises(FloatingPointError, match="infinite or NaN"):
        step(trainer)
    assert_same(before, [state(trainer.model), trainer.optimizer.state_dict()])


@pytest.mark.parametrize(("batch", "parts"), [(4, 3), (4, 8), (4, 0)])
def test_batches_that_do_not_divide(packaged, batch, parts):
    with pytest.raises(ValueError, match=rf"IMS_PER_BATCH \(4\) must be a multiple .*\({parts}\)"):
        Trainer(packaged("SOLVER.IMS_PER_BATCH", batch, "SOLVER.ACCUMULATE", parts))


def test_average(packaged):
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, 0.5)
    wanted = None
    for iteration in range(12):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2))
        average.update(iteration)
        decay = min(0.5, (1 + iteration) / (10 + iteration))
        own = model.weight.detach().clone()
        wanted = own if wanted is None else decay * wanted + (1 - decay) * own
    assert average.state_dict().keys() == {"weight"}
    torch.testing.assert_close(average.state_dict()["weight"], wanted)
    with average.applied():
        assert torch.equal(model.weight, average.state_dict()["weight"])
    assert torch.equal(model.weight, own)
    with pytest.raises(ValueError, match=r"SOLVER.EMA.DECAY must be in \[0, 1\), got 1.5"):
        Trainer(packaged("SOLVER.EMA.DECAY", 1.5))


def test_averaged_weights_are_evaluated_and_saved(tmp_path, monkeypatch):
    path = write_coco(tmp_path / "data")
    opts = overrides(tmp_path, path, "MODEL.TRUNK.WEIGHTS", PACKAGED, "SOLVER.EMA.DECAY", 0.9)
    tested = []

    def test(cfg, model):
        tested.append(state(model))
        return {}

    monkeypatch.setattr(Trainer, "test", staticmethod(test))

    def run(**options):
        defaults = {"eval_only": False, "resume": False, "config_file": DIGITS}
        train_net.main(argparse.Namespace(**{"opts": opts, **defaults, **options}))

    run()
    saved = read(tmp_path / "out/model_final.pth")
    trained = saved["ema"].keys()
    assert trained <= saved["model"].keys()
    assert all(torch.equal(tested[0][n], saved["ema"][n]) for n in trained)
    assert any(not torch.equal(saved["model"][n], saved["ema"][n]) for n in trained)

    final = ["MODEL.WEIGHTS", str(tmp_path / "out/model_final.pth")]
    run(eval_only=True, resume=True)
    run(eval_only=True, opts=opts + final)
    run(eval_only=True, opts=[*opts, *final, "SOLVER.EMA.DECAY", "0.0"])
    for own in tested[1:3]:
        assert_same(own, tested[0])
    assert all(torch.equal(tested[3][n], v) for n, v in saved["model"].items())
