"""Data of any format, found out, split and handed on."""

import json

import pytest

from e3va.data.folder import open_data, read_classes
from tests.data.factories import (
    SQUARE,
    annotation,
    coco,
    write_coco,
    write_image,
    write_maps,
    write_text,
    write_voc,
    write_yolo,
    xml,
)

BOX = "0 0.25 0.5 0.25 0.5"
TRIANGLE = "0 0.25 0.5 0.5 0.5 0.5 0.75"


def coco_of(count, **entries):
    """A file of ``count`` images with an instance each."""
    return coco([annotation(n, image_id=n, **entries) for n in range(1, count + 1)], count)


def coco_folder(root, count=4, **entries):
    write_coco(root, coco_of(count, **entries))
    return root


def names(split):
    return [image["file_name"] for image in split.images]


def test_coco(tmp_path):
    for path in (coco_folder(tmp_path), tmp_path / "train.json"):
        data = open_data(path)
        assert (data.format, data.task, data.classes) == ("coco", "masks", ["cat", "dog"])


def test_voc(tmp_path):
    tree = {"train": {"1": xml([{}])}, "val": {"2": xml([{}])}}
    assert open_data(write_voc(tmp_path / "tree", tree)).format == "voc"
    for number in range(3):
        write_image(tmp_path / f"flat/{number}.jpg")
        write_text(tmp_path / f"flat/{number}.xml", xml([{}]))
    data = open_data(tmp_path / "flat")
    assert (data.format, data.task) == ("voc", "boxes")


def test_yolo(tmp_path):
    pytest.importorskip("yaml")
    data = "train: images/train\nval: images/val\nnames: [cat]\n"
    root = write_yolo(tmp_path / "a", {"train/1": BOX, "val/2": BOX}, data)
    for path in (root, root / "data.yaml"):
        assert open_data(path).format == "yolo"
    write_yolo(tmp_path / "b", {"1": TRIANGLE, "2": TRIANGLE})
    data = open_data(tmp_path / "b")
    assert (data.format, data.task, data.classes) == ("yolo", "masks", ["0"])


def test_maps(tmp_path):
    data = open_data(write_maps(tmp_path, {"train": [[0, 255]] * 3, "val": [[0, 255]]}))
    assert (data.format, data.task) == ("maps", "semantic")
    assert data.notes == ["0 is the background, 255 an object"]


def test_things_that_lie_about(tmp_path):
    coco_folder(tmp_path)
    write_text(tmp_path / "pom.xml", "<project/>")
    write_text(tmp_path / ".idea/a.xml", xml([{}]))
    write_text(tmp_path / "compose.yaml", "hostnames: [a]\n")
    write_text(tmp_path / "images/1.txt", "a cat on a mat")
    write_text(tmp_path / "detections.json", json.dumps([{"image_id": 1}]))
    write_text(tmp_path / "captions.json", json.dumps({"images": [], "annotations": []}))
    assert open_data(tmp_path).format == "coco"


def test_no_format(tmp_path):
    write_image(tmp_path / "images/1.png")
    for path in (tmp_path, tmp_path / "images", tmp_path / "images/1.png"):
        with pytest.raises(ValueError, match="is of no format that is known: COCO"):
            open_data(path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*none"):
        open_data(tmp_path / "none")


def test_several_formats(tmp_path):
    coco_folder(tmp_path)
    write_text(tmp_path / "labels/1.txt", BOX)
    with pytest.raises(ValueError, match="could be coco and yolo: name the file"):
        open_data(tmp_path)
    assert open_data(tmp_path / "train.json").format == "coco"
    write_maps(tmp_path / "b", {"": [[0, 255]] * 4})
    write_text(tmp_path / "b/labels/0.txt", BOX)
    with pytest.raises(ValueError, match="could be yolo and maps"):
        open_data(tmp_path / "b")
    assert open_data(tmp_path / "b", task="semantic").format == "maps"


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train.json", "val.json"),
        ("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json"),
        ("latest.json", "validation.json"),  # in which "test" is no word
    ],
)
def test_coco_files_of_splits(tmp_path, train, val):
    write_text(tmp_path / train, json.dumps(coco_of(3)))
    write_text(tmp_path / val, json.dumps(coco_of(2)))
    for number in (1, 2, 3):
        write_image(tmp_path / f"images/{number}.png")
    data = open_data(tmp_path)
    assert {name: len(s.images) for name, s in data.splits.items()} == {"train": 3, "val": 2}
    assert data.notes == ["2 images are both in train and in val: scores will flatter"]


