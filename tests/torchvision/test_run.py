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
from e3va.runs.folder import read_metrics
from e3va.torchvision import ModelConfig, TrainConfig, detect, load_run
from e3va.torchvision.config import fixed_settings, from_json, set_fields
from e3va.torchvision.engine import _data, read_config
from e3va.torchvision.model import DETECTORS
from e3va.torchvision.run import Run, build_model
from e3va.torchvision.train import train

CONFIG = TrainConfig(iterations=9, model=ModelConfig(weights="w"))


def test_pairs_set_every_kind_of_setting():
    words = "min_size 480,640 lr 3e-4 horizontal_flip false amp bfloat16 detector retinanet"
    words += " eval_period 4 options.tap output options.kernel_dim 4 max_size 999"
    words += " detector_options.mask_channels 64,32 anchor_sizes 8 trunk_precision none"
    assert set_fields(CONFIG, words.split()) == TrainConfig(
        iterations=9,
        lr=3e-4,
        horizontal_flip=False,
        amp="bfloat16",
        eval_period=4,
        model=ModelConfig(
            weights="w",
            min_size=(480, 640),
            max_size=999,
            anchor_sizes=(8,),
            detector="retinanet",
            options={"tap": "output", "kernel_dim": 4},
            detector_options={"mask_channels": (64, 32)},
        ),
    )
    assert set_fields(CONFIG, []) == CONFIG


def test_options_are_those_of_the_method():
    highway = set_fields(CONFIG, ["options.kernel_dim", "4"])
    more = set_fields(highway, ["options.branches", "1"])
    assert more.model.options == {"kernel_dim": 4, "branches": 1}
    assert set_fields(highway, ["options", "{'branches': 1}"]).model.options == {"branches": 1}
    for words in ("method lora options.rank 4", "options.rank 4 method lora"):
        assert set_fields(highway, words.split()).model.options == {"rank": 4}
    assert set_fields(highway, ["method", "frozen"]).model.options == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("detector yolo", "detector must be of .*retinanet"),
        ("method magic", "method must be of .*lora"),
        ("options tap", "options must be of Mapping, got 'tap'"),
        ("option.tap output", "no setting 'option'"),
        ("lr.highway 1", "lr has no settings of its own"),
        ("batch_size two", "batch_size must be of int, got 'two'"),
        ("batch_size", "NAME VALUE"),
    ],
)
def test_what_is_no_setting_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        set_fields(CONFIG, words.split())


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
    config = set_fields(CONFIG, ["min_size", "480,640", "detector_options.mask_channels", "64,32"])
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    assert json.dumps(fixed_settings(from_json(TrainConfig, content))) == json.dumps(
        fixed_settings(config)
    )
    bare = TrainConfig(iterations=3)
    assert from_json(TrainConfig, json.loads(json.dumps(dataclasses.asdict(bare)))) == bare


def test_a_resumed_run_may_change_where_and_how_often_but_not_what():
    free = {f.name for kind in (TrainConfig, ModelConfig) for f in dataclasses.fields(kind)}
    free -= set(fixed_settings(CONFIG))
    assert free == {
        *("weights", "iterations", "eval_period", "checkpoint_period", "workers", "device"),
        *("model", "keep_empty"),
    }


@pytest.fixture
def trunk(tmp_path):
    path = tmp_path / "trunk.safetensors"
    save_file(e3va.trunks.Swin(e3va.trunk_config("swin_digits")).state_dict(), path)
    return path


SMALL = "min_size 64 max_size 96 out_channels 16 anchor_sizes 8,16,32,64,96 batch_size 1 device cpu"
HEADS = {
    "mask_rcnn": {"representation_size": 16, "mask_channels": (8,), "box_batch_size_per_image": 16},
    "faster_rcnn": {"representation_size": 16},
    "retinanet": {},
}


