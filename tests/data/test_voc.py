"""Pascal VOC's XML files, in a tree and in flat folders."""

import time

import pytest

from e3va.data.voc import read_folder, read_tree, read_xml
from tests.data.factories import write_image, write_text, write_voc, xml


def test_tree(tmp_path):
    write_voc(
        tmp_path,
        {
            "train": {"1": xml([{}, {"name": "dog", "box": (1, 1, 40, 30)}]), "2": xml()},
            "val": {"3": xml([{"difficult": 1}])},
        },
    )
    splits = read_tree(tmp_path)
    assert list(splits) == ["train", "val"]
    train = splits["train"]
    assert train.classes == splits["val"].classes == ["cat", "dog"]
    assert [image["file_name"] for image in train.images] == [
        str(tmp_path / f"JPEGImages/{n}.jpg") for n in (1, 2)
    ]
    # Corners count from 1, the last included.
    assert [a["bbox"] for a in train.annotations] == [[5, 5, 10, 10], [0, 0, 40, 30]]
    assert splits["val"].annotations[0]["iscrowd"] == 1 and splits["val"].counts()["cat"] == 0


def test_trainval_stands_in_for_train(tmp_path):
    write_voc(tmp_path, {"trainval": {"1": xml([{}])}})
    assert list(read_tree(tmp_path)) == ["train"]
    (tmp_path / "ImageSets/Main/trainval.txt").rename(tmp_path / "ImageSets/Main/cat_trainval.txt")
    with pytest.raises(FileNotFoundError, match=r"no train\.txt"):
        read_tree(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists(tmp_path, encoding):
    files = {"1": xml([{}]), "my photo": xml([{}]), "frame.003": xml([{}])}
    write_voc(tmp_path, {"train": files})
    write_text(tmp_path / "ImageSets/Main/train.txt", "1  -1\n\nmy photo\r\nframe.003\n", encoding)
    assert len(read_tree(tmp_path)["train"].images) == 3
    write_text(tmp_path / "ImageSets/Main/train.txt", "kätzchen", "latin-1")
    with pytest.raises(ValueError, match=r"train\.txt is no text in UTF-8"):
        read_tree(tmp_path)


def test_what_a_tree_lacks_is_named(tmp_path):
    write_voc(tmp_path, {"train": {"1": xml([{}]), "2": xml([{}])}})
    (tmp_path / "Annotations/2.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"Annotations/2\.xml"):
        read_tree(tmp_path)
    (tmp_path / "JPEGImages/1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image '1' .*train\.txt lists it"):
        read_tree(tmp_path)


def test_two_images_of_one_name(tmp_path):
    write_voc(tmp_path, {"train": {"1": xml([{}])}})
    write_image(tmp_path / "JPEGImages/1.png")
    with pytest.raises(ValueError, match=r"1\.jpg and .*1\.png have one name"):
        read_tree(tmp_path)


@pytest.mark.parametrize("places", [("", ""), ("images", "annotations")])
def test_flat(tmp_path, places):
    images, annotations = (tmp_path / place for place in places)
    for name in ("a.jpg", "b.PNG", "c.d.jpg", "bare.jpg"):
        write_image(images / name)
    for name in ("a.xml", "b.XML", "c.d.xml", "._a.xml", ".idea/x.xml"):
        write_text(annotations / name, xml([{}]) if name[0] != "." else "")
    (train,) = read_folder(tmp_path).values()
    assert len(train.images) == 4 and len(train.annotations) == 3
    assert train.notes == ["1 images of train have no XML file: nothing is on them"]


def test_flat_splits(tmp_path):
    for split in ("train", "valid", "test"):
        write_image(tmp_path / split / "1.jpg")
        write_text(tmp_path / split / "1.xml", xml([{"name": split}]))
    splits = read_folder(tmp_path)
    assert list(splits) == ["train", "val", "test"]
    assert splits["val"].counts() == {"test": 0, "train": 0, "valid": 1}


def test_flat_files_whose_image_is_not_clear(tmp_path):
    write_text(tmp_path / "a/1.xml", xml([{}]))
    with pytest.raises(FileNotFoundError, match=r"no image in .* for .*1\.xml"):
        read_folder(tmp_path)
    write_image(tmp_path / "a/1.jpg")
    write_image(tmp_path / "b/1.jpg")
    with pytest.raises(ValueError, match=r"a/1\.jpg and .*b/1\.jpg have one name"):
        read_folder(tmp_path)
    write_text(tmp_path / "b/1.xml", xml([{}]))
    with pytest.raises(ValueError, match=r"a/1\.xml and .*b/1\.xml have one name"):
        read_folder(tmp_path)


@pytest.mark.parametrize("size", [None, (30, 40), ("30.0", "40.0"), (0, 0), ("", "")])
def test_sizes(tmp_path, size):
    write_voc(tmp_path, {"train": {"1": xml([{}], size)}})
    (image,) = read_tree(tmp_path)["train"].images
    assert (image["height"], image["width"]) == (30, 40)


@pytest.mark.parametrize("size", [(40, 30), (31, 40), (-30, 40)])
def test_wrong_sizes(tmp_path, size):
    write_voc(tmp_path, {"train": {"1": xml([{}], size)}})
    with pytest.raises(ValueError, match=r"1\.xml says .*1\.jpg is 40×30"):
        read_tree(tmp_path)


@pytest.mark.parametrize(("text", "crowd"), [(0, 0), (1, 1), ("", 0), (" 1 ", 1), ("True", 1)])
def test_difficult(tmp_path, text, crowd):
    write_voc(tmp_path, {"train": {"1": xml([{"difficult": text}])}})
    assert read_tree(tmp_path)["train"].annotations[0]["iscrowd"] == crowd


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no element found"),
        ("<annotation>", "no element found"),
        ("\0\1\2", "not well-formed"),
        ("<annotations/>", "root is <annotations>"),  # CVAT's
        ("<project><object/></project>", "root is <project>"),
        (xml([{"name": " "}]), "no name"),
        (xml([{"difficult": "maybe"}]), "'cat' has the difficult 'maybe'"),
        (xml([{"box": (1, 1, 5)}]), "'cat' has no ymax"),
        (xml([{"box": (1, 1, 5, "")}]), "'cat' has no ymax"),
        (xml([{"box": (1, 1, 5, "five")}]), "five"),
        (xml([{"box": (1, 1, 5, "nan")}]), "the corners"),
        (xml([{"box": (1, 1, 5, "1e999")}]), "the corners"),
        (xml([], ("inf", 40)), "infinity"),
        (xml([], ("nan", 40)), "NaN"),
        (xml([], ("thirty", 40)), "thirty"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = write_text(tmp_path / "a.xml", text)
    with pytest.raises(ValueError, match=message) as caught:
        read_xml(path)
    assert "a.xml is no annotation of Pascal VOC" in str(caught.value)


def bomb():
    text = '<!DOCTYPE annotation [<!ENTITY e0 "' + "x" * 100 + '">'
    for level in range(1, 12):
        text += f'<!ENTITY e{level} "' + f"&e{level - 1};" * 10 + '">'
    return text + "]><annotation><object><name>&e11;</name></object></annotation>"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        '<!DOCTYPE a [<!ENTITY e "' + "x" * 10**6 + '">]><annotation>' + "&e;" * 10**5
        + "</annotation>",
        '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>',
    ],
    ids=["billion laughs", "quadratic", "external"],
)  # fmt: skip
def test_entities_are_refused(tmp_path, text, encoding):
    path = write_text(tmp_path / "a.xml", text, encoding)
    started = time.process_time()
    with pytest.raises(ValueError, match=r"a\.xml .* defines entities"):
        read_xml(path)
    assert time.process_time() - started < 1


def test_deeply_nested_elements(tmp_path):
    path = write_text(tmp_path / "a.xml", "<annotation>" + "<part>" * 100_000)
    with pytest.raises(ValueError, match="no annotation of Pascal VOC"):
        read_xml(path)
    nested = "<part>" * 100_000 + "</part>" * 100_000
    path = write_text(tmp_path / "b.xml", f"<annotation>{nested}</annotation>")
    assert read_xml(path) == (None, [])


def test_boxes_that_hold_nothing_are_counted(tmp_path):
    boxes = [(6, 6, 15, 15), (6, 6, 6, 15), (15, 6, 6, 15), (50, 6, 60, 15), (0, 0, 9, 9)]
    write_voc(tmp_path, {"train": {"1": xml([{"box": box} for box in boxes])}})
    train = read_tree(tmp_path)["train"]
    assert [a["bbox"] for a in train.annotations] == [[5, 5, 10, 10], [0, 0, 9, 9]]
    assert train.dropped == {
        "box without width or height": 2,
        "box outside its image or thinner than 0.1 pixels": 1,
    }


def test_fractions(tmp_path):
    box = {"box": (0.1, 0.1, 0.5, 0.9)}
    write_voc(tmp_path, {"train": {"1": xml([box] * 3)}})
    with pytest.raises(ValueError, match="fractions of the image, but VOC's are corners"):
        read_tree(tmp_path)


def test_entries_that_no_box_needs(tmp_path):
    text = xml([{}]).replace("<bndbox>", "<pose>Left</pose><part><name>head</name></part><bndbox>")
    write_voc(tmp_path, {"train": {"1": text}})
    assert read_tree(tmp_path)["train"].counts() == {"cat": 1}


def test_real_tree(real_data):
    splits = read_tree(real_data / "bccd")
    assert splits["train"].classes == ["Platelets", "RBC", "WBC"]
    assert sum(s.dropped.total() + len(s.annotations) for s in splits.values()) == 4888
