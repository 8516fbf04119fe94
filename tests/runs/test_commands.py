"""One command from a folder of data to pictures, by either engine."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from e3va.cli import main
from e3va.data import coco_json
from e3va.data.folder import open_data
from e3va.runs import commands
from e3va.runs.pictures import enlarged
from tests.runs.factories import write_coco, write_maps, write_yolo

WRITERS = {"masks": write_coco, "boxes": write_yolo, "semantic": write_maps}
METRICS = {"masks": "mask_ap", "boxes": "box_ap", "semantic": "miou"}
CHECKPOINT_FILES = {"detectron2": "last_checkpoint", "torchvision": "checkpoint.pt"}
KINDS = [
    ("detectron2", "masks", "swin_digits"),
    ("detectron2", "boxes", "retinanet_swin_digits"),
    ("detectron2", "semantic", "swin_digits"),
    ("torchvision", "masks", "swin_digits"),
    ("torchvision", "boxes", "swin_digits"),
]


def train(data, output, engine, model, *more):
    if engine == "detectron2":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    return main(
        [
            *("train", str(data), "--output", str(output), "--engine", engine),
            *("--model", model, "--iterations", "2", *more),
        ]
    )


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind[:2]))
def run(request, tmp_path_factory):
    """(engine, task, data, the folder of a run of two iterations)."""
    engine, task, model = request.param
    folder = tmp_path_factory.mktemp("run")
    data = WRITERS[task](folder / "data")
    assert train(data, folder / "out", engine, model) == 0
    return engine, task, data, folder / "out"


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_a_run_holds_what_is_promised(run):
    _, task, _, folder = run
    assert isinstance(yaml.safe_load((folder / "config.yaml").read_text()), dict)
    assert list(folder.glob("model_final.*")) and list(folder.glob("model_best.*"))
    for picture in ("curves.png", "predictions.png", "data.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 100
    steps = [line for line in lines(folder) if "loss" in line]
    assert [line["iteration"] for line in steps] == [1, 2]
    assert all(line["loss"] > 0 and line["lr"] >= 0 for line in steps)
    (score,) = [line for line in lines(folder) if "loss" not in line]
    assert score["iteration"] == 2 and 0 <= score[METRICS[task]] <= 100


@pytest.mark.parametrize("engine", ["detectron2", "torchvision"])
def test_each_file_is_read_once(engine, tmp_path, monkeypatch):
    """The user's, and what the run has of them."""
    read, found = coco_json.read_content, []
    monkeypatch.setattr(coco_json, "read_content", lambda path: (found.append(path), read(path))[1])
    data = write_coco(tmp_path / "data")
    assert train(data, tmp_path / "out", engine, "swin_digits") == 0
    files = [data / f"{split}/_annotations.coco.json" for split in ("train", "valid")]
    files += [tmp_path / f"out/data/{split}.json" for split in ("train", "val")]
    assert sorted(map(str, found)) == sorted(map(str, files))


def test_eval_of_the_run_and_of_other_data(run, tmp_path, capsys, monkeypatch):
    engine, task, _, folder = run
    if engine == "detectron2":  # whose evaluation of maps warns where there is no OpenCV
        from detectron2.evaluation import sem_seg_evaluation

        monkeypatch.setattr(sem_seg_evaluation, "_CV2_IMPORTED", False)
    assert main(["eval", str(folder)]) == 0
    own = json.loads((folder / "evaluation.json").read_text())
    (trained,) = [line for line in lines(folder) if "loss" not in line]
    assert own[METRICS[task]] == pytest.approx(trained[METRICS[task]])
    with Image.open(folder / "predictions.png") as picture:
        picture.load()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "log.txt"}
    other = WRITERS[task](tmp_path / "other")
    capsys.readouterr()
    assert main(["eval", str(folder), str(other)]) == 0
    out, err = capsys.readouterr()
    place = folder / "evaluation/other"
    assert METRICS[task] in out and "Boundary IoU" not in err
    assert f"results: {place}/evaluation.json\npictures: {place}/predictions.png" in out
    assert json.loads((place / "evaluation.json").read_text()).keys() == own.keys()
    assert (place / "predictions.png").is_file()
    before[place / "evaluation.json"] = (place / "evaluation.json").read_bytes()
    assert main(["eval", str(folder), str(WRITERS[task](tmp_path / "elsewhere/other"))]) == 0
    assert (folder / "evaluation/other-2/evaluation.json").is_file()
    for path, content in before.items():  # what is of the run's own data, and the first's, stays
        assert path.read_bytes() == content, path
    if task != "masks":  # there is no split, and nothing is counted twice
        assert "5 images (val 5)" in out
    if task == "boxes":
        assert main(["eval", str(folder), str(other / "data.yaml")]) == 0
        assert (folder / "evaluation/other-data/evaluation.json").is_file()


