"""YOLO's data.yaml and label files."""

import time

import pytest

from e3va.data.yolo import label_file, read_folder, read_yaml
from tests.data.factories import write_image, write_text, write_yolo

pytest.importorskip("yaml")

BOX = "0 0.25 0.5 0.25 0.5"
TRIANGLE = "1 0.25 0.5 0.5 0.5 0.5 0.75"
DATA = "train: images/train\nval: images/val\nnames: [cat, dog]\n"


def one(tmp_path, text, data=DATA):
    """The training split of one image with a label file."""
    write_yolo(tmp_path, {"train/1": text, "val/2": BOX}, data)
    return read_yaml(tmp_path / "data.yaml")["train"]


def test_boxes_and_polygons(tmp_path):
    boxes = one(tmp_path, BOX + "\n\n 1.0\t0.5 0.5 1 1 \n")
    assert [a["bbox"] for a in boxes.annotations] == [[5, 7.5, 10, 15], [0, 0, 40, 30]]
    assert boxes.counts() == {"cat": 1, "dog": 1} and not boxes.has_masks
    (polygon,) = one(tmp_path, TRIANGLE).annotations
    assert polygon["segmentation"] == [[10, 15, 20, 15, 20, 22.5]]
    assert polygon["bbox"] == [10, 15, 10, 7.5]


def test_boxes_and_polygons_mixed(tmp_path):
    masks = one(tmp_path, "\n".join([BOX, TRIANGLE, TRIANGLE]))
    assert len(masks.annotations) == 2 and masks.dropped == {"no mask": 1}
    boxes = one(tmp_path, "\n".join([BOX, BOX, TRIANGLE]))
    assert [a["bbox"] for a in boxes.annotations][2] == [10, 15, 10, 7.5]
    assert not boxes.has_masks and not boxes.dropped
    wanted = read_yaml(tmp_path / "data.yaml", masks=True)["train"]
    assert len(wanted.annotations) == 1 and wanted.dropped == {"no mask": 2}


@pytest.mark.parametrize(
    "names", ["[cat, dog]", "{0: cat, 1: dog}", "{1: dog, 0: cat}", "{'0': cat, '1': dog}"]
)
@pytest.mark.parametrize("count", ["", "nc: 2\n", "nc: '2'\n"])
def test_names(tmp_path, names, count):
    train = one(tmp_path, BOX, f"train: images/train\n{count}names: {names}\n")
    assert train.classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[]", "no classes"),
        ("cat", "no classes"),
        ("5", "no classes"),
        ("[cat, cat]", "'cat' twice"),
        ("[cat, [dog]]", "a list for 'names'"),
        ("{1: cat, 2: dog}", "must name the classes 0, 1, 2"),
        ("{0: cat, a: dog}", "must name the classes"),
        ("{0: cat, 1000000000: dog}", "must name the classes"),
        ("[cat, dog, ox]\nnc: 2", "nc that is not 3"),
        ("[cat]\nnc: [1]", "nc that is not 1"),
    ],
)
def test_wrong_names(tmp_path, names, message):
    with pytest.raises(ValueError, match=message) as caught:
        one(tmp_path, BOX, f"train: images/train\nnames: {names}\n")
    assert "data.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "train: images/train",
        "- a\n- b",
        "names: [a\n",
        "names: !!python/object/apply:os.system ['touch hacked']\n",
        "names: !!python/name:os.system\n",
        "names: 2001-99-99\n",
        "a: " + "[" * 100_000,
        "\0",
    ],
)
def test_files_that_are_no_data_yaml(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_text(tmp_path / "data.yaml", text)
    with pytest.raises(ValueError, match=r"data\.yaml (is no|names no) "):
        read_yaml(path)
    assert not (tmp_path / "hacked").exists()


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "end", ["names: *a11", "names: [x]\nnc: *a11", "names: [x]\npath: *a11", "names: {0: *a11}"]
)
@pytest.mark.parametrize("split", ["train: images/train", "train: *a11", "train: [*a11]"])
def test_lists_of_lists_are_not_written_out(tmp_path, end, split):
    write_yolo(tmp_path, {"train/1": BOX}, f"{LAUGHS}{end}\n{split}\n")
    started = time.process_time()
    with pytest.raises(ValueError, match=r"data\.yaml (has|names)") as caught:
        read_yaml(tmp_path / "data.yaml")
    assert time.process_time() - started < 2 and len(str(caught.value)) < 400


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
    write_yolo(tmp_path, {"train/1": ""})
    write_text(tmp_path / "labels/train/1.txt", BOX, encoding)
    write_text(tmp_path / "data.yaml", "train: images/train\nnames: [Kätzchen]\n", encoding)
    assert read_yaml(tmp_path / "data.yaml")["train"].counts() == {"Kätzchen": 1}
    for name in ("labels/train/1.txt", "data.yaml"):
        (tmp_path / name).write_bytes("names: kätzchen".encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name} is no text in UTF-8"):
            read_yaml(tmp_path / "data.yaml")