def test_coco_files_that_are_not_clear(tmp_path):
    coco_folder(tmp_path)
    write_coco(tmp_path, coco_of(2), "more.json")
    with pytest.raises(ValueError, match=r"several COCO files for train: .*more.*train\.json"):
        open_data(tmp_path)
    (tmp_path / "more.json").rename(tmp_path / "val.json")
    (tmp_path / "train.json").unlink()
    with pytest.raises(ValueError, match=r"val\.json, but no COCO file to train on"):
        open_data(tmp_path)


def test_a_folder_of_images_that_is_not_there(tmp_path):
    write_coco(tmp_path, coco_of(4))
    with pytest.raises(FileNotFoundError, match=r"there is no folder of images .*/gone$"):
        open_data(tmp_path / "train.json", images=tmp_path / "gone")


def test_images_of_coco_files(tmp_path):
    write_text(tmp_path / "a/train.json", json.dumps(coco_of(3)))
    for number in (1, 2, 3):
        write_image(tmp_path / f"far/off/{number}.png")
    with pytest.raises(FileNotFoundError, match="--images"):
        open_data(tmp_path / "a")
    data = open_data(tmp_path / "a", images=tmp_path / "far")
    assert str(tmp_path / "far/off/1.png") in names(data.splits["train"]) + names(
        data.splits["val"]
    )


@pytest.mark.parametrize("kind", ["coco", "maps"])
def test_a_seeded_split(tmp_path, kind):
    if kind == "coco":
        coco_folder(tmp_path, 20)
    else:
        write_maps(tmp_path, {"": [[0, 255]] * 20})

    def drawn(seed):
        splits = open_data(tmp_path, seed=seed).splits
        return [names(s) if kind == "coco" else s.pairs for s in (splits["train"], splits["val"])]

    train, val = drawn(0)
    assert (len(train), len(val)) == (16, 4)
    assert len({str(item) for item in train + val}) == 20
    assert drawn(0) == [train, val] and drawn(1) != [train, val]
    assert "drawn with the seed 0" in open_data(tmp_path).notes[-1]


def test_a_split_has_instances_on_both_sides(tmp_path):
    content = coco_of(30)
    content["annotations"] = content["annotations"][:2]
    write_coco(tmp_path, content)
    for seed in range(8):
        splits = open_data(tmp_path, seed=seed).splits
        assert all(sum(split.counts().values()) == 1 for split in splits.values())
        assert len(splits["val"].images) == 7
    content["annotations"].pop()
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match=r"one image with an instance.*--val"):
        open_data(tmp_path)


def test_annotations_follow_their_images(tmp_path):
    splits = open_data(coco_folder(tmp_path, 10)).splits
    for split in splits.values():
        ids = {image["id"] for image in split.images}
        assert {a["image_id"] for a in split.annotations} == ids


def test_validation_from_another_path(tmp_path):
    coco_folder(tmp_path / "a", 3)
    coco_folder(tmp_path / "b", 2)
    data = open_data(tmp_path / "a", val=tmp_path / "b")
    assert names(data.splits["val"])[0] == str(tmp_path / "b/images/1.png")
    assert (len(data.splits["train"].images), data.notes) == (3, [])
    write_voc(tmp_path / "c", {"train": {"1": xml([{}])}})
    with pytest.raises(ValueError, match="of the format voc, but coco is wanted"):
        open_data(tmp_path / "a", val=tmp_path / "c")
    coco_folder(tmp_path / "b", 2, segmentation=None)
    with pytest.raises(ValueError, match="cannot be used for masks"):
        open_data(tmp_path / "a", val=tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="none"):
        open_data(tmp_path / "a", val=tmp_path / "none")


def test_validation_that_lacks_a_class_or_has_another_order(tmp_path):
    write_voc(tmp_path / "a", {"train": {"1": xml([{"name": "cat"}, {"name": "dog"}])}})
    write_voc(tmp_path / "b", {"train": {"2": xml([{"name": "dog"}])}})
    data = open_data(tmp_path / "a", val=tmp_path / "b")
    assert data.splits["val"].classes == ["cat", "dog"]
    assert data.splits["val"].counts() == {"cat": 0, "dog": 1}
    with pytest.raises(ValueError, match=r"different classes: 'dog' in .*, 'cat', 'dog' in"):
        open_data(tmp_path / "b", val=tmp_path / "a")


