"""COCO's JSON files, sound and broken."""

import json
import time

import numpy as np
import pytest

from e3va.data.coco_json import find_images, is_coco, read_content, read_json
from tests.data.factories import (
    HEIGHT,
    SQUARE,
    WIDTH,
    annotation,
    coco,
    write_coco,
    write_image,
    write_text,
)

RUNS = {"size": [HEIGHT, WIDTH], "counts": [155, 10, 1035]}


@pytest.fixture
def read(tmp_path):
    """Reads one image with some annotations, and whatever else the file is to say."""

    def read_it(*annotations, masks=None, **entries):
        path = write_coco(tmp_path, coco(annotations, **entries))
        return read_json(path, tmp_path / "images", masks=masks)

    return read_it


def test_a_sound_file(tmp_path, read):
    found = read(annotation(5), annotation(6, category_id=2, segmentation=RUNS, iscrowd=1))
    assert found.classes == ["cat", "dog"] and not found.dropped and found.has_masks
    (image,) = found.images
    assert image["file_name"] == str(tmp_path / "images/1.png") and image["id"] == 1
    first, second = found.annotations
    assert first["segmentation"] == [SQUARE] and first["area"] == 100 and first["iscrowd"] == 0
    assert second["segmentation"] == RUNS and second["iscrowd"] == 1
    assert found.counts() == {"cat": 1, "dog": 0}


def test_pycocotools_takes_what_was_read(read):
    coco_module = pytest.importorskip("pycocotools.coco")
    found = read(annotation(0), annotation(1, segmentation=RUNS), annotation(2, iscrowd=1))
    dataset = coco_module.COCO()
    dataset.dataset = found.content()
    dataset.createIndex()
    areas = [int(dataset.annToMask(a).sum()) for a in dataset.loadAnns(dataset.getAnnIds())]
    assert areas == [100, 10, 100]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
    content = coco([annotation()], categories=[{"id": 1, "name": "Kätzchen"}])
    path = write_coco(tmp_path, content)
    write_text(path, json.dumps(content, ensure_ascii=False), encoding)
    assert is_coco(path)
    assert read_json(path, tmp_path / "images").classes == ["Kätzchen"]


def test_another_encoding_is_named(tmp_path):
    text = json.dumps(coco(categories=[{"id": 1, "name": "Kätzchen"}]), ensure_ascii=False)
    path = write_text(tmp_path / "a.json", text, "latin-1")
    with pytest.raises(ValueError, match=r"a\.json is no text in UTF-8"):
        read_content(path)


@pytest.mark.parametrize("area", [..., None, "100", float("nan"), -1, 0, 1e11, 10**400, True])
def test_an_area_that_is_none_is_that_of_the_box(read, area):
    assert read(annotation(area=area)).annotations[0]["area"] == 100


@pytest.mark.parametrize("crowd", [..., None, 0, False, 0.0, "0", "false", ""])
def test_no_crowd(read, crowd):
    assert read(annotation(iscrowd=crowd)).counts()["cat"] == 1


@pytest.mark.parametrize("crowd", [1, True, 1.0, "1", "true"])
def test_crowd(read, crowd):
    found = read(annotation(iscrowd=crowd))
    assert found.counts()["cat"] == 0 and found.annotations[0]["iscrowd"] == 1


@pytest.mark.parametrize("crowd", [2, "maybe", [0], {}, float("nan")])
def test_neither_crowd_nor_none(read, crowd):
    with pytest.raises(ValueError, match=r"annotation 1 of .*train\.json has the iscrowd"):
        read(annotation(iscrowd=crowd))


def test_sizes(tmp_path, read):
    image = {"id": 1, "file_name": "1.png"}
    for size in ({"height": 30.0, "width": 40.0}, {}, {"height": None, "width": None}):
        (found,) = read(annotation(), images=[image | size]).images
        assert (found["height"], found["width"]) == (30, 40)
        assert isinstance(found["height"], int)
    with pytest.raises(ValueError, match=r"train\.json \(1\.png\) says 41×30 .*is 40×30"):
        read(images=[image | {"height": 30, "width": 41}])
    for wrong in ("30", 0, -30, 30.5, float("nan"), float("inf"), True, [30]):
        with pytest.raises(ValueError, match=r"images\[0\] has the height"):
            read(images=[image | {"height": wrong, "width": 40}])


