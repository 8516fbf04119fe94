"""The settings of a run: in Python, on the command line and in config.yaml."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

import e3va
from tests.data.conftest import coco, coco_tree
from tests.torchvision.conftest import detector

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from e3va import cli
from e3va.torchvision import ModelConfig, TrainConfig, detect, load_run
from e3va.torchvision.config import fixed_settings, from_arguments, from_json
from e3va.torchvision.model import DETECTORS
from e3va.torchvision.run import Run
from e3va.torchvision.train import _arguments, main, train

NEEDED = [
    "--train-json",
    "a",
    "--train-images",
    "b",
    "--output",
    "c",
    "--iterations",
    "9",
    "--weights",
    "w",
]


def parse(*words):
    return from_arguments(_arguments([*NEEDED, *words]))


def test_the_command_line_has_every_setting_and_its_default():
    assert parse() == TrainConfig(iterations=9, model=ModelConfig(weights="w"))


def test_the_command_line_reads_every_kind_of_setting():
    words = "--min-size 480 640 --lr 3e-4 --no-horizontal-flip --amp bfloat16 --detector retinanet"
    config = parse(
        *words.split(),
        "--eval-period",
        "4",
        "--option",
        "tap=output",
        "--option",
        "kernel_dim=4",
        "--detector-option",
        "mask_channels=64,32",
    )
    assert config == TrainConfig(
        iterations=9,
        lr=3e-4,
        horizontal_flip=False,
        amp="bfloat16",
        eval_period=4,
        model=ModelConfig(
            weights="w",
            min_size=(480, 640),
            detector="retinanet",
            options={"tap": "output", "kernel_dim": 4},
            detector_options={"mask_channels": (64, 32)},
        ),
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--detector", "yolo"],
        ["--method", "magic"],
        ["--option", "tap"],
        ["--val-json", "v.json"],
        ["--batch-size", "two"],
    ],
)
def test_what_the_command_line_does_not_understand_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0].removesuffix("=") in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--iterations", "1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": 0.0}, "lr must be positive, got 0"),
        ({"warmup": 2}, "warmup must be in"),
        ({"eval_period": 0}, "eval_period"),
        ({"checkpoint_period": 0}, "checkpoint_period"),
        ({"amp": "int8"}, "amp must be bfloat16, float16 or None, got 'int8'"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"iterations": 2, **changes})


def test_json_keeps_the_settings():
    config = parse("--min-size", "480", "640", "--detector-option", "mask_channels=64,32")
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    assert json.dumps(fixed_settings(from_json(TrainConfig, content))) == json.dumps(
        fixed_settings(config)
    )
    bare = TrainConfig(iterations=3)
    assert from_json(TrainConfig, json.loads(json.dumps(dataclasses.asdict(bare)))) == bare


def test_a_resumed_run_may_change_where_and_how_often_but_not_what():
    free = {f.name for kind in (TrainConfig, ModelConfig) for f in dataclasses.fields(kind)}
    free -= set(fixed_settings(parse()))
    assert free == {
        "weights", "iterations", "eval_period", "checkpoint_period", "workers", "device", "model"
    }  # fmt: skip


@pytest.fixture
def trunk(tmp_path):
    path = tmp_path / "trunk.safetensors"
    save_file(e3va.trunks.Swin(e3va.trunk_config("swin_digits")).state_dict(), path)
    return path


SMALL = ["--min-size", "64", "--max-size", "96", "--out-channels", "16"]
SMALL += ["--anchor-sizes", *["8", "16", "32", "64", "96"], "--batch-size", "1", "--device", "cpu"]
HEADS = {
    "mask_rcnn": {"representation_size": 16, "mask_channels": (8,), "box_batch_size_per_image": 16},
    "faster_rcnn": {"representation_size": 16},
    "retinanet": {},
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_run_is_rebuilt_from_its_folder(tmp_path, trunk, capsys, kind):
    path = coco_tree(tmp_path / "data")
    words = [*SMALL, "--detector", kind, "--output", str(tmp_path / "out")]
    words += ["--variant", "swin_digits", "--weights", str(trunk), "--amp", "bfloat16"]
    words += ["--option", "kernel_dim=4"]
    for name, value in HEADS[kind].items():
        words += ["--detector-option", f"{name}={value}"]
    for split in ("train", "val"):
        words += [f"--{split}-json", str(path), f"--{split}-images", str(path.parent)]
    main([*words, "--iterations", "1"])
    report = json.loads(capsys.readouterr().out)
    assert {"box_ap", "trainable_params", "seconds_per_iter"} <= set(report)
    assert ("mask_ap" in report) == DETECTORS[kind].masks

    main([*words, "--iterations", "2", "--resume"])
    report = json.loads(capsys.readouterr().out)
    assert cli.main(["eval", str(tmp_path / "out")]) == 0
    scores = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert scores and scores.items() <= report.items()
    model, run = load_run(tmp_path / "out")
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 96)
    anchors = model.anchor_generator if kind == "retinanet" else model.rpn.anchor_generator
    assert [sizes[0] for sizes in anchors.sizes] == [8, 16, 32, 64, 96]
    assert not model.training and run.classes == ["tall", "wide"]
    assert run.config.iterations == 2 and run.config.model.options == {"kernel_dim": 4}
    assert run.data["val"] == {
        "annotations": str(path),
        "images": str(path.parent),
        "masks": DETECTORS[kind].masks,
    }
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["model"]
    state = model.state_dict()
    assert saved and all(torch.equal(state[name], value) for name, value in saved.items())
    data = coco(tmp_path / "data", masks=DETECTORS[kind].masks)
    assert detect(model, data, "cpu") == detect(load_run(tmp_path / "out")[0], data, "cpu")

    other = e3va.trunks.Swin(e3va.trunk_config("swin_digits"))
    save_file(other.state_dict(), trunk)
    with pytest.raises(ValueError, match="frozen trunk"):
        load_run(tmp_path / "out")


def test_scores_need_data_of_the_same_classes(tmp_path, trunk, capsys):
    path = coco_tree(tmp_path / "data")
    words = [*SMALL, "--detector", "retinanet", "--output", str(tmp_path / "out")]
    words += ["--variant", "swin_digits", "--weights", str(trunk), "--iterations", "1"]
    main([*words, "--train-json", str(path), "--train-images", str(path.parent)])
    assert cli.main(["eval", str(tmp_path / "out")]) == 2
    assert "was trained without validation data: name some" in capsys.readouterr().err
    path.write_text(path.read_text().replace("wide", "broad"))
    assert cli.main(["eval", str(tmp_path / "out"), str(path)]) == 2
    error = capsys.readouterr().err
    assert "have the classes tall, broad, but" in error and "has trained tall, wide" in error


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        load_run(tmp_path)
    data = coco(tmp_path / "data")
    train(detector(), data, None, tmp_path, TrainConfig(iterations=1, device="cpu"))
    with pytest.raises(ValueError, match="does not tell what the model was built from"):
        load_run(tmp_path)
    assert Run.read(tmp_path).config == TrainConfig(iterations=1, device="cpu")
    for content in ("{", "{}", '{"config": {"speed": 1}, "classes": [], "data": {}}'):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"config\.yaml is damaged, or of another version"):
            load_run(tmp_path)
