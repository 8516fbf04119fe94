"""A resumed run goes on as if nothing had been."""

import logging
import math
import re

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.utils.env import seed_all_rng

from e3va.detectron2 import Trainer
from e3va.detectron2.solver import build_optimizer
from tests.detectron2.factories import (
    AVERAGEABLE,
    SEMANTIC,
    TWO,
    VOC,
    assert_same,
    maps_only,
    read,
    registered,
    state,
    train,
    voc_only,
)


@pytest.mark.parametrize(
    "more",
    [
        ("SOLVER.EMA.DECAY", 0.9, "SOLVER.ACCUMULATE", 2),
        ("SEED", -1, "DATALOADER.NUM_WORKERS", 2, "DATALOADER.ASPECT_RATIO_GROUPING", False),
        # All of Mask R-CNN takes half a minute in float16 on a CPU.
        ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16", *AVERAGEABLE, *TWO),
        ("MODEL.TUNING.METHOD", "full", "MODEL.TUNING.FULL.DROP_PATH", 0.5),
        ("SOLVER.OPTIMIZER", "ADAMW8BIT"),
    ],
    ids=["e3va", "unseeded", "float16", "full", "eight bits"],
)
def test_resuming_repeats_the_uninterrupted_run(tmp_path, packaged, more):
    if "ADAMW8BIT" in more:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing")
    random = ["INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", (40, 48, 64)]
    cfg = packaged("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, *random, *more)
    assert_resumes(cfg, tmp_path / "out")


@pytest.mark.parametrize("track", ["boxes", "maps"])
def test_resuming_on_boxes_and_maps(tmp_path, track):
    """RetinaNet's running mean goes on too; crops and colours are drawn again."""
    random = {"INPUT.RANDOM_FLIP": "horizontal", "INPUT.MIN_SIZE_TRAIN": (40, 48, 64)}
    periods = {"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 3, "SOLVER.WARMUP_ITERS": 0}
    if track == "boxes":
        cfg = registered(VOC, tmp_path, **random, **periods, **voc_only(tmp_path))
    else:
        random |= {"INPUT.COLOR_JITTER": 0.5, "INPUT.CROP.ENABLED": True}
        random |= {"INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [32, 32]}
        cfg = registered(SEMANTIC, tmp_path, **random, **periods, **maps_only(tmp_path))
    assert_resumes(cfg, tmp_path / "out")


def assert_resumes(cfg, out):
    """From half-way on, to the same checkpoint."""
    train(cfg)
    wanted = read(out / "model_final.pth")
    half = read(out / "model_0000002.pth")
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").write_text("model_0000002.pth")

    seed_all_rng(99)
    train(cfg, resume=True)
    resumed = read(out / "model_final.pth")
    assert_same(wanted, resumed)
    assert any(not torch.equal(v, half["model"][n]) for n, v in resumed["model"].items())


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (["MODEL.TUNING.METHOD", "frozen"], [], "48 tensors are trained now that were not then"),
        (["MODEL.TUNING.METHOD", "full"], [], "no longer trained"),
        ([], ["MODEL.TUNING.METHOD", "full"], "trained now that were not then.*no longer trained"),
        ([], ["MODEL.HIGHWAY.KERNEL_DIM", 8], "32 tensors are of another shape"),
        ([], ["SOLVER.OPTIMIZER", "SGD"], "it was ADAMW, now it is SGD"),
        ([], ["SOLVER.HIGHWAY_LR_RATIO", 1.0], "grouped otherwise"),
    ],
    ids=["frozen to e3va", "full to e3va", "e3va to full", "kernel", "optimizer", "groups"],
)
def test_resuming_with_something_else_to_train(packaged, caplog, then, now, message):
    ema = ["SOLVER.EMA.DECAY", 0.5]
    before = train(packaged("SOLVER.MAX_ITER", 2, *ema, *then))
    cfg = packaged("SOLVER.MAX_ITER", 4, *ema, *now)
    after = Trainer(cfg)
    fresh = state(after.model)
    after.resume_or_load(resume=True)
    (warning,) = (
        r.getMessage()
        for r in caplog.records
        if r.levelno == logging.WARNING and r.name == "e3va.detectron2.train"
    )
    assert "The optimizer starts afresh at iteration 2: " in warning
    assert re.search(message, warning)
    assert after.start_iter == 2
    assert not after.optimizer.state_dict()["state"]
    old = before.model.state_dict()
    for name, value in after.model.state_dict().items():
        fits = name in old and old[name].shape == value.shape
        if not name.endswith("weight_hash"):
            assert torch.equal(value, old[name] if fits else fresh[name]), name

    rates = [group["lr"] for group in after.optimizer.param_groups]
    factor = 0.5 * (1 + math.cos(math.pi * 2 / 4))
    highest = [group["lr"] for group in build_optimizer(cfg, after.model).param_groups]
    assert rates == pytest.approx([factor * rate for rate in highest])
    after.train()
    assert after.iter == 4
    assert after.average.state_dict().keys() == {
        n for n, p in after.model.named_parameters() if p.requires_grad
    }