@pytest.mark.parametrize("image_id", [7, "7", 7.0])
@pytest.mark.parametrize("listed", [7, "7"])
def test_ids_of_mixed_types(read, image_id, listed):
    images = [{"id": listed, "file_name": "1.png"}, {"id": "x", "file_name": "2.png"}]
    found = read(annotation(image_id=image_id), images=images)
    assert found.annotations[0]["image_id"] == found.images[0]["id"]
    assert len({type(image["id"]) for image in found.images}) == 1


@pytest.mark.parametrize("category_id", [2, "2", 2.0])
@pytest.mark.parametrize("listed", [2, "2"])
def test_categories_of_mixed_types(read, category_id, listed):
    categories = [{"id": listed, "name": "dog"}, {"id": 10, "name": "ox"}, {"id": 1, "name": "cat"}]
    found = read(annotation(category_id=category_id), categories=categories)
    assert found.classes == ["cat", "dog", "ox"] and found.counts()["dog"] == 1


def test_many_ids_of_mixed_types_take_no_time(tmp_path):
    content = coco([annotation(n, image_id=str(n)) for n in range(1, 3001)], count=3000)
    write_image(tmp_path / "images/1.png")
    for number in range(2, 3001):
        (tmp_path / f"images/{number}.png").hardlink_to(tmp_path / "images/1.png")
    path = write_text(tmp_path / "a.json", json.dumps(content))
    started = time.process_time()
    assert len(read_json(path, tmp_path / "images").annotations) == 3000
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"image_id": 9}, "annotation 1 .* unknown image 9"),
        ({"image_id": [1]}, "unknown image"),
        ({"image_id": None}, "has no 'image_id'"),
        ({"image_id": ...}, "has no 'image_id'"),
        ({"category_id": 9}, "unknown category 9"),
        ({"category_id": {}}, "unknown category"),
        ({"category_id": ...}, "has no 'category_id'"),
        ({"bbox": "5 5 10 10"}, "no list of numbers"),
        ({"bbox": ["5", "5", "10", "10"]}, "no list of numbers"),
        ({"bbox": [5, 5, True, 10]}, "no list of numbers"),
        ({"bbox": [5, 5, None, 10]}, "no list of numbers"),
        ({"bbox": {"x": 5}}, "no list of numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "annotation 1 .* polygon of 7"),
        ({"segmentation": "x"}, "annotation 1 .* is a str"),
        ({"segmentation": {"size": [30, 40], "counts": [5, 5]}}, "annotation 1 .* sum to 10"),
        ({"segmentation": {"size": [30, 40], "counts": "b'abc'"}}, "annotation 1 .* Python's"),
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, "annotation 1 .* rows"),
        ({"segmentation": {"size": [30, 40]}}, "annotation 1 .* without 'counts'"),
    ],
)
def test_annotations_that_cannot_be_meant(read, entries, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(annotation(**entries))
    assert "train.json" in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"bbox": [5, 5, 10]}, "four finite"),
        ({"bbox": [5, 5, 10, 10, 0.9]}, "four finite"),
        ({"bbox": [5, 5, float("nan"), 10]}, "four finite"),
        ({"bbox": [5, 5, float("inf"), 10]}, "four finite"),
        ({"bbox": [5, 5, 10**400, 10]}, "four finite"),
        ({"bbox": [5, 5, -10, 10]}, "thinner"),
        ({"bbox": [500, 5, 10, 10]}, "outside its image"),
        ({"bbox": [20, 20, 10, 10]}, "mask outside"),
        ({"bbox": [20, 20, 10, 10], "segmentation": RUNS}, "mask outside"),
        ({"segmentation": [[5, 5, 15, float("nan"), 15, 15]]}, "not finite"),
        ({"segmentation": [[5, 5, 2e8, 5, 15, 15]]}, "far outside"),
        ({"segmentation": [[5, 5, 15, 15]]}, "no mask"),
        ({"segmentation": [[]]}, "no mask"),
        ({"segmentation": []}, "no mask"),
        ({"segmentation": None}, "no mask"),
        ({"segmentation": ...}, "no mask"),
        ({"segmentation": {"size": [30, 40], "counts": [1200]}}, "without a pixel"),
    ],
)
def test_annotations_that_cannot_be_used_are_counted(read, entries, reason):
    found = read(annotation(1), annotation(2), annotation(3, **entries))
    assert len(found.annotations) == 2
    ((text, number),) = found.dropped.items()
    assert reason in text and number == 1