def test_splits_without_an_instance(tmp_path):
    objects, empty = {"1": xml([{}])}, {"2": xml([{"difficult": 1}]), "3": xml()}
    write_voc(tmp_path / "a", {"train": objects, "val": empty})
    with pytest.raises(ValueError, match=r"a \(val\) has no instance to validate on"):
        open_data(tmp_path / "a")
    write_voc(tmp_path / "b", {"train": empty, "val": objects})
    with pytest.raises(ValueError, match=r"b \(train\) has no instance to train on"):
        open_data(tmp_path / "b")
    coco_folder(tmp_path / "c", 3, bbox=[90, 90, 5, 5])
    with pytest.raises(ValueError, match=r"no instance to train on: left out were 3 × box outside"):
        open_data(tmp_path / "c")
    write_maps(tmp_path / "d", {"train": [[0, 1]], "val": [[255, 255]]}, "0,a\n1,b")
    with pytest.raises(ValueError, match=r"d \(val\) has no instance to validate on"):
        open_data(tmp_path / "d")


def test_one_image(tmp_path):
    with pytest.raises(ValueError, match="one image with an instance: none is left"):
        open_data(coco_folder(tmp_path, 1))
    data = open_data(tmp_path, val=tmp_path)
    assert "1 images are both in train and in val" in data.notes[0]


def test_task(tmp_path):
    content = coco_of(6)
    content["annotations"][5]["segmentation"] = []
    write_coco(tmp_path, content)
    masks = open_data(tmp_path)
    assert masks.task == "masks" and masks.report()["instances"] == 5
    boxes = open_data(tmp_path, task="boxes")
    assert boxes.task == "boxes" and boxes.report()["instances"] == 6  # none lacks its box
    assert not any(split.has_masks for split in boxes.splits.values())
    with pytest.raises(ValueError, match="cannot be used for semantic"):
        open_data(tmp_path, task="semantic")
    with pytest.raises(ValueError, match="one of boxes, masks, semantic, got 'mask'"):
        open_data(tmp_path, task="mask")
    coco_folder(tmp_path / "plain", 3, segmentation=None)
    with pytest.raises(ValueError, match="for boxes, it cannot be used for masks: left out were 3"):
        open_data(tmp_path / "plain", task="masks")
    write_maps(tmp_path / "maps", {"": [[0, 255]] * 2})
    with pytest.raises(ValueError, match="for semantic, it cannot be used for boxes"):
        open_data(tmp_path / "maps", task="boxes")


def test_classes(tmp_path):
    content = coco_of(10)
    for entry in content["annotations"][::2]:
        entry["category_id"] = 2
    write_coco(tmp_path, content)

    def opened(**classes):
        return open_data(tmp_path, classes=classes).report()

    assert opened(cat="cat", dog="dog")["classes"] == {"cat": 5, "dog": 5}
    chosen = opened(dog="hound")
    assert chosen["classes"] == {"hound": 5} and chosen["dropped"] == {"class left out": 5}
    assert opened(dog="dog", cat=None)["classes"] == {"dog": 5}
    assert opened(dog="pet", cat="pet")["classes"] == {"pet": 10}
    assert opened(dog="cat", cat="dog")["classes"] == {"dog": 5, "cat": 5}
    with pytest.raises(ValueError, match=r"has no class 'ox'; it has 'cat', 'dog'$"):
        opened(ox="ox")
    with pytest.raises(ValueError, match="none is left"):
        opened(cat=None)


def test_a_class_with_a_comma_is_chosen_by_a_file(tmp_path):
    content = coco_of(4)
    content["categories"][0]["name"] = "cat, small"
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match=r"no class 'cat', 'small'; .* by a YAML file of lines"):
        open_data(tmp_path, classes=read_classes("cat, small"))
    (tmp_path / "classes.yaml").write_text('"cat, small": cat\n')
    classes = read_classes(str(tmp_path / "classes.yaml"))
    assert open_data(tmp_path, classes=classes).classes == ["cat"]