def test_predict_takes_files_folders_globs_and_names(run, tmp_path, monkeypatch):
    _, task, data, folder = run
    images = tmp_path / "in"
    (images / "deep").mkdir(parents=True)
    source = next(path for path in sorted(data.rglob("*")) if path.suffix in (".jpg", ".png"))
    with Image.open(source) as file:
        pixels = np.asarray(file.convert("RGB"))
    for name in ("a.png", "deep/a.tif", "deep/b.webp"):
        Image.fromarray(pixels).save(images / name)

    def predict(*sources):
        out = tmp_path / "out"
        assert main(["predict", str(folder), *sources, "--output", str(out)]) == 0
        return json.loads((out / "predictions.json").read_text())

    entries = predict(str(images), "--min-score", "0.0")
    assert {Path(e["file_name"]).name for e in entries} == {"a.png", "a.tif", "b.webp"}
    for name in ("a.png", "deep/a.png", "deep/b.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == enlarged(pixels)
    for entry in entries:
        if task == "semantic":
            with Image.open(entry["classes_file"]) as labels:
                assert np.asarray(labels).shape == pixels.shape[:2]
            continue
        assert all(instance["category"] in ("red", "green") for instance in entry["instances"])
        assert all(("segmentation" in i) == (task == "masks") for i in entry["instances"])
    assert len(predict(str(images / "deep/*"))) == 2
    assert len(predict(str(images / "a.png"))) == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{images / 'a.png'}\n\n{images}/deep/b.webp\n"))
    assert len(predict("-")) == 2
    before = (images / "a.png").read_bytes()
    assert main(["predict", str(folder), str(images), "--output", str(images)]) == 2
    assert (images / "a.png").read_bytes() == before


def test_export_holds_the_whole_model(run, tmp_path):
    from safetensors.torch import load_file

    folder = run[-1]
    target = tmp_path / "whole.safetensors"
    assert main(["export", str(folder), str(target)]) == 0
    state = load_file(target)
    assert any("trunk.layers.3.blocks.1.mlp.fc2.weight" in name for name in state)
    assert main(["export", str(folder), str(tmp_path / "whole.pth")]) == 0
    same = torch.load(tmp_path / "whole.pth", weights_only=True)["model"]
    assert same.keys() == state.keys()
    assert main(["export", str(folder), str(tmp_path / "whole.onnx")]) == 2


def test_a_run_can_be_moved(run, tmp_path):
    moved = shutil.move(shutil.copytree(run[-1], tmp_path / "a"), tmp_path / "ünd moved")
    assert main(["eval", str(moved)]) == 0


@pytest.mark.parametrize("engine", ["detectron2", "torchvision"])
def test_a_refused_resume_leaves_the_run_as_it_was(engine, tmp_path, capsys):
    data = write_coco(tmp_path / "data")
    out = tmp_path / "out"
    assert train(data, out, engine, "swin_digits") == 0
    files = (p for p in out.rglob("*") if p.is_file() and p.name != "log.txt")
    before = {path: path.read_bytes() for path in files}
    other = write_coco(tmp_path / "other")
    listed = other / "valid/_annotations.coco.json"
    listed.write_text(listed.read_text().replace('"0.jpg"', '"new.jpg"'))
    (other / "valid/0.jpg").rename(other / "valid/new.jpg")
    longer = ["--resume", "--iterations", "4"]
    for data_of, told in (
        (other, "val image 0.jpg, not new.jpg"),
        (write_maps(tmp_path / "maps"), "task masks, not semantic"),
    ):
        assert train(data_of, out, engine, "swin_digits", *longer) == 2
        assert f"{out} is a run on other data: {told}" in capsys.readouterr().err
    (other,) = CHECKPOINT_FILES.keys() - {engine}
    words = ["train", str(data), "--output", str(out), "--engine", other, "--resume"]
    assert main(words) == 2
    assert f"is a run by {engine}: resume it by --engine {engine}" in capsys.readouterr().err
    for more in (["--method", "frozen"], ["--iterations", "1"]):
        assert train(data, out, engine, "swin_digits", "--resume", *more) == 2
    for path, content in before.items():
        assert path.read_bytes() == content, path


@pytest.mark.parametrize("engine", ["detectron2", "torchvision"])
def test_resume_goes_on_and_nothing_is_overwritten(engine, tmp_path, capsys):
    data = write_coco(tmp_path / "data", encoded=("valid",))
    assert train(data, tmp_path / "out", engine, "swin_digits") == 0
    assert train(data, tmp_path / "out", engine, "swin_digits") == 2
    assert "holds a run already" in capsys.readouterr().err
    before = {p: p.stat().st_mtime_ns for p in sorted((tmp_path / "out").rglob("*"))}
    assert train(data, tmp_path / "out", engine, "swin_digits", "--resume") == 0
    assert "has finished its 2 iterations, and is left as it is" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in sorted((tmp_path / "out").rglob("*"))}
    longer = ["--resume", "--iterations", "4"]
    assert train(data, tmp_path / "out", engine, "swin_digits", *longer) == 0
    steps = [line["iteration"] for line in lines(tmp_path / "out") if "loss" in line]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("engine", ["detectron2", "torchvision"])