def test_nan_and_infinity_as_json_dump_writes_them(tmp_path):
    text = json.dumps(coco([annotation(1), annotation(2, bbox=[float("nan"), 5, 10, 10])]))
    assert "NaN" in text
    write_image(tmp_path / "1.png")
    found = read_json(write_text(tmp_path / "a.json", text), tmp_path)
    assert len(found.annotations) == 1 and found.dropped.total() == 1


@pytest.mark.parametrize("bbox", [..., None, []])
@pytest.mark.parametrize("segmentation", [[SQUARE], SQUARE, RUNS])
def test_a_missing_box_is_the_extent_of_the_mask(read, bbox, segmentation):
    (found,) = read(annotation(bbox=bbox, segmentation=segmentation)).annotations
    assert found["bbox"] == ([5, 5, 1, 10] if segmentation is RUNS else [5, 5, 10, 10])


def test_whether_masks_are_wanted(read):
    mixed = [annotation(1), annotation(2), annotation(3, segmentation=[])]
    assert len(read(*mixed).annotations) == 2  # most have one
    boxes = read(*mixed, masks=False)
    assert len(boxes.annotations) == 3 and not boxes.has_masks
    fewer = [annotation(1), annotation(2, segmentation=...), annotation(3, segmentation=None)]
    assert len(read(*fewer).annotations) == 3 and not read(*fewer).has_masks
    assert len(read(*fewer, masks=True).annotations) == 1


def test_duplicate_ids(read):
    with pytest.raises(ValueError, match=r"annotation 1 .* not the only one"):
        read(annotation(1), annotation("1"))
    image = {"id": 1, "file_name": "1.png"}
    with pytest.raises(ValueError, match="several images with the id '1'"):
        read(images=[image, {"id": "1", "file_name": "2.png"}])
    with pytest.raises(ValueError, match="several categories with the id 1"):
        read(categories=[{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}])
    with pytest.raises(ValueError, match="one file for both"):
        read(images=[image, {"id": 2, "file_name": "1.png"}])
    assert len(read(annotation(None), annotation(...), annotation([1])).annotations) == 3


def test_categories_of_one_name(read):
    twins = [{"id": 0, "name": "cat"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    found = read(annotation(), categories=twins)  # as Roboflow has them
    assert found.classes == ["cat", "dog"] and found.counts() == {"cat": 1, "dog": 0}
    with pytest.raises(ValueError, match="two categories that are called 'cat', 0 and 1"):
        read(annotation(1), annotation(2, category_id=0), categories=twins)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"annotations": None}, "no list 'annotations'"),
        ({"annotations": {}}, "no list 'annotations'"),
        ({"images": "x"}, "no list 'images'"),
        ({"categories": None}, "no list 'categories'"),
        ({"categories": []}, "no category"),
        ({"annotations": [None]}, r"annotations\[0\] is None"),
        ({"annotations": [[5] * 10_000]}, r"annotations\[0\] is \[5"),
        ({"images": [5]}, r"images\[0\] is 5"),
        ({"images": [{"id": 1}]}, r"images\[0\] has no 'file_name'"),
        ({"images": [{"id": 1, "file_name": ""}]}, r"images\[0\] has the file_name ''"),
        ({"images": [{"id": [1], "file_name": "a"}]}, r"images\[0\] has the id \[1\]"),
        ({"images": [{"id": None, "file_name": "a"}]}, r"images\[0\] has the id None"),
        ({"categories": [{"id": "x", "name": "cat"}]}, r"categories\[0\] has the id 'x'"),
        ({"categories": [{"id": "²", "name": "cat"}]}, r"categories\[0\] has the id"),
        ({"categories": [{"id": True, "name": "cat"}]}, r"categories\[0\] has the id True"),
        ({"categories": [{"id": 1, "name": 5}]}, r"categories\[0\] has the name 5"),
        ({"categories": [{"id": 1, "name": "\ud800"}]}, r"categories\[0\] has the name '.ud800'"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] has no 'name'"),
    ],
)
def test_files_that_are_not_in_cocos_format(tmp_path, entries, message):
    path = write_text(tmp_path / "a.json", json.dumps(coco() | entries))
    with pytest.raises(ValueError, match=message) as caught:
        read_content(path)
    assert "a.json" in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "[" * 100_000, '{"a":' * 100_000])