def test_classes_of_maps(tmp_path):
    write_maps(tmp_path, {"": [[0, 1], [1, 2], [0, 2]]}, "0,a\n1,b\n2,c")
    data = open_data(tmp_path, classes={"a": "rest", "b": "rest", "c": "c"})
    assert data.report()["classes"] == {"rest": 3, "c": 2}
    with pytest.raises(ValueError, match="c alone is left"):
        open_data(tmp_path, classes={"c": "c"})


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo", "maps"])
def test_report(tmp_path, kind):
    if kind == "coco":
        coco_folder(tmp_path)
    elif kind == "voc":
        write_voc(tmp_path, {"train": {str(n): xml([{}]) for n in range(4)}})
    elif kind == "yolo":
        write_yolo(tmp_path, {str(n): BOX for n in range(4)})
    else:
        write_maps(tmp_path, {"": [[0, 1]] * 4})
    report = json.loads(json.dumps(open_data(tmp_path).report()))
    assert report["format"] == kind and report["images"] == 4
    assert report["splits"] == {"train": 3, "val": 1}
    assert report["instances"] == sum(report["classes"].values()) == (8 if kind == "maps" else 4)
    assert report["dropped"] == {} and len(report["notes"]) >= 1


def test_report_counts_what_was_dropped_in_every_split(tmp_path):
    for split in ("train", "val"):
        content = coco_of(3)
        content["annotations"].append(annotation(9, bbox=[50, 5, 9, 9], segmentation=[SQUARE]))
        write_coco(tmp_path, content, f"{split}.json")
    assert sum(open_data(tmp_path).report()["dropped"].values()) == 2


@pytest.mark.parametrize("name", ["nuclei", "microcontrollers", "coco_open", "bccd"])
def test_real_data(real_data, name):
    data = open_data(real_data / name)
    assert {"train", "val"} <= data.splits.keys() and data.report()["instances"] > 100
    assert not any("both in train" in note for note in data.notes)


def test_boxes_that_reach_out_are_told_alike_in_all_formats(tmp_path):
    """A box reaches 20 pixels over the left edge, another lies outside, a third is fine."""
    boxes = [[-20, 5, 30, 10], [60, 5, 10, 10], [5, 5, 10, 10]]
    entries = [annotation(i, bbox=box, segmentation=...) for i, box in enumerate(boxes, start=1)]
    found = [
        write_coco(tmp_path / "coco", coco(entries)).parent,
        write_voc(
            tmp_path / "voc",
            {"train": {"1": xml([{"box": (x + 1, y + 1, x + w, y + h)} for x, y, w, h in boxes])}},
        ),
        write_yolo(
            tmp_path / "yolo",
            {
                "train/1": "\n".join(
                    f"0 {(x + w / 2) / 40} {(y + h / 2) / 30} {w / 40} {h / 30}"
                    for x, y, w, h in boxes
                )
            },
            "train: images/train\nnames: [cat]",
        ),
    ]
    for path in found:
        data = open_data(path, hold_out=False)
        del data.splits["val"]  # which is the same
        report = data.report()
        assert report["clipped"] == 1 and report["instances"] == 2, path
        ((reason, number),) = report["dropped"].items()
        assert "outside its image" in reason and number == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"no format that is known.*a\.json is not valid JSON"),
        ('{"images": []}', r"a\.json is not in COCO's format: it has no list 'annotations'"),
        ("version https://git-lfs.github.com/spec/v1", r"a\.json is a pointer of Git LFS"),
    ],
)
def test_a_file_that_is_no_coco_is_named(tmp_path, text, message):
    write_image(tmp_path / "1.png")
    write_text(tmp_path / "annotations/a.json", text)
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path)


def test_why_nothing_is_left_to_train_on(tmp_path):
    crowds = coco([annotation(1, iscrowd=1), annotation(2, segmentation=[[1, 1, 9, 9]])])
    path = write_coco(tmp_path, crowds)
    with pytest.raises(ValueError, match=r"1 × no mask: .*, 1 × crowd or difficult"):
        open_data(path, task="masks")


def test_maps_of_one_class_are_not_trained_on(tmp_path):
    path = write_maps(tmp_path, {"train": [[0]] * 3, "val": [[0, 1]]}, "0,background\n1,cat")
    with pytest.raises(ValueError, match=r"\(train\): all that is labelled .* is background"):
        open_data(path)
    assert open_data(path, hold_out=False).report()["classes"] == {"background": 4, "cat": 1}


def test_neither_a_folder_nor_a_file():
    with pytest.raises(FileNotFoundError, match="no folder or file /dev/null"):
        open_data("/dev/null")


def test_a_split_that_serves_as_two_is_counted_once(tmp_path):
    """Its classes may have been renamed."""
    maps = write_maps(tmp_path, {"validation": [[0, 1], [1, 0]]}, "value, name\n0, cat\n1, dog\n")
    for classes in (None, {"cat": "lion", "dog": "dog"}):
        data = open_data(maps, classes=classes, hold_out=False)
        assert data.splits["train"] is data.splits["val"]
        assert data.report()["images"] == 2