def run(data, output, kind, trunk, *words):
    """Train a narrow detector by the command."""
    task = "masks" if DETECTORS[kind].masks else "boxes"
    arguments = ["train", str(data), "--engine", "torchvision", "--output", str(output)]
    arguments += ["--model", f"{kind}_swin_digits", "--weights", str(trunk), "--task", task]
    arguments += ["--val", str(data), *words, *SMALL.split(), "detector_options", str(HEADS[kind])]
    return cli.main(arguments)


@pytest.mark.parametrize("kind", HEADS)
def test_a_run_is_rebuilt_from_its_folder(tmp_path, trunk, capsys, kind):
    path, out = coco_tree(tmp_path / "data"), tmp_path / "out"
    words = ["options.kernel_dim", "4", "amp", "bfloat16"]
    assert run(path, out, kind, trunk, "--iterations", "1", *words) == 0
    assert run(path, out, kind, trunk, "--iterations", "2", "--resume", *words) == 0
    capsys.readouterr()
    (*_, report) = [line for line in read_metrics(out / "metrics.json") if "box_ap" in line]
    assert report["iteration"] == 2 and ("mask_ap" in report) == DETECTORS[kind].masks
    assert cli.main(["eval", str(out)]) == 0
    scores = json.loads((out / "evaluation.json").read_text())
    assert scores and scores.items() <= report.items()
    model, loaded = load_run(out)
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 96)
    anchors = model.anchor_generator if kind == "retinanet" else model.rpn.anchor_generator
    assert [sizes[0] for sizes in anchors.sizes] == [8, 16, 32, 64, 96]
    assert not model.training and loaded.classes == ["tall", "wide"]
    assert loaded.config.iterations == 2 and loaded.config.model.options["kernel_dim"] == 4
    assert loaded.data["val"] == {
        "annotations": str(out / "data/val.json"),
        "images": str(out / "data"),
        "masks": DETECTORS[kind].masks,
    }
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    state = model.state_dict()
    assert saved and all(torch.equal(state[name], value) for name, value in saved.items())
    data = coco(tmp_path / "data", masks=DETECTORS[kind].masks)
    assert detect(model, data, "cpu") == detect(load_run(out)[0], data, "cpu")

    other = e3va.trunks.Swin(e3va.trunk_config("swin_digits"))
    save_file(other.state_dict(), trunk)
    with pytest.raises(ValueError, match="frozen trunk"):
        load_run(out)


def test_images_without_an_instance_can_be_left_out(tmp_path, trunk):
    path = coco_tree(tmp_path / "data")
    counts = []
    for keep in ("true", "false"):
        out = tmp_path / keep
        assert run(path, out, "retinanet", trunk, "--dry-run", "keep_empty", keep) == 0
        config = read_config(out)
        assert config.keep_empty == (keep == "true")
        counts.append([len(data) for data in _data(config, out)])
    (all_, val), (full, val_too) = counts
    assert full < all_ == val == val_too  # all are evaluated on


def test_scores_need_data_of_the_same_classes(tmp_path, trunk, capsys):
    path, out = coco_tree(tmp_path / "data"), tmp_path / "out"
    data = coco(tmp_path / "data", masks=False)
    words = [*SMALL.split(), "detector", "retinanet", "variant", "swin_digits"]
    config = set_fields(CONFIG, [*words, "weights", str(trunk), "iterations", "1"])
    train(build_model(config.model, 3), data, None, out, config)
    assert cli.main(["eval", str(out)]) == 2
    assert "was trained without validation data: name some" in capsys.readouterr().err
    path.write_text(path.read_text().replace("wide", "broad"))
    assert cli.main(["eval", str(out), str(path)]) == 2
    error = capsys.readouterr().err
    assert (
        "have the classes 'tall', 'broad', but" in error and "has trained 'tall', 'wide'" in error
    )


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
        with pytest.raises(ValueError, match=r"config\.yaml is damaged, of another version, or"):
            load_run(tmp_path)
