"""The commands of ``e3va`` that work on files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from e3va import open_trunk, save_trunk, trunk_config
from e3va.cli import main
from e3va.trunks import FrozenSwin
from e3va.weights import trunk_hash

CONFIG = Path(__file__).parents[1] / "detectron2_configs/digits/mask_rcnn_e3va.yaml"


def test_convert_finds_the_variant_and_keeps_the_hash(tmp_path, capsys):
    trunk = FrozenSwin(trunk_config("swin_digits"))
    source, target = tmp_path / "microsoft.pth", tmp_path / "ours.safetensors"
    # With "model" around it and a head, as the official files have them.
    head = {"head.weight": torch.zeros(10, 256)}
    torch.save({"model": dict(trunk.named_parameters()) | head}, source)
    assert main(["convert", str(source), str(target), "--dtype", "bfloat16"]) == 0
    assert "embed_dim=32" in capsys.readouterr().out
    converted = open_trunk(target)
    assert trunk_hash(converted) == trunk_hash(open_trunk(source)) == trunk_hash(trunk)
    for name, value in trunk.named_parameters():
        assert torch.equal(converted.get_parameter(name), value.bfloat16().float()), name


def test_convert_names_what_is_wrong(tmp_path, capsys):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    source = str(tmp_path / "other.safetensors")
    assert main(["convert", source, str(tmp_path / "x.safetensors")]) == 2
    assert f"error: {source} holds no trunk" in capsys.readouterr().err
    trunk = FrozenSwin(trunk_config("swin_digits"))
    save_trunk(trunk, tmp_path / "ours.safetensors")
    assert main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "ours.pth")]) == 2
    assert "saved as .safetensors" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of the digits config as training leaves it, but with random weights."""
    pytest.importorskip("detectron2", reason="Detectron2 is missing: predict is left untested")
    from detectron2.modeling import build_model

    from e3va.detectron2 import SafeCheckpointer, load_config

    cfg = load_config(str(CONFIG), ["MODEL.DEVICE", "cpu", "DATASETS.TEST", ()])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.DATASETS.COCO_JSON.TRAIN_JSON = cfg.DATASETS.COCO_JSON.TEST_JSON = "gone.json"
    torch.manual_seed(0)
    model = build_model(cfg)
    folder = tmp_path_factory.mktemp("trained")
    SafeCheckpointer(model, str(folder), trunk_source=cfg.MODEL.TRUNK.WEIGHTS).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return model.eval(), folder


@pytest.mark.parametrize(
    "words, message",
    [
        ("data x --clases a", "unrecognized argument --clases: did you mean --classes?"),
        (
            "train x --itertions=5",
            "unrecognized argument --itertions=5: did you mean --iterations?",
        ),
        ("train x lr 1 --zz", "unrecognized argument --zz (see e3va train --help)"),
        ("data x y", "unrecognized argument y (see e3va data --help)"),
        ("data x --task mask", "argument --task: invalid choice: 'mask'"),
        ("train x --engine torchvison", "argument --engine: invalid choice: 'torchvison'"),
        ("trian x", "invalid choice: 'trian'"),
        ("eval", "the following arguments are required: RUN"),
        ("", "the following arguments are required: command"),
    ],
)
def test_what_is_mistyped_ends_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def write_images(folder):
    sizes = {"wide.jpg": (53, 90), "tall.png": (71, 40)}
    for name, size in sizes.items():
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return sizes


def predict(folder, *more):
    return main(["predict", str(folder), *map(str, more)])