def test_a_plan_is_written_edited_and_trained(engine, tmp_path, capsys):
    data, out = write_coco(tmp_path / "data"), tmp_path / "out"
    assert train(data, out, engine, "swin_digits", "--dry-run") == 0
    told = capsys.readouterr().out
    assert f"train by: e3va train {out}" in told and "but for" not in told
    config = (out / "config.yaml").read_text()
    assert "red" in config and (out / "data.png").is_file()
    assert re.search(r"\bcheckpoint_period: 1\n", config, re.IGNORECASE)  # a tenth, rounded up
    assert not list(out.glob("model*")) and not (out / "metrics.json").exists()
    assert train(data, out, engine, "swin_digits") == 2  # what has been edited is not overwritten
    assert f"go on with it by e3va train {out}, or" in capsys.readouterr().err
    before, after = {
        "detectron2": ("MAX_ITER: 2", "MAX_ITER: 3"),
        "torchvision": ("iterations: 2", "iterations: 3"),
    }[engine]
    assert before in config
    pair = {"detectron2": ["SEED", "3"], "torchvision": ["seed", "3"]}[engine]
    given = ["--engine", engine, "--output", str(tmp_path / "b"), "--dry-run", *pair]
    assert main(["train", str(data), "--model", "swin_digits", *given]) == 0
    told = capsys.readouterr().out.split("but for these settings, which were given:\n")[1]
    assert told.startswith(f"  {'  '.join(pair)}\n")
    (out / "config.yaml").write_text(config.replace(before, after))
    assert main(["train", str(out), "--method", "frozen"]) == 2
    assert "and not by --method" in capsys.readouterr().err
    lr = {"detectron2": "SOLVER.BASE_LR", "torchvision": "lr"}[engine]
    capsys.readouterr()
    assert main(["train", str(out), lr, "0.0005"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"trained by {engine}, as {out}/config.yaml says"
    assert told[-1].endswith(f"{out}/predictions.png; on others: e3va predict {out} IMAGES")
    steps = [line for line in lines(out) if "loss" in line]
    assert [line["iteration"] for line in steps] == [1, 2, 3]
    assert max(line["lr"] for line in steps) == pytest.approx(5e-4)
    assert main(["train", str(out)]) == 2
    assert "has begun" in capsys.readouterr().err


def test_overrides_reach_the_engine(tmp_path, capsys):
    data = write_yolo(tmp_path / "data")
    more = ["method", "frozen", "lr", "0.5"]
    assert train(data, tmp_path / "out", "torchvision", "swin_digits", *more) == 0
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())["config"]
    assert (config["model"]["method"], config["lr"]) == ("frozen", 0.5)
    assert train(data, tmp_path / "x", "torchvision", "swin_digits", "no_such", "1") == 2
    assert "no setting 'no_such' (known: iterations" in capsys.readouterr().err
    assert train(data, tmp_path / "x", "torchvision", "swin_digits", "itertions", "1") == 2
    assert "did you mean iterations?" in capsys.readouterr().err


def test_data_alone(tmp_path, capsys):
    data = write_coco(tmp_path / "data")
    report = tmp_path / "report.json"
    page = tmp_path / "page.png"
    assert main(["data", str(data), "--json", str(report), "--output", str(page)]) == 0
    found = json.loads(report.read_text())
    assert (found["format"], found["task"], found["images"]) == ("coco", "masks", 8)
    assert found["classes"] == {"red": 8, "green": 8} and found["dropped"] == {}
    out = capsys.readouterr().out
    assert "coco, for masks: 8 images (train 4, val 4), 16 instances of 2 classes" in out
    with Image.open(page) as image:
        pixels = np.asarray(image)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_the_pictures_of_each_data_are_called_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "a")
    write_yolo(tmp_path / "b.1")
    for data in ("a", "a/", "b.1", "b.1/data.yaml", "a/train/_annotations.coco.json"):
        assert main(["data", data]) == 0
    found = {path.name for path in (tmp_path / "output/data").iterdir()}
    assert found == {"a.png", "b.1.png", "b.1-data.png", "train-_annotations.coco.png"}
    assert main(["data", "a", "--output", "page"]) == 0
    with Image.open("page.png") as image:
        assert image.format == "PNG"


