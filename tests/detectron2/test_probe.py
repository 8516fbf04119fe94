"""What does not fit is known before the first step, which is none the wiser."""

import logging
import random
import re

import numpy as np
import pytest
import torch

from e3va.budget import cards, warn
from e3va.cli import main
from e3va.detectron2 import Trainer, load_config
from e3va.detectron2.budget import Setup, largest, loss, sample_batch
from e3va.measure import CappedBytes, LiveBytes
from e3va.optim import has_adamw8bit
from tests.detectron2.factories import DIGITS, assert_same, packaged, state, write_coco

AUTO = ("SOLVER.ACCUMULATE", "auto", "SOLVER.IMS_PER_BATCH", 4)


def test_a_cap_is_a_full_gpu():
    with CappedBytes(3 * 4096) as memory:
        a = torch.ones(1024)
        b = a + a
        with pytest.raises(torch.OutOfMemoryError, match="4097"):
            torch.ones(4097, dtype=torch.uint8)
        assert memory.live == 2 * 4096
        del b
        torch.ones(2048)


def live(trainer, images):
    """Bytes that a part of so many of the largest images takes."""
    size, instances = largest(trainer.cfg, trainer.data_loader.records)
    batch = sample_batch(trainer.cfg, *size, instances) * images
    with LiveBytes() as memory:
        assert trainer._trainer.probe(batch) is None
    return memory.peak


@pytest.mark.parametrize(("fits", "parts"), [(4, 1), (2, 2), (1, 4)])
def test_auto_finds_the_fewest_parts_that_fit(tmp_path, fits, parts):
    cfg = packaged(tmp_path, *AUTO, "SOLVER.MAX_ITER", 1)
    trainer = Trainer(cfg)
    limit = (live(trainer, fits) + live(trainer, fits + 1)) // 2
    with CappedBytes(limit):
        trainer._fit()
    assert trainer._trainer.accumulate == parts
    assert trainer.images_at_once == fits


def test_what_does_not_fit_at_all_is_said_with_advice(tmp_path):
    trainer = Trainer(packaged(tmp_path, *AUTO, "MODEL.HIGHWAY.STORAGE", "full"))
    with CappedBytes(2**20), pytest.raises(torch.OutOfMemoryError, match=r"1 images of .* try "):
        trainer._fit()


def test_a_probe_changes_nothing(tmp_path):
    trainer = Trainer(packaged(tmp_path))
    before = state(trainer.model)
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert trainer._trainer.probe(sample_batch(trainer.cfg, 64, 96)) is None
    assert_same(state(trainer.model), before)
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    assert np.random.get_state()[1].tolist() == draws[2]
    assert not trainer.optimizer.state
    assert all(p.grad is None for p in trainer.model.parameters())


def test_batch_norms_and_running_means_are_left_alone():
    from detectron2.modeling import build_model

    from e3va.budget.probe import probe

    for name, more in (("upernet", ["MODEL.SEM_SEG_HEAD.NORM", "BN"]), ("retinanet", [])):
        words = ["MODEL.TRUNK.WEIGHTS", "", "MODEL.DEVICE", "cpu", *more]
        cfg = load_config(DIGITS.replace("mask_rcnn", name), words)
        model = build_model(cfg).train()
        optimizer = torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
        before, mean = state(model), getattr(model, "loss_normalizer", None)
        batch = sample_batch(cfg, 64, 64) * 2
        probe(model, lambda m=model, b=batch, c=cfg: loss(m, b, c), optimizer)
        assert_same(state(model), before)
        assert getattr(model, "loss_normalizer", None) == mean


def test_training_is_the_same_with_and_without(tmp_path):
    """As many parts as are found are as many as are asked for, to the last bit, resumed too."""
    results = []
    for name, words in (("auto", ("auto",)), ("one", (1,))):
        cfg = packaged(tmp_path / name, "SOLVER.ACCUMULATE", *words, "SOLVER.MAX_ITER", 2)
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        trainer.train()
        results.append(state(trainer.model))
    assert_same(*results)


def test_a_resumed_run_keeps_its_parts(tmp_path):
    cfg = packaged(tmp_path, *AUTO, "SOLVER.MAX_ITER", 2)
    trainer = Trainer(cfg)
    trainer._trainer.accumulate = 2
    saved = trainer.state_dict()
    again = Trainer(cfg)
    assert again._trainer.accumulate == 0
    again.iter = 0
    again.load_state_dict(saved | {"iteration": 0})
    assert again._trainer.accumulate == 2


def test_the_largest_step_of_some_data():
    cfg = load_config(DIGITS, ["INPUT.MIN_SIZE_TRAIN", (100, 200), "INPUT.MAX_SIZE_TRAIN", 300])
    records = [(100, 300, 2), (50, 60, 7), (300, 150, 1)]
    # Wide: 100×300 and 200×240; high: 300×150.
    assert largest(cfg, records) == ((200, 300), 7)
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    assert largest(cfg, records) == ((300, 150), 7)


def test_a_warning_before_training(tmp_path, monkeypatch, capsys, caplog):
    setup = Setup(packaged(tmp_path), 3)
    with caplog.at_level(logging.WARNING):
        warn(lambda: (setup, 1, (64, 96)), torch.device("cpu"))
        assert not caplog.messages
        monkeypatch.setattr(cards, "own_memory", lambda: 2**20)
        warn(lambda: (setup, 2, (64, 96)), torch.device("cpu"))
    (message,) = (r.getMessage() for r in caplog.records if r.name.startswith("e3va"))
    assert re.match(r"a step of 2 images of 64×96 takes about \d+ MiB, and this mach", message)
    assert re.search(r"has 1 MiB for it: try .*MODEL.TRUNK.DTYPE bfloat16 \(\d+ MiB\)", message)
    assert ("SOLVER.OPTIMIZER ADAMW8BIT" in message) == has_adamw8bit()

    def broken(*_):
        raise RuntimeError("no plan")

    monkeypatch.setattr(Setup, "split", broken)
    folder = write_coco(tmp_path / "more").parent
    words = "--output", str(tmp_path / "run"), "--model", "swin_digits", "--iterations", "1"
    assert main(["train", str(folder), "--val", str(folder), *words]) == 0
    assert "no plan" not in capsys.readouterr().err