def test_predict_writes_pictures_and_json(trained, tmp_path):
    _, folder = trained
    sizes = write_images(tmp_path)
    out, files = tmp_path / "out", [tmp_path / name for name in sizes]
    assert predict(folder, *files, "--output", out, "--min-score", "0.0") == 0
    entries = json.loads((out / "predictions.json").read_text())
    assert [Path(e["file_name"]).name for e in entries] == list(sizes)
    for entry, (name, size) in zip(entries, sizes.items(), strict=True):
        assert (entry["height"], entry["width"]) == size
        with Image.open(out / f"{Path(name).stem}.png") as picture:
            assert picture.size == ((720, 424) if name == "wide.jpg" else (400, 710))
        assert entry["instances"]
        for found in entry["instances"]:
            assert found["segmentation"]["size"] == list(size)
            x, y, w, h = found["bbox"]
            assert x >= 0 and y >= 0 and x + w <= size[1] + 1e-3 and y + h <= size[0] + 1e-3
    assert predict(folder, files[0], "--output", out, "--min-score", "1") == 0
    (none,) = json.loads((out / "predictions.json").read_text())
    assert none["instances"] == []


@pytest.mark.parametrize(
    ("classes", "test", "expected"),
    [
        (["ant", "bee", "cat"], (), ["ant", "bee", "cat"]),
        (["ant", "bee", "cat"], ("coco_2017_val",), ["ant", "bee", "cat"]),
        ([], ("coco_2017_val",), ["person", "bicycle", "car"]),
        ([], ("nobody_registered_it",), ["0", "1", "2"]),
    ],
)
def test_predict_names_the_classes_without_the_data(trained, tmp_path, classes, test, expected):
    _, folder = trained
    run = shutil.copytree(folder, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["DATASETS"] |= {"CLASSES": classes, "TEST": test}
    (run / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    write_images(tmp_path)
    arguments = tmp_path / "wide.jpg", "--output", tmp_path / "out", "--min-score", "0.0"
    assert predict(run, *arguments) == 0
    (entry,) = json.loads((tmp_path / "out/predictions.json").read_text())
    found = {instance["category"] for instance in entry["instances"]}
    assert found
    assert found <= set(expected)


def test_predict_names_what_is_wrong(trained, tmp_path, capsys):
    _, folder = trained
    assert predict(folder, tmp_path / "nowhere.jpg") == 2
    assert "no image at" in capsys.readouterr().err
    write_images(tmp_path)
    (tmp_path / "b").mkdir()
    write_images(tmp_path / "b")
    assert predict(folder, tmp_path / "wide.jpg", tmp_path / "b/wide.jpg") == 2
    assert "have one name" in capsys.readouterr().err
    assert predict(tmp_path, tmp_path / "wide.jpg") == 2
    assert "is no folder of a run" in capsys.readouterr().err
    (tmp_path / "text.tif").write_text("no image")
    (tmp_path / "photo.png").write_bytes((tmp_path / "tall.png").read_bytes()[:99])
    for name in ("text.tif", "photo.png"):  # beside one that could be predicted on
        out = tmp_path / "out"
        assert predict(folder, tmp_path / "wide.jpg", tmp_path / name, "--output", out) == 2
        assert name in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_export_needs_no_other_weights(trained, tmp_path, suffix, capsys):
    from e3va.detectron2 import load_config
    from e3va.detectron2.inference import load_model

    model, folder = trained
    target = tmp_path / f"whole{suffix}"
    assert main(["export", str(folder), str(target)]) == 0
    alone = ["MODEL.TRUNK.WEIGHTS", "", "MODEL.WEIGHTS", str(target)]
    loaded = load_model(load_config(str(folder / "config.yaml"), alone))
    for (name, value), other in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    if suffix == ".safetensors":
        assert load_file(target).keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=r"another model: 6 tensors have other shapes"):
        load_model(load_config(str(CONFIG), ["MODEL.DEVICE", "cpu", *alone]))
    other = ["MODEL.TUNING.METHOD", "lorand", *alone]
    with pytest.raises(ValueError, match=r"another model: 1\d\d tensors are missing"):
        load_model(load_config(str(folder / "config.yaml"), other))
    assert main(["export", str(folder), str(tmp_path / "whole.onnx")]) == 2
    assert "exported as .safetensors or .pth" in capsys.readouterr().err


def test_what_cannot_be_written_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file/a.safetensors", Path("/proc/a.safetensors")):
        assert main(["convert", "e3va://swin_digits.safetensors", str(target)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


def test_a_reader_that_goes_away_ends_it_quietly():
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-m", "e3va", "info"],
        env=buffered,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1