@pytest.mark.parametrize(
    ("place", "lines"),
    [
        ("", "train: images/train"),
        ("", "path: .\ntrain: images/train"),
        ("", "path: /nowhere/at/all\ntrain: images/train"),  # of another machine
        ("set", "path: set\ntrain: images/train"),
        ("set", "path: set\ntrain: [images/train, images/val]"),
        ("", "train: ../images/train"),  # Roboflow's
        ("", "train: ./images/train"),
        ("", "train: images\\train"),
        ("", "train: images/train/1.png"),
        ("", "train: train.txt"),
    ],
)
def test_places_of_images(tmp_path, place, lines):
    write_yolo(tmp_path / place, {"train/1": BOX, "val/2": BOX})
    write_text(tmp_path / "train.txt", "./images/train/1.png\n\n")
    path = write_text(tmp_path / "data.yaml", f"{lines}\nnames: [cat]\n")
    train = read_yaml(path)["train"]
    assert train.counts() == {"cat": len(train.images)} == {"cat": 2 if "val" in lines else 1}


def test_splits(tmp_path):
    data = "train: images/train\nvalid: images/val\ntest:\nnames: [cat]\n"
    write_yolo(tmp_path, {"train/1": BOX, "val/2": BOX}, data)
    assert list(read_yaml(tmp_path / "data.yaml")) == ["train", "val"]
    for wrong, message in (
        ("names: [cat]\n", "names no split"),
        (data + "val: images/val", "both val and valid"),
        (data + "kpt_shape: [17, 3]", "poses"),
        ("train: classes.json\nnames: [cat]", "no folder, list or image"),
    ):
        write_text(tmp_path / "classes.json", "")
        write_text(tmp_path / "data.yaml", wrong)
        with pytest.raises(ValueError, match=message):
            read_yaml(tmp_path / "data.yaml")


def test_what_is_missing_is_named(tmp_path):
    write_yolo(tmp_path, {"train/1": BOX})
    write_text(tmp_path / "list.txt", "images/train/none.png")
    write_text(tmp_path / "long.txt", "a" * 5000)
    (tmp_path / "empty").mkdir()
    for value, message in (
        ("images/none", "names 'images/none'"),
        ("a" * 5000, "names 'aaa"),
        ("long.txt", r"no image at .*which .*long\.txt lists"),
        ("list.txt", r"no image at .*none\.png, which .*list\.txt lists"),
        ("empty", "names train, but there are no images"),
    ):
        path = write_text(tmp_path / "data.yaml", f"train: {value}\nnames: [cat]\n")
        with pytest.raises(FileNotFoundError, match=message):
            read_yaml(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2, but there are 2: 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5"),
        ("nan 0.5 0.5 0.1 0.1", "class nan"),
        ("inf 0.5 0.5 0.1 0.1", "class inf"),
        ("1e400 0.5 0.5 0.1 0.1", "class 1e400"),
        ("cat 0.5 0.5 0.1 0.1", "no line of numbers"),
        ("0 0,5 0,5 0,1 0,1", "no line of numbers"),
        ("0, 0.5, 0.5, 0.1, 0.1", "no line of numbers"),
        ("0 20 15 10 10", "fractions of the image, not pixels"),
        ("0 -20 0.5 0.1 0.1", "fractions of the image, not pixels"),
        ("0 0.1 0.1 20 15 0.2 0.3", "fractions of the image, not pixels"),
        ("0", "0 numbers"),
        ("0 0.5 0.5 0.1", "3 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "5 numbers"),  # with the score of a prediction
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "7 numbers"),
        ("\0", "no line of numbers"),
    ],
)
def test_lines_that_cannot_be_meant(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as caught:
        one(tmp_path, f"{BOX}\n{line}\n")
    assert "line 2 of" in str(caught.value) and "1.txt" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "0 nan 0.5 0.1 0.1",
        "0 0.5 0.5 inf 0.1",
        "0 0.5 1e999 0.1 0.1",
        "0 0.5 0.5 0 0.1",
        "0 0.5 0.5 -0.1 0.1",
        "0 1.9 1.9 0.1 0.1",
        "0 0.1 0.1 nan 0.2 0.3 0.1",
        "0 0.1 0.1 0.1 0.2 0.1 0.3",
    ],
)
def test_lines_that_cannot_be_used_are_counted(tmp_path, line):
    train = one(tmp_path, f"{BOX}\n{BOX}\n{BOX}\n{line}\n")
    assert len(train.annotations) == 3 and train.dropped.total() == 1


