"""The folder of a run: what lies in it, and whose data these are."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("pycocotools")

from e3va.data.folder import open_data
from e3va.runs.folder import check_same_data, folder_for, validation_images, write_data
from tests.runs.factories import write_coco, write_maps, write_yolo

WRITERS = {"masks": write_coco, "boxes": write_yolo, "semantic": write_maps}


@pytest.fixture(params=WRITERS)
def run(request, tmp_path):
    """(task, data, the folder of a run that has their record)."""
    data = WRITERS[request.param](tmp_path / "data")
    write_data(open_data(data), tmp_path / "run/data")
    return request.param, data, tmp_path / "run/data"


def refused(folder, data, message, **options):
    with pytest.raises(ValueError, match=r"run is a run on other data: " + message):
        check_same_data(open_data(data, **options), folder)


def test_the_same_data_are_known_wherever_they_lie(run, tmp_path):
    _, data, folder = run
    check_same_data(open_data(data), folder)
    moved = shutil.move(data, tmp_path / "elsewhere/mine")
    check_same_data(open_data(moved), folder)
    check_same_data(open_data(moved), tmp_path / "no run/data")  # nothing is recorded


def test_another_task_is_named(run, tmp_path):
    task, _, folder = run
    for other in WRITERS.keys() - {task}:
        data = WRITERS[other](tmp_path / other)
        refused(folder, data, rf"task {task}, not {other}; `e3va train .*run --resume`")


def test_masks_are_no_boxes(tmp_path):
    data = write_coco(tmp_path / "data")
    write_data(open_data(data, task="boxes"), tmp_path / "run/data")
    refused(tmp_path / "run/data", data, "task boxes, not masks")


def test_another_split_or_number_is_named(run, tmp_path):
    task, _, folder = run
    data = WRITERS[task](tmp_path / "more", images=7)
    refused(folder, data, r"train image .*\(4 then, \d now\)")
    if task != "masks":  # whose split is its own
        refused(folder, WRITERS[task](tmp_path / "again"), "(train|val) image", seed=3)


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_names_of_as_many_images_are_refused(run, split, tmp_path):
    _, data, folder = run
    opened = open_data(data)
    chosen = opened.splits[split]
    if opened.task == "semantic":
        image, labels = chosen.pairs[0]
        chosen.pairs[0] = (image.with_name("new.jpg"), labels)
    else:
        name = Path(chosen.images[0]["file_name"])
        chosen.images[0]["file_name"] = str(name.with_name("new.jpg"))
    with pytest.raises(ValueError, match=rf"{split} image \S+, not \S*new.jpg; `e3va"):
        check_same_data(opened, folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_annotations_on_the_same_images_are_refused(split, tmp_path):
    data = write_coco(tmp_path / "data")
    write_data(open_data(data), tmp_path / "run/data")
    file = data / {"train": "train", "val": "valid"}[split] / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"][2]["segmentation"][0][0] += 1
    file.write_text(json.dumps(content))
    refused(tmp_path / "run/data", data, rf"{split} annotation .*1\.jpg.* … .*; `e3va")
    with pytest.raises(ValueError) as refusal:
        check_same_data(open_data(data), tmp_path / "run/data")
    one, other = str(refusal.value).partition("; `")[0].split(", not ")
    assert one.rpartition("…")[2] != other.rpartition("…")[2]


def test_other_classes_are_refused(tmp_path):
    data = write_coco(tmp_path / "data")
    write_data(open_data(data), tmp_path / "run/data")
    classes = {"red": "crimson", "green": "green"}
    refused(tmp_path / "run/data", data, "classes red, not crimson", classes=classes)


def test_other_maps_of_the_same_images_are_refused(tmp_path):
    data = write_maps(tmp_path / "data")
    write_data(open_data(data), tmp_path / "run/data")
    opened = open_data(data)
    image, labels = opened.splits["val"].pairs[0]
    opened.splits["val"].pairs[0] = image, labels.with_name("other.png")
    with pytest.raises(ValueError, match=r"val map \S+, not other.png"):
        check_same_data(opened, tmp_path / "run/data")


def test_a_class_that_is_added_is_named(tmp_path):
    data = write_coco(tmp_path / "data")
    write_data(open_data(data, classes={"red": "red"}), tmp_path / "run/data")
    more = {"red": "red", "green": "none"}
    refused(tmp_path / "run/data", data, r"classes None, not none \(1 then, 2 now\)", classes=more)


def test_the_record_of_another_task_does_not_stay(tmp_path):
    for number, task in enumerate((*WRITERS, "masks")):
        data = WRITERS[task](tmp_path / str(number))
        write_data(open_data(data), tmp_path / "run")
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert names == ({"maps.json"} if task == "semantic" else {"train.json", "val.json"})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", "{}".encode("utf-16")], ids=str)
def test_a_damaged_record_is_named(run, content):
    task, data, folder = run
    name = "maps.json" if task == "semantic" else "val.json"
    (folder / name).write_bytes(content)
    for read in (partial(check_same_data, open_data(data)), validation_images):
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            read(folder)


def test_other_data_of_one_name_have_a_folder_of_their_own(run, tmp_path):
    """Be they of another place alone: nobody looks at pixels."""
    task, data, folder = run
    own = open_data(data)
    other = open_data(WRITERS[task](tmp_path / "elsewhere/data"))
    places = [folder_for(d, folder.parent, "data") for d in (own, other)]
    assert places == [folder, folder.parent / "data-2"]
    write_data(other, places[1])
    assert folder_for(other, folder.parent, "data") == places[1]
    more = open_data(WRITERS[task](tmp_path / "again/data", images=6))
    assert folder_for(more, folder.parent, "data") == folder.parent / "data-3"
    for content in ("{", "{}"):  # damaged
        for file in folder.glob("*.json"):
            file.write_text(content)
        assert folder_for(own, folder.parent, "data") == folder.parent / "data-3"