def describe(path, **options):
    return commands.describe(open_data(path, **options))


@pytest.mark.parametrize("write", [write_yolo, write_maps])
def test_the_report_tells_heights_and_widths(write, tmp_path):
    data = write(tmp_path / "data")
    assert "  images 72 pixels high, 96 wide" in describe(data)
    for file in data.rglob("4.*"):
        if file.suffix != ".txt":
            with Image.open(file) as image:
                turned = image.transpose(Image.Transpose.ROTATE_90)
            turned.save(file, quality=95)
    assert "  images 72 to 96 pixels high, 72 to 96 wide" in describe(data)


def test_the_report_counts_images_without_an_instance(tmp_path):
    data, maps = write_yolo(tmp_path / "data"), write_maps(tmp_path / "maps")
    assert "images without" not in describe(data) + describe(maps)
    (data / "labels/0.txt").write_text("")
    (data / "labels/3.txt").unlink()
    assert "  2 images without an instance\n" in describe(data)
    assert "  2 images without an instance\n" in describe(data, hold_out=False)
    (maps / "classes.csv").write_text("value, name\n0, wall\n1, door\n7, unlabelled\n")
    for file in sorted((maps / "masks").iterdir()):
        number = int(file.stem)
        values = np.full((72, 96), 7 if number == 2 else number % 2, np.uint8)
        Image.fromarray(values).save(file)
    assert "  1 images without a labelled pixel\n" in describe(maps)


def test_iterations_are_looked_at_before_the_data(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "nowhere", "--iterations", "-5"])
    assert "--iterations: must be a whole number from 1 on, got -5" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["detectron2", "torchvision"])
def test_a_run_without_a_checkpoint_says_that_it_begins(engine, tmp_path, capsys, monkeypatch):
    data, out = write_coco(tmp_path / "data"), tmp_path / "out"
    assert train(data, out, engine, "swin_digits", "--dry-run") == 0
    monkeypatch.setattr(f"e3va.{engine}.engine.train", lambda *_, resume: {"mask_ap": resume})
    monkeypatch.setattr(commands, "draw_examples", lambda *_: None)
    for name, told in ((None, True), (CHECKPOINT_FILES[engine], False)):
        if name:
            (out / name).touch()
        capsys.readouterr()
        assert main(["train", str(out), "--resume"]) == 0
        assert (f"{out} has no checkpoint yet: from the start" in capsys.readouterr().out) == told


def test_names_of_files_need_not_be_text(tmp_path, monkeypatch):
    data = write_yolo(tmp_path / "data")
    name = os.fsdecode(b"/\xff")
    shutil.copy(data / "images/0.png", f"{data}/images{name}.png")
    Path(f"{data}/labels{name}.txt").write_text("0 0.5 nan 0.1 0.1\n")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["data", str(data), "--output", str(tmp_path / "page.png")]) == 0
    assert b"dropped 1: box without four finite numbers, such as line 1 of" in (
        told := stream.buffer.getvalue()
    )
    assert rb"\udcff.txt" in told


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "nowhere"], "there is no folder or file nowhere"),
        (["data", "nowhere"], "there is no folder or file nowhere"),
        (["train", "nowhere", "--model", "swin_xl"], "unknown model 'swin_xl': a trunk (swin_t,"),
        (["train", "{data}", "--model", "upernet_swin_t"], "'upernet_swin_t' is not for masks"),
        (["train", "{data}", "--task", "semantic"], "is for masks, it cannot be used for semantic"),
        (["train", "{data}", "--classes", "blue"], "has no class 'blue'; it has 'red', 'green'"),
        (["train", "{data}", "--weights", "gone.pth", "--model", "swin_t"], "gone.pth"),
        (["eval", "{data}"], "is no folder of a run"),
        (["predict", "{data}", "nowhere.jpg"], "no image at nowhere.jpg"),
        (["convert", "{data}/gone.pth", "x.safetensors"], "no weights at"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, capsys):
    data = write_coco(tmp_path / "data")
    arguments = [word.format(data=data) for word in arguments]
    if arguments[0] == "train":
        arguments += ["--engine", "torchvision", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["detectron2", "torchvision"])
