"""Semantic maps, and what their values are taken for."""

import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from e3va.data.maps import read_classes, read_folder, read_map, read_values
from tests.data.factories import HEIGHT, WIDTH, write_image, write_maps, write_text

CLASSES = "value, name\n0, background\n1, cat\n2, dog\n"


def save(path, values, mode=None):
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path)
    return path


@pytest.mark.parametrize(
    ("suffix", "dtype", "largest"),
    [
        ("png", np.uint8, 255),
        ("png", np.uint16, 65_535),
        ("tif", np.uint16, 65_535),
        ("tif", np.int32, 2_000_000_000),
        ("bmp", np.uint8, 255),
    ],
)
def test_values_are_the_files(tmp_path, suffix, dtype, largest):
    values = np.array([[0, 1, 2], [3, 150, largest]]).astype(dtype)
    path = save(tmp_path / f"a.{suffix}", values)
    np.testing.assert_array_equal(read_values(path), values)
    np.testing.assert_array_equal(read_map(path, {1: 0, 150: 1}), [[255, 0, 255], [255, 1, 255]])
    assert read_map(path, {}).dtype == np.uint8


def test_palette_one_bit_and_grey_in_colour(tmp_path):
    values = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)
    image = Image.fromarray(values)
    image.putpalette(list(range(255, 0, -1)))
    image.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_values(tmp_path / "palette.png"), values)
    np.testing.assert_array_equal(read_values(save(tmp_path / "rgb.png", values, "RGB")), values)
    bits = save(tmp_path / "bits.png", values > 2)
    np.testing.assert_array_equal(read_values(bits), values > 2)
    assert read_values(bits).dtype == np.uint8


def test_files_that_are_no_maps(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    for image, mode in (
        (colour, "RGB"),
        (np.dstack([colour, colour[..., 0]]), "RGBA"),
        (np.ones((4, 5), np.float32), "F"),
    ):
        with pytest.raises(ValueError, match=rf"a\.tif has the mode {mode}: .* per pixel"):
            read_values(save(tmp_path / "a.tif", image))
    with pytest.raises(ValueError, match=r"a\.tif has negative numbers, such as -7"):
        read_values(save(tmp_path / "a.tif", np.full((4, 5), -7, np.int32)))
    with pytest.raises(FileNotFoundError, match=r"no map at .*none\.png"):
        read_values(tmp_path / "none.png")
    write_text(tmp_path / "a.png", "no image")
    with pytest.raises(ValueError, match=r"a\.png is no image"):
        read_values(tmp_path / "a.png")
    path = save(tmp_path / "b.png", colour[..., 0])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"b\.png is damaged"):
        read_values(path)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (CLASSES, {0: "background", 1: "cat", 2: "dog"}),
        ("0,background\r\n\r\n1,cat", {0: "background", 1: "cat"}),
        ('Pixel Value, Class\n7, "cat, small"', {7: '"cat', 8: ""}),
        ("value,name,red,green\n1,cat,9,9", {1: "cat"}),
        ("0,void\n3,void\n1,cat", {0: "void", 3: "void", 1: "cat"}),
    ],
)
def test_classes(tmp_path, text, names):
    found = read_classes(write_text(tmp_path / "classes.csv", text, "utf-8-sig"))
    assert found == {value: name for value, name in names.items() if name}


