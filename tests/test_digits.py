"""Digits in scenes: deterministic, disjoint, and the same in all three formats."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

pytest.importorskip(
    "sklearn", reason="digits in scenes needs scikit-learn: pip install 'e3va[demo]'"
)
pytest.importorskip("pycocotools", reason="COCO masks need pycocotools")

from pycocotools import mask as mask_util

from e3va.demo import digits

SIZE = (70, 91)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return digits.write_digits(
        tmp_path_factory.mktemp("d") / "digits", train=5, val=3, tune=2, size=SIZE
    )


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def annotations(tree, split):
    content = json.loads((tree / f"coco/annotations/instances_{split}.json").read_text())
    by_image = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    return content, by_image


def test_pools_are_disjoint_and_complete():
    pools = [digits.digit_pool(pool) for pool in digits.POOLS]
    seen = [image.tobytes() for images, _ in pools for image in images]
    assert len(seen) == 1797
    assert len(set(seen)) == len({i.tobytes() for i in digits._digits()[0]})
    for images, labels in pools:
        assert images.shape[1:] == (8, 8) and images.min() >= 0 and images.max() <= 1
        assert set(labels) == set(range(10))
    with pytest.raises(ValueError, match="pool must be one of pretrain, train, val, got 'test'"):
        digits.digit_pool("test")


def test_photographs_are_disjoint():
    """Validation scenes lie on the right quarter of the photographs, all others on the rest."""
    photos = digits._photos()
    border = photos[0].shape[1] * 3 // 4
    for pool, part in (("train", slice(0, border)), ("val", slice(border, None))):
        rng = np.random.default_rng(0)
        crop = digits.background(pool, 9, 11, rng).astype(np.uint8)
        found = False
        for photo in photos:
            for candidate in (photo[:, part], photo[:, part][:, ::-1]):
                windows = np.lib.stride_tricks.sliding_window_view(candidate[..., 0], (9, 11))
                found |= bool((windows == crop[..., 0]).all((2, 3)).any())
        assert found


def test_same_seed_same_bytes(tree, tmp_path):
    again = digits.write_digits(tmp_path / "again", train=5, val=3, tune=2, size=SIZE)
    other = digits.write_digits(tmp_path / "other", train=5, val=3, tune=2, size=SIZE, seed=1)
    assert files(again) == files(tree)
    assert files(other) != files(tree)


@pytest.mark.parametrize("split, count", [("train", 5), ("val", 3), ("tune", 2)])
def test_coco(tree, split, count):
    content, by_image = annotations(tree, split)
    assert [c["name"] for c in content["categories"]] == list("0123456789")
    assert len(content["images"]) == count
    assert min(a["id"] for a in content["annotations"]) == 1
    for image in content["images"]:
        with Image.open(tree / "coco/images" / split / image["file_name"]) as photo:
            assert photo.size == (image["width"], image["height"]) == SIZE[::-1]
        masks = [mask_util.decode(a["segmentation"]) for a in by_image[image["id"]]]
        assert np.sum(masks, axis=0).max() == 1  # what is hidden belongs to nobody
        for annotation, mask in zip(by_image[image["id"]], masks, strict=True):
            assert annotation["area"] == mask.sum() > 0
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, w, h = annotation["bbox"]
            assert (x, y) == (columns[0], rows[0])
            assert (x + w, y + h) == (columns[-1] + 1, rows[-1] + 1)


@pytest.mark.parametrize(
    "split, ade", [("train", "training"), ("val", "validation"), ("tune", "tuning")]
)
def test_voc_and_semantic_maps_show_the_same_scenes(tree, split, ade):
    content, by_image = annotations(tree, split)
    stems = (tree / f"voc/ImageSets/Main/{split}.txt").read_text().split()
    for image, stem in zip(content["images"], stems, strict=True):
        expected = by_image[image["id"]]
        photo = (tree / "coco/images" / split / image["file_name"]).read_bytes()
        assert (tree / f"voc/JPEGImages/{stem}.jpg").read_bytes() == photo
        assert (tree / f"semantic/images/{ade}/{stem}.jpg").read_bytes() == photo

        objects = (
            ElementTree.parse(tree / f"voc/Annotations/{stem}.xml").getroot().findall("object")
        )
        for item, annotation in zip(objects, expected, strict=True):
            assert int(item.findtext("name")) + 1 == annotation["category_id"]
            x, y, w, h = annotation["bbox"]
            corners = [int(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
            assert corners == [x + 1, y + 1, x + w, y + h]

        with Image.open(tree / f"semantic/annotations/{ade}/{stem}.png") as file:
            semantic = np.array(file)
        painted = np.zeros(SIZE, np.uint8)
        for annotation in expected:
            painted[mask_util.decode(annotation["segmentation"]) > 0] = annotation["category_id"]
        np.testing.assert_array_equal(semantic, painted)


def test_a_digit_is_visible():
    """At least half of each digit can be seen, and it differs from what it lies on."""
    rng = np.random.default_rng(3)
    images, _ = digits.digit_pool("train")
    for image in images[:20]:
        before = digits.background("train", 60, 60, rng)
        canvas = before.copy()
        mask = digits.paste(canvas, image, 40, rng)
        assert mask.any()
        assert np.abs(canvas - before)[mask].sum(1).mean() > 60


def test_existing_folders(tree, tmp_path):
    assert digits.write_digits(tree, train=5, val=3, tune=2, size=SIZE) == tree  # kept as it is
    replaced = digits.write_digits(tmp_path / "d", train=2, val=1, tune=1, size=SIZE)
    assert len(list((replaced / "coco/images/train").iterdir())) == 2
    digits.write_digits(replaced, train=1, val=1, tune=1, size=SIZE)
    assert len(list((replaced / "coco/images/train").iterdir())) == 1
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine exists and holds no digits in scenes"):
        digits.write_digits(tmp_path / "mine", train=1, val=1)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"train": 0}, ValueError, "train must be at least 1, got 0"),
        ({"val": 1.5}, TypeError, "val must be an integer, got 1.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"size": (20, 90)}, ValueError, "height must be at least 32, got 20"),
        ({"size": (90, 2000)}, ValueError, "at most .* pixels, got 90×2000"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        digits.write_digits(tmp_path / "d", **{"train": 1, "val": 1, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    digits.main(["--output", str(tmp_path / "d"), "--train", "1", "--val", "1", "--tune", "1"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "d")
    assert (tmp_path / "d/coco/annotations/instances_val.json").is_file()