def test_wrong_weights_leave_no_run(engine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    data, out = write_coco(tmp_path / "data"), tmp_path / "out"
    assert train(data, out, engine, "swin_t", "--weights", "http://127.0.0.1:9/swin.pth") == 2
    assert "error: cannot download http://127.0.0.1:9/swin.pth; the pa" in capsys.readouterr().err
    assert train(data, out, engine, "swin_t", "--weights", "e3va://swin_digits.safetensors") == 2
    assert "looks like swin_digits" in capsys.readouterr().err
    assert train(data, out, engine, "swin_t", "--weights", str(data / "gone.pth")) == 2
    assert "no weights at" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("engine", "settings", "message"),
    [
        ("torchvision", ("detector_options.foo", "1"), "takes no option foo"),
        ("torchvision", ("options.kernel_dim", "0"), "kernel_dim"),
        ("torchvision", ("trunk_dtype", "bfloat16", "method", "full"), "stored in float32"),
        ("torchvision", ("optimizer", "adamw8bit"), "pip install bitsandbytes"),
        ("detectron2", ("MODEL.HIGHWAY.KERNEL_DIM", "0"), "kernel_dim"),
        ("detectron2", ("SOLVER.OPTIMIZER", "LION"), "must be ADAMW, ADAMW8BIT or SGD"),
        ("detectron2", ("SOLVER.OPTIMIZER", "ADAMW8BIT"), "pip install bitsandbytes"),
    ],
)
def test_settings_that_do_not_fit_leave_no_run(
    engine, settings, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    data, out = write_coco(tmp_path / "data"), tmp_path / "out"
    assert train(data, out, engine, "swin_digits", *settings) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not out.exists()


def test_a_trunk_in_eight_bits_is_exported_as_it_can_be(tmp_path, capsys):
    pytest.importorskip("torchao", reason="torchao is missing")
    data, out = write_coco(tmp_path / "data"), tmp_path / "out"
    assert train(data, out, "torchvision", "swin_digits", "trunk_precision", "int8") == 0
    target = tmp_path / "new/whole.safetensors"
    assert main(["export", str(out), str(target)]) == 2
    assert "a trunk in eight bits is exported as .pth" in capsys.readouterr().err
    assert not target.parent.exists()
    assert main(["export", str(out), str(target.with_suffix(".pth"))]) == 0


def test_classes_are_chosen_merged_and_renamed(tmp_path):
    data = write_coco(tmp_path / "data")
    mapping = tmp_path / "classes.yaml"
    mapping.write_text("red: box\ngreen: box\n")
    report = tmp_path / "report.json"
    for classes, expected in (("green", {"green": 8}), (str(mapping), {"box": 16})):
        arguments = [
            "--classes",
            classes,
            "--json",
            str(report),
            "--output",
            str(tmp_path / "p.png"),
        ]
        assert main(["data", str(data), *arguments]) == 0
        assert json.loads(report.read_text())["classes"] == expected


def test_images_of_sixteen_bits_are_seen_as_they_are_meant(tmp_path):
    """Both engines' loaders, on an image that 8 bits would clip to white."""
    from e3va.data.coco import CocoInstances
    from e3va.data.images import read_image

    grey = np.linspace(1000, 60000, 72 * 96).reshape(72, 96).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 72, "width": 96}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "iscrowd": 0}
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    expected = read_image(tmp_path / "a.png")
    assert expected.min() == 0 and expected.max() == 255 and 100 < expected.mean() < 150
    image, _ = CocoInstances(tmp_path / "a.json", tmp_path, masks=False)[0]
    assert torch.equal(
        (image * 255).round().to(torch.uint8), torch.tensor(expected).permute(2, 0, 1)
    )
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from e3va.detectron2.data.mapper import read_pixels

    assert np.array_equal(read_pixels(str(tmp_path / "a.png"), "RGB"), expected)
    assert np.array_equal(read_pixels(str(tmp_path / "a.png"), "BGR"), expected[..., ::-1])