def test_images_without_labels(tmp_path):
    assert not one(tmp_path, "").annotations and not one(tmp_path, "").notes
    (tmp_path / "labels/train/1.txt").unlink()
    train = read_yaml(tmp_path / "data.yaml")["train"]
    assert len(train.images) == 1 and not train.annotations
    (note,) = train.notes
    assert "1 images" in note and "no label file" in note


def test_where_labels_are(tmp_path):
    assert label_file(tmp_path / "images/train/a.b.jpg") == tmp_path / "labels/train/a.b.txt"
    assert label_file(tmp_path / "photos/a.jpg") == tmp_path / "photos/a.txt"
    write_text(tmp_path / "images/train/a.txt", BOX)  # beside, as LabelImg puts them
    assert label_file(tmp_path / "images/train/a.jpg") == tmp_path / "images/train/a.txt"
    write_text(tmp_path / "labels/train/a.txt", BOX)
    assert label_file(tmp_path / "images/train/a.jpg") == tmp_path / "labels/train/a.txt"


def test_two_images_of_one_name(tmp_path):
    write_yolo(tmp_path, {"train/1": BOX}, DATA)
    write_image(tmp_path / "images/train/1.jpg")
    with pytest.raises(ValueError, match=r"1\.jpg and .*1\.png both have the labels"):
        read_yaml(tmp_path / "data.yaml")


@pytest.mark.parametrize("file", ["classes.txt", "obj.names", "labels/classes.txt"])
def test_folder(tmp_path, file):
    write_yolo(tmp_path, {"1": BOX, "2": TRIANGLE.replace("1 ", "2 ", 1)})
    assert read_folder(tmp_path).counts() == {"0": 1, "1": 0, "2": 1}
    write_text(tmp_path / file, "cat\n\ndog\nox\n")
    assert read_folder(tmp_path).counts() == {"cat": 1, "dog": 0, "ox": 1}
    write_text(tmp_path / file, "cat")
    with pytest.raises(ValueError, match=r"2\.txt has the class 2, but there are 1"):
        read_folder(tmp_path)


def test_a_huge_class_makes_no_huge_list(tmp_path):
    write_yolo(tmp_path, {"1": "1000000000 0.5 0.5 0.1 0.1"})
    with pytest.raises(ValueError, match=r"class 1000000000, and no file that names"):
        read_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        read_folder(tmp_path / "empty")


def test_names_stay_as_they_are_written(tmp_path):
    """To YAML yes is a boolean, 1.10 a number and 2001-01-01 a date."""
    write_image(tmp_path / "a.png")
    names = ["yes", "off", "1.10", "2001-01-01", "0x1F", "ünï"]
    path = write_text(tmp_path / "data.yaml", f"train: .\nnc: 6\nnames: [{', '.join(names)}]\n")
    assert read_yaml(path)["train"].classes == names
