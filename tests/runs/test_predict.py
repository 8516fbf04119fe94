"""What ``e3va predict`` writes and tells, whatever the model finds."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools")

from e3va.cli import main
from e3va.data.folder import open_data
from e3va.data.maps import Maps
from e3va.runs import commands
from e3va.runs.folder import Found, map_values, write_data
from tests.runs.factories import write_maps


@pytest.fixture
def predict(tmp_path, monkeypatch):
    """Predict on two images with a model that finds the same on each."""
    run, images = tmp_path / "run", tmp_path / "images"
    run.mkdir()
    (run / "config.yaml").write_text("MODEL: {}\n")
    images.mkdir()
    for name in "ab":
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(images / f"{name}.png")

    def call(found, *more):
        engine = SimpleNamespace(
            predictor=lambda folder: lambda pixels: found, classes_of=lambda folder: ["ox", "ant"]
        )
        monkeypatch.setattr(commands, "engine", lambda name: engine)
        assert main(["predict", str(run), str(images), *more]) == 0

    return call


def boxes(*scores):
    return Found([{"label": 1, "bbox": [2, 3, 9, 8], "score": score} for score in scores])


@pytest.mark.parametrize(
    "scores, more, message",
    [
        ((0.9, 0.6, 0.2), (), ": 4 objects at 0.5 or above"),
        ((0.4296, 0.2), (), ": 0 objects at 0.5 or above; the best is 0.42: try --min-score 0.2"),
        ((0.9,), ("--min-score", "0.95"), "0.95 or above; the best is 0.9: try --min-score 0.5"),
        ((), (), ": 0 objects at 0.5 or above"),
    ],
)
def test_the_objects_are_counted(predict, tmp_path, capsys, scores, more, message):
    predict(boxes(*scores), *more)
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"2 pictures and predictions.json are in {tmp_path}/run/predictions")
    assert line.endswith(message)


def test_predictions_lie_with_their_run(predict, tmp_path):
    predict(boxes(0.9))
    entries = json.loads((tmp_path / "run/predictions/predictions.json").read_text())
    assert [len(entry["instances"]) for entry in entries] == [1, 1]
    assert (tmp_path / "run/predictions/a.png").is_file()
    predict(boxes(), "--output", str(tmp_path / "other"))
    assert (tmp_path / "other/a.png").is_file()


def test_maps_have_the_values_of_the_data(predict, tmp_path, capsys):
    labels = np.zeros((20, 30), np.uint8)
    labels[5:] = 1
    file = tmp_path / "run/predictions/a_classes.png"
    for data, expected in ((None, labels), (write_maps(tmp_path / "data"), 255 * labels)):
        if data:
            write_data(open_data(data), tmp_path / "run/data")
        predict(Found(labels=labels))
        assert "objects" not in capsys.readouterr().out
        with Image.open(file) as image:
            assert (np.asarray(image) == expected).all()


def test_values_of_maps_that_are_merged_or_large(tmp_path):
    split = Maps("here", ["a", "b"], {3: 1, 7: 0, 300: 1}, [], [])
    data = SimpleNamespace(task="semantic", splits={"train": split, "val": split})
    write_data(data, tmp_path)
    values = map_values(tmp_path)
    assert values.tolist() == [7, 3] and values.dtype == np.uint8
    split.values = {300: 0, 3: 1}
    write_data(data, tmp_path)
    assert map_values(tmp_path).tolist() == [300, 3]
    split.values = {7: 0, 300: 0, 3: 0, 9: 1}  # in no order
    write_data(data, tmp_path)
    assert map_values(tmp_path).tolist() == [3, 9]
    split.values = {2**16: 0, 3: 1}
    write_data(data, tmp_path)
    assert map_values(tmp_path) is None
    split.values = {300: 0, 3: 1}
    write_data(data, tmp_path)
    Image.fromarray(map_values(tmp_path)[None]).save(tmp_path / "wide.png")
    with Image.open(tmp_path / "wide.png") as image:
        assert np.asarray(image).tolist() == [[300, 3]]
