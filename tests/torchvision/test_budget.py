"""What is traced on shapes alone is what a real step of torchvision's detectors takes."""

import json
import logging
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from e3va.budget import cards, report
from e3va.cli import main
from e3va.measure import step_split
from e3va.optim import has_adamw8bit
from e3va.torchvision import ModelConfig, TrainConfig
from e3va.torchvision.budget import Setup, sample, step
from e3va.torchvision.run import build_model
from e3va.torchvision.step import build_optimizer
from tests.data.conftest import coco, coco_tree
from tests.traces import assert_near

EIGHT = {"optimizer": "adamw8bit"}
HALF = {"amp": "bfloat16", "trunk_dtype": "bfloat16"}


def settings(detector, method, **more):
    """Of a training of a detector over Swin-T."""
    model = {"detector": detector, "method": method, "variant": "swin_t", "weights": ""}
    model |= {name: more.pop(name) for name in ModelConfig.__annotations__ if name in more}
    return TrainConfig(iterations=1, model=ModelConfig(**model), **more)


def real_split(config, size, images, of=None):
    """The bytes of a real step, of which few regions are positive, as in a trace."""
    torch.manual_seed(1)
    model = build_model(config.model, 81, pretrained=False).train()
    model.transform.min_size, model.transform.max_size = (min(size),), max(size)
    optimizer = build_optimizer(config, model)
    batch = [sample(config.model.detector, *(of or size), 8, 80)] * images
    return step_split(model, lambda: step(model, optimizer, batch, config), optimizer)


@pytest.mark.parametrize(
    ("detector", "method", "size", "images", "more"),
    [
        ("mask_rcnn", "e3va", (160, 224), 1, {}),
        ("mask_rcnn", "e3va", (97, 131), 2, {"options": {"storage": "full"}}),
        ("mask_rcnn", "full", (128, 160), 1, {}),
        ("faster_rcnn", "mona", (160, 160), 1, EIGHT),
        ("faster_rcnn", "frozen", (160, 224), 2, HALF),
        ("retinanet", "e3va", (160, 256), 1, HALF),
        ("retinanet", "partial1", (128, 96), 2, {}),
    ],
)
def test_a_traced_step_takes_what_a_real_one_does(detector, method, size, images, more):
    if "optimizer" in more:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: left untested")
    config = settings(detector, method, **more)
    real, traced = real_split(config, size, images), Setup(config).split(images, size)
    assert_near(traced, real)


def test_images_and_masks_are_counted_as_they_come():
    """They are on the device before the detector resizes them: three numbers in float32 for a pixel
    of an image, and a byte of each of its eight masks."""
    config, size, of = settings("mask_rcnn", "frozen"), (96, 128), (960, 1280)
    real = real_split(config, size, 2, of)
    traced = Setup(config, pixels=of[0] * of[1]).split(2, size)
    assert {**traced, "heads": 0} == {**real, "heads": 0}
    few, pixels = Setup(config).split(2, size), 2 * (of[0] * of[1] - size[0] * size[1])
    assert traced["loss_and_data"] - few["loss_and_data"] == pixels * (3 * 4 + 8)


def test_the_largest_step_of_some_data(tmp_path):
    """Of images that are padded to each other's sides, unless each is alone."""
    data = coco(tmp_path)
    data._images[0] |= {"height": 120, "width": 60}
    config = settings("mask_rcnn", "e3va", min_size=(96,), max_size=144, batch_size=2)
    setup, images, size = Setup.of_data(config, data)
    assert (images, size) == (2, (144, 128))  # 60×80 becomes 96×128, 120×60 144×72
    assert setup._pixels == 120 * 60 and setup._instances == 3
    assert Setup.of_data(replace(config, batch_size=1), data)[2] == (96, 128)


def test_what_makes_a_step_smaller():
    setup = Setup(settings("retinanet", "e3va", options={"storage": "full"}))
    savings = dict(setup.savings())
    wanted = ["amp bfloat16", "trunk_dtype bfloat16", "options.storage int4"]
    wanted += ["optimizer adamw8bit"] if has_adamw8bit() else []
    assert list(savings) == [*wanted, "all of these"]
    bytes_ = {words: sum(s.split(1, (128, 128)).values()) for words, s in savings.items()}
    assert all(bytes_["all of these"] < bytes_[words] for words in wanted)
    before = sum(setup.split(1, (128, 128)).values())
    assert all(bytes_[words] < before for words in wanted[1:])
    half = Setup(settings("retinanet", "lora", **HALF))
    eight = ["optimizer adamw8bit"] if has_adamw8bit() else []
    assert list(dict(half.savings())) == [*eight, "method e3va", *["all of these"] * len(eight)]
    full = half.changed("full")
    assert full.method == "full" and full._config.model.trunk_dtype == "float32"
    assert half.fewer(4, 3) == ("batch_size 3", 3)