def test_classes_in_a_text_file(tmp_path):
    path = write_text(tmp_path / "classes.txt", "background\n\ncat\n")
    assert read_classes(path) == {0: "background", 1: "cat"}
    assert read_classes(write_text(path, "0,background\n4,cat")) == {0: "background", 4: "cat"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no class"),
        ("value, name", "no class"),
        ("cat\ndog", "the line 'dog'"),
        ("value;name\n1;cat", "the line '1;cat'"),  # as spreadsheets write it
        ("0, background\ncat, 1", "the line 'cat,1'"),
        ("0, background\n1.0, cat", "the line '1.0,cat'"),
        ("0, background\n²,cat", "the line '²,cat'"),
        ("0, background\n-1,cat", "the line '-1,cat'"),
        ("0, background\n1,", "the line '1,'"),
        ("0, background\n99999999999,cat", "up to 65535"),
        ("0, cat\n0, dog", "names the value 0 twice"),
        ("0, cat\n1, cat", "calls two values 'cat'"),
        ("0, " + "x" * 200_000, "no CSV file"),
    ],
)
def test_wrong_classes(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_classes(write_text(tmp_path / "classes.csv", text))
    assert "classes.csv" in str(caught.value)


def test_classes_in_another_encoding(tmp_path):
    path = write_text(tmp_path / "classes.csv", "0,Grün", "latin-1")
    with pytest.raises(ValueError, match=r"classes\.csv is no text in UTF-8"):
        read_classes(path)


@pytest.mark.parametrize(
    "names", [("training", "validation"), ("train", "val"), ("train", "valid")]
)
def test_splits(tmp_path, names):
    write_maps(tmp_path, {names[0]: [[0, 1], [1, 2]], names[1]: [[2, 2]]}, CLASSES)
    splits = read_folder(tmp_path)
    assert list(splits) == ["train", "val"]
    train = splits["train"]
    assert train.classes == ["background", "cat", "dog"] and train.values == {0: 0, 1: 1, 2: 2}
    assert train.counts() == {"background": 1, "cat": 2, "dog": 1} and train.note == ""
    assert [image.name for image, _ in train.pairs] == ["0.jpg", "1.jpg"]
    assert splits["val"].counts() == {"background": 0, "cat": 0, "dog": 1}
    _, path = train.pairs[1]
    np.testing.assert_array_equal(np.unique(read_map(path, train.values)), [1, 2])
    assert train.subset([1]).counts() == {"background": 0, "cat": 1, "dog": 1}


def test_no_splits(tmp_path):
    write_maps(tmp_path, {"": [[0, 1]]}, CLASSES)
    assert list(read_folder(tmp_path)) == ["train"]


@pytest.mark.parametrize("classes", [None, "0,background\n1,object", "1,object"])
def test_black_and_white(tmp_path, classes):
    write_maps(tmp_path, {"train": [[0, 255], [0, 0]]}, classes)
    train = read_folder(tmp_path)["train"]
    assert train.classes == ["background", "object"] and train.values == {0: 0, 255: 1}
    assert "0 is" in train.note and "255" in train.note
    assert train.counts() == {"background": 2, "object": 1}


def test_0_and_1_without_names(tmp_path):
    write_maps(tmp_path, {"train": [[0, 1]]})
    train = read_folder(tmp_path)["train"]
    assert train.classes == ["background", "object"] and train.values == {0: 0, 1: 1}


def test_unlabelled_values(tmp_path):
    # As in ADE20K: 0 is no class, nor is 255.
    write_maps(tmp_path, {"train": [[0, 1], [2, 255]]}, "1,cat\n2,dog")
    train = read_folder(tmp_path)["train"]
    assert train.classes == ["cat", "dog"] and train.values == {1: 0, 2: 1}
    assert train.note == "the values 0, 255 are unlabelled"
    write_maps(tmp_path, {"train": [[0, 1], [2, 3]]}, "0,cat\n1,dog\n2,Unlabelled\n3,void")
    train = read_folder(tmp_path)["train"]
    assert train.classes == ["cat", "dog"] and train.note == "the values 2, 3 are unlabelled"


def test_16_bits(tmp_path):
    write_maps(tmp_path, {"train": [[300, 7000]]}, "300,cat\n7000,dog", np.uint16)
    train = read_folder(tmp_path)["train"]
    found = read_map(train.pairs[0][1], train.values)
    assert (found[:, : WIDTH // 2] == 0).all() and (found[:, WIDTH // 2 :] == 1).all()


@pytest.mark.parametrize(
    ("maps", "classes", "message"),
    [
        ([[0, 1, 2]], None, "names no classes.* 0, 1, 2"),
        ([[0, 1, 255]], None, "names no classes"),
        ([[0, 0]], None, "names no classes"),
        ([[255, 255]], None, "names no classes"),
        ([[0, 5]], CLASSES, "hold the values 5, which .* does not name"),
        (
            [list(range(3, 15))],
            "0,a\n1,b",
            r"values 3, 4, 5, 6, 7, 8, 9, 10, … \(12\)",
        ),
        ([[0, 1]], "1,red\n2,blue", "counted from 0"),
        ([[0, 1]], "1,cat", "leaves one class, cat"),
        ([[0, 1]], "0,unlabelled\n1,cat", "leaves one class, cat"),
        ([[0, 1]], "0,void\n1,ignore", "leaves one class, none"),
        ([[255, 255]], CLASSES, "no pixel of the maps to train on is of a class"),
        ([[0, 0]], "0,void\n1,cat\n2,dog", "no pixel of the maps to train on"),
        ([[0, 1]], "\n".join(f"{n},c{n}" for n in range(256)), "256 classes: at most 254"),
    ],
)
def test_maps_that_cannot_be_meant(tmp_path, maps, classes, message):
    write_maps(tmp_path / "set", {"train": maps}, classes)
    with pytest.raises(ValueError, match=message) as caught:
        read_folder(tmp_path / "set")
    assert "set" in str(caught.value)


def test_a_map_of_another_size(tmp_path):
    for split in ("train", "val"):
        write_maps(tmp_path, {"train": [[0, 1]], "val": [[0, 1]]}, CLASSES)
        save(tmp_path / f"annotations/{split}/0.png", np.zeros((WIDTH, HEIGHT), np.uint8))
        with pytest.raises(ValueError, match=rf"{split}/0\.png says 30×40 .*0\.jpg is 40×30"):
            read_folder(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    write_maps(tmp_path, {"train": [[0, 1]], "val": [[0, 1]]}, CLASSES)
    (tmp_path / "annotations/val/0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no map at .*val/0\.png for the image .*0\.jpg"):
        read_folder(tmp_path)
    (tmp_path / "images/val/0.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no images in .*images/val"):
        read_folder(tmp_path)
    (tmp_path / "annotations/val").rmdir()
    with pytest.raises(FileNotFoundError, match=r"no folder .*annotations/val"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no images and annotations"):
        read_folder(tmp_path / "images")


def test_files_of_one_name(tmp_path):
    write_maps(tmp_path, {"train": [[0, 1]]}, CLASSES)
    write_image(tmp_path / "images/train/0.png")
    with pytest.raises(ValueError, match=r"0\.jpg and .*0\.png have one name"):
        read_folder(tmp_path)
    write_image(tmp_path / "annotations/train/0.bmp")
    with pytest.raises(ValueError, match=r"0\.bmp and .*0\.png have one name"):
        read_folder(tmp_path)


@pytest.mark.parametrize("folder", ["masks", "labels", "SegmentationClass"])
def test_names_of_the_folder_of_maps(tmp_path, folder):
    write_maps(tmp_path, {"train": [[0, 1]]}, CLASSES)
    (tmp_path / "annotations").rename(tmp_path / folder)
    assert len(read_folder(tmp_path)["train"].pairs) == 1


def test_renamed(tmp_path):
    write_maps(tmp_path, {"train": [[0, 1], [1, 2]]}, CLASSES)
    train = read_folder(tmp_path)["train"]
    merged = train.renamed({"background": "none", "cat": "pet", "dog": "pet"}, ["none", "pet"])
    assert merged.values == {0: 0, 1: 1, 2: 1} and merged.counts() == {"none": 1, "pet": 2}
    chosen = train.renamed({"dog": "dog", "background": "rest", "cat": None}, ["dog", "rest"])
    assert chosen.values == {2: 0, 0: 1} and chosen.counts() == {"dog": 1, "rest": 1}
    found = read_map(train.pairs[1][1], chosen.values)
    assert set(np.unique(found)) == {0, 255}


def test_real_maps(real_data):
    splits = read_folder(real_data / "indoor_semseg")
    assert [len(split.pairs) for split in splits.values()] == [264, 84]
    assert splits["val"].counts()["elevator"] == 0 < splits["train"].counts()["elevator"]


def test_maps_as_jpeg_are_refused_with_the_command_that_rounds_them(tmp_path):
    root = write_maps(tmp_path / "it's", {"train": [[0, 255], [255, 0, 0]]})
    folder = root / "annotations/train"
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"), quality=30)
        path.unlink()
    assert len(np.unique(np.asarray(Image.open(folder / "1.jpg")))) > 2
    with pytest.raises(ValueError, match=r"0\.jpg is a JPEG.*Export the maps as PNG") as error:
        read_folder(root)
    command = str(error.value).split("rounded by ")[1]
    subprocess.run(
        command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        *("0.jpg.old", "0.png", "1.jpg.old", "1.png")
    ]
    assert read_folder(root)["train"].counts() == {"background": 2, "object": 2}


def test_more_values_than_classes_fit(tmp_path):
    root = write_maps(tmp_path, {"train": [[0, 1]]}, "0,a\n1,b", np.uint16)
    depths = np.arange(30 * 40).reshape(30, 40).astype(np.uint16)
    Image.fromarray(depths).save(root / "annotations/train/0.png")
    with pytest.raises(ValueError, match=r"0\.png has 1200 different values.*depths"):
        read_folder(root)