def test_files_that_are_not_json(tmp_path, text):
    path = write_text(tmp_path / "a.json", text)
    with pytest.raises(ValueError, match=r"a\.json is not"):
        read_content(path)
    assert not is_coco(path)
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        read_content(tmp_path / "none.json")


def test_corners_and_fractions(read):
    corners = [[10, 5, 38, 28], [20, 12, 39, 29], [30, 20, 35, 30]]
    with pytest.raises(ValueError, match=r"train\.json: .* corners"):
        read(*(annotation(n, bbox=box, segmentation=...) for n, box in enumerate(corners)))
    fractions = [[0.1, 0.1, 0.5, 0.5]] * 3
    with pytest.raises(ValueError, match="fractions"):
        read(*(annotation(n, bbox=box, segmentation=...) for n, box in enumerate(fractions)))
    polygon = [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]
    with pytest.raises(ValueError, match="fractions"):
        read(*(annotation(n, bbox=..., segmentation=polygon) for n in range(3)))


def test_nothing_in_it(read):
    assert not read().annotations
    assert not read(images=[]).images


@pytest.mark.parametrize(
    "place", ["", "images", "images/train2017", "train2017", "data", "../images", "../train2017"]
)
def test_images_are_found(tmp_path, place):
    folder = tmp_path / "set"
    (tmp_path / "elsewhere").mkdir()
    path = write_text(folder / "instances_train2017.json", json.dumps(coco([annotation()])))
    write_image((folder / place / "1.png").resolve())
    assert read_json(path).images[0]["file_name"].endswith("1.png")
    assert (find_images(path) / "1.png").resolve() == (folder / place / "1.png").resolve()


@pytest.mark.parametrize("name", ["C:\\Users\\me\\1.png", "/home/me/1.png", "train/1.png"])
def test_images_are_found_by_their_last_part(tmp_path, name):
    content = coco([annotation()]) | {"images": [{"id": 1, "file_name": name}]}
    path = write_text(tmp_path / "set/a.json", json.dumps(content))
    write_image(tmp_path / "set/deep/below/1.png")
    (found,) = read_json(path).images
    assert found["file_name"] == str(tmp_path / "set/deep/below/1.png")


def test_images_that_are_not_found(tmp_path):
    path = write_text(tmp_path / "set/a.json", json.dumps(coco()))
    write_image(tmp_path / "other/1.png")  # nothing to do with it
    with pytest.raises(FileNotFoundError, match=r"a\.json lists, such as '1\.png'.*--images"):
        read_json(path)


def test_images_are_read_in_the_order_of_the_file(tmp_path):
    images = [{"id": n, "file_name": f"{n}.png"} for n in (3, 1, 2)]
    path = write_coco(tmp_path, coco() | {"images": images})
    assert [image["id"] for image in read_json(path).images] == [3, 1, 2]


def test_is_coco(tmp_path):
    assert is_coco(write_text(tmp_path / "a.json", " \n" + json.dumps(coco())))
    for other in ([{"image_id": 1}], {"images": [], "annotations": []}, {"a": "categories"}):
        assert not is_coco(write_text(tmp_path / "b.json", json.dumps(other)))


def test_real_masks_of_nuclei(real_data):
    mask = pytest.importorskip("pycocotools.mask")
    found = read_json(real_data / "nuclei/instances_val.json")
    assert len(found.annotations) == 2641 and not found.dropped
    for entry in found.annotations[::50]:
        x, y, w, h = mask.toBbox(entry["segmentation"])
        assert np.abs(np.subtract(entry["bbox"], [x, y, w, h])).max() <= 1


def test_the_image_that_is_not_there_is_named(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "height": 30, "width": 40} for i in (1, 2)]
    path = write_coco(tmp_path, coco([annotation()], images=images))
    (tmp_path / "images/2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"such as '2\.png', are in none of"):
        find_images(path)