def plan(*words):
    return main(["plan", *map(str, words)])


def test_plans_without_detectron2(tmp_path, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.startswith("e3va.detectron2")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    file = tmp_path / "plan.json"
    words = "--model", "swin_digits", "--size", 256, 384, "--batch", 8, "--json", file
    assert plan(*words, "--card", "0.75GB", "options.storage", "full") == 0
    content = json.loads(file.read_text())
    assert not content["fits"] and content["accumulate"] is None
    usable, most = content["usable_bytes"], content["largest_batch"]
    changes = {entry["change"]: entry["total_bytes"] for entry in content["advice"]}
    assert 1 <= most < 8 and changes[f"batch_size {most}"] <= 1.05 * usable
    assert changes["options.storage int4"] < content["total_bytes"]
    assert "does not fit" in capsys.readouterr().out
    assert plan("--config", tmp_path / "no.yaml") == 2
    assert "no config file" in capsys.readouterr().err


def test_plans_of_runs_and_a_warning_before_training(tmp_path, monkeypatch, capsys, caplog):
    """The planned step is that of the run: its classes, its largest image, its batch."""
    coco_tree(tmp_path / "data")
    run, file = tmp_path / "run", tmp_path / "plan.json"
    words = "--val", str(tmp_path / "data"), "--output", str(run), "--model", "swin_digits"
    words += "--engine", "torchvision", "--iterations", "1"
    with monkeypatch.context() as small, caplog.at_level(logging.WARNING):
        small.setattr(cards, "own_memory", lambda: 2**20)
        assert main(["train", str(tmp_path / "data"), *words]) == 0
    (message,) = (r.getMessage() for r in caplog.records if r.name == report.__name__)
    assert "and this machine has 1 MiB for it: try " in message
    needed = int(message.split("takes about ")[1].split()[0])
    images, size = int(message.split()[3]), message.split(" of ")[2].split()[0].split("×")
    config = "--config", run / "config.yaml"
    assert plan(*config, "--size", *size, "--batch", images, "--instances", 3, "--json", file) == 0
    assert json.loads(file.read_text())["total_bytes"] / 2**20 == pytest.approx(needed, rel=0.05)
    capsys.readouterr()
    assert plan(*config, "--engine", "detectron2") == 2
    assert "is a config of torchvision, not of detectron2" in capsys.readouterr().err
    # What is computed at once is the run's batch where nobody says; a run's folder is its config.
    assert plan("--config", run, "--method", "full", "--json", file) == 0
    assert json.loads(file.read_text())["images"] == images
    assert plan("--config", run, "trunk_dtype", "bfloat16", "method", "full") == 2
    assert "which is stored in float32" in capsys.readouterr().err
    text = (run / "config.yaml").read_text()
    for old, new, message in (
        ("trunk_dtype: float32", "trunk_dtype: foo", "trunk_dtype must be of float32, bfloat16"),
        ("max_size: 214", "max_size: 0", "max_size must be at least 1, got 0"),
        ("anchor_sizes:", "anchor_sizes: 3\n    x:", "damaged"),
        ("optimizer: adamw", "optimizer: 3", "optimizer must be of adamw, adamw8bit, got 3"),
    ):
        assert text.count(old) == 1
        (run / "config.yaml").write_text(text.replace(old, new))
        assert plan(*config) == 2
        assert message in capsys.readouterr().err
    for wrong, message in (
        (("--model", "swin_t", "--size", 10**6, 64), "of 16384 pixels a side"),
        (("--model", "swin_t", "--batch", 1000, "--size", 64, 64), "at most 256 images"),
        (("--model", "swin_t", "--json", tmp_path), "is a folder"),
        (("--model", "swin_t", "--compare", tmp_path / "bars.txt"), "a picture's name ends with"),
        (("--model", "swin_t", "--card", "1" * 400 + "GB"), "unknown card"),
        (("--model", "upernet_swin_t"), "by Detectron2 alone"),
        (("--model", "swin_t", "lr", "-1"), "lr must be positive"),
        (("--model", "swin_t", "optimiser", "adamw"), "did you mean optimizer"),
    ):
        assert plan(*wrong, "--engine", "torchvision") == 2
        out, err = capsys.readouterr()
        assert message in err and not out
