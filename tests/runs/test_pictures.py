"""That annotations and predictions are seen where they are."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools")
pytest.importorskip("matplotlib")

from e3va.data.folder import open_data
from e3va.data.geometry import decode_mask, encode_mask
from e3va.figures import font_file
from e3va.runs import pictures
from tests.runs.factories import encoding, polygon, write_coco

GREY = np.full((72, 96, 3), 100, np.uint8)


@pytest.mark.parametrize("mask", [[polygon(30, 30, 20, 16)], encoding(30, 30, 20, 16)], ids=str)
def test_a_mask_is_drawn_in_its_pixels_and_the_box_around_it(mask):
    found = {"bbox": [30, 30, 20, 16], "label": 1, "segmentation": mask, "score": 0.5}
    pixels = np.asarray(pictures.draw_instances(GREY, [found], ["a", "b"]))
    inside = pixels[33:44, 33:47]
    expected = 100 + pictures.OPACITY * (np.array(pictures.colour(1)) - 100)
    assert np.abs(inside - expected).max() <= 1
    assert (pixels[30, 30:50] == pictures.colour(1)).all()
    assert np.abs(inside - 100.0).max() > 20
    assert (pixels[52:] == 100).all() and (pixels[32:, 60:] == 100).all()


def test_each_class_of_a_map_has_its_colour_and_unlabelled_pixels_none():
    labels = np.full((72, 96), 255, np.uint8)
    labels[40:, :48], labels[40:, 48:] = 0, 1
    pixels = np.asarray(pictures.draw_map(GREY, labels, ["a", "b"])).astype(float)
    for part, label in ((pixels[45:, 2:40], 0), (pixels[45:, 50:], 1)):
        expected = 100 + pictures.OPACITY * (np.array(pictures.colour(label)) - 100)
        assert np.abs(part - expected).max() <= 1
    assert (pixels[30:40, 60:] == 100).all()


def test_what_is_called_background_is_left_as_it_is():
    labels = np.zeros((72, 96), np.uint8)
    labels[40:] = 1
    pixels = np.asarray(pictures.draw_map(GREY, labels, ["Background", "crack"]))
    assert (pixels[30:40] == 100).all() and (pixels[45:] != 100).any(2).all()


def test_a_smaller_picture_has_boxes_and_names_that_can_be_seen():
    large = np.full((2400, 3200, 3), 100, np.uint8)
    found = {
        "bbox": [800, 1200, 1600, 600],
        "label": 0,
        "segmentation": encoding(800, 1200, 1600, 600, 2400, 3200),
    }
    picture = pictures.draw_instances(large, [found], ["name", "other"], (320, 240))
    pixels = np.asarray(picture).astype(float)
    assert picture.size == (320, 240)
    ink = pictures.colour(0)
    assert (pixels[120, 80:240] == ink).all() and (pixels[120:180, 80] == ink).all()
    veiled = 100 + pictures.OPACITY * (np.array(ink) - 100)
    assert np.abs(pixels[125:175, 85:235] - veiled).max() <= 1
    name = (pixels[100:120, 80:120] > 200).all(2)  # white on red
    assert name.any(1).sum() >= 5  # rows of letters


def letters(picture):
    """Pixels that are nearly black or white."""
    pixels = np.asarray(picture)
    return (pixels < 40).all(2) | (pixels > 215).all(2)


def test_one_class_alone_is_not_called_by_its_name():
    found = {"bbox": [30, 30, 40, 30], "label": 0}
    assert not letters(pictures.draw_instances(GREY, [found], ["a"])).any()
    assert letters(pictures.draw_instances(GREY, [found], ["a", "b"])).any()
    assert letters(pictures.draw_instances(GREY, [{**found, "score": 0.5}], ["a"])).any()


SQUARE = np.full((200, 200, 3), 100, np.uint8)


def has(part, label):
    return (part == pictures.colour(label)).all(-1).any()


def test_names_that_fit_stand_above_their_boxes():
    pair = [{"bbox": [10 + 100 * i, 60, 80, 40], "label": i} for i in range(2)]
    pixels = np.asarray(pictures.draw_instances(SQUARE, pair, ["ox", "ant"]))
    assert has(pixels[40:59, 10:90], 0) and has(pixels[40:59, 110:], 1)
    assert (pixels[:40] == 100).all()


def test_names_that_would_cover_each_other_become_a_legend():
    pair = [{"bbox": [10, 60, 80, 40], "label": 0}, {"bbox": [20, 62, 40, 40], "label": 1}]
    pixels = np.asarray(pictures.draw_instances(SQUARE, pair, ["ox", "ant"]))
    assert (pixels[40:60] == 100).all()
    assert has(pixels[2:12, 2:40], 0) and has(pixels[15:28, 2:40], 1)


def test_many_objects_are_not_hidden_by_their_names():
    """One legend, of the classes that occur; with one class alone, none."""
    many = [
        {"bbox": [x, y, 8, 8], "label": 2, "score": 0.5}
        for x in range(5, 190, 38)
        for y in range(30, 190, 20)
    ]
    pixels = np.asarray(pictures.draw_instances(SQUARE, many, ["ox", "ant", "nucleus"]))
    boxes = np.zeros((200, 200), bool)
    for x, y, w, h in (instance["bbox"] for instance in many):
        boxes[y : y + h + 1, x : x + w + 1] = True
    other = (pixels != 100).any(2) & ~boxes
    assert has(pixels[2:12, 2:40], 2) and not has(pixels, 0) and not other[18:].any()
    alone = np.asarray(pictures.draw_instances(SQUARE, [{**i, "label": 0} for i in many], ["ox"]))
    assert (alone[~boxes] == 100).all()


@pytest.mark.parametrize("x", [0, 100, 197])
def test_names_lie_within_the_picture(x):
    def draw(left):
        found = {"bbox": [left, 80, 2, 20], "label": 1}
        return letters(pictures.draw_instances(SQUARE, [found], ["a", "fifteen letters"]))

    assert draw(x).sum() == draw(5).sum() > 0


@pytest.fixture
def fonts():
    font_file.cache_clear()
    yield
    font_file.cache_clear()


def test_a_font_of_the_system_has_what_ours_has_not(fonts, tmp_path, monkeypatch):
    broken, ours = tmp_path / "broken.ttf", font_file()
    broken.write_bytes(b"no font")
    other = ours.with_name("STIXNonUni.ttf")  # has letters of its own from U+E000 on
    system = [str(broken), str(other)]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: system)
    assert font_file(frozenset("Жλ é")) == ours
    assert font_file(frozenset("\ue000")) == other
    assert font_file(frozenset("\ue000語")) == other  # neither has both
    assert font_file(frozenset("Жλ語")) == ours


def test_letters_beyond_ascii_are_drawn(fonts, monkeypatch):
    """Each as itself, not as the box that stands for a missing one."""
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    shapes = set()
    for name in "äßéłčµ²αд\u0378":  # the last one is no letter
        picture = np.asarray(pictures.draw_map(SQUARE, np.zeros((200, 200), int), [name]))
        shapes.add(letters(picture)[:20, :20].tobytes())
    assert len(shapes) == 10


@pytest.mark.parametrize(
    "size, expected", [((256, 200), (768, 600)), ((5, 3), (640, 384)), ((700, 20), (700, 20))]
)
def test_small_images_are_enlarged_by_a_whole_number(size, expected):
    assert pictures.enlarged(np.zeros((size[1], size[0], 3), np.uint8)) == expected


def test_all_names_of_a_map_are_seen():
    labels = np.arange(72 * 96).reshape(72, 96) % 12
    names = [f"c{i}" for i in range(12)]
    picture = np.asarray(pictures.draw_map(GREY, labels.astype(np.uint8), names))
    for i in range(12):
        assert (picture == pictures.colour(i)).all(2).sum() > 40, i


@pytest.mark.parametrize("shape", [(4, 3000), (3000, 4), (5, 5)])
def test_thin_pictures_are_more_than_a_line(tmp_path, shape):
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / "a.png")
    _, size = pictures.read_cell(tmp_path / "a.png")
    assert max(size) == pictures.CELL and min(size) >= pictures.THINNEST


def test_colours_of_neighbours_differ():
    colours = np.array([pictures.colour(i) for i in range(20)]).astype(float)
    assert np.abs(np.diff(colours, axis=0)).sum(1).min() > 60


def test_the_page_of_data_shows_annotations(tmp_path):
    data = open_data(write_coco(tmp_path / "data"))
    pages = []
    for annotated in (True, False):
        if not annotated:
            for split in data.splits.values():
                split.annotations = []
        pictures.data_page(data, tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as page:
            pages.append(np.asarray(page))
    drawn, bare = pages
    assert drawn.shape == bare.shape
    assert 0.02 < (drawn != bare).any(2).mean() < 0.6


def test_both_curves_are_over_the_iterations_of_the_training(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    steps = [{"iteration": i, "loss": 1 / i, "lr": 0.1} for i in range(1, 121)]
    pictures.curves([*steps, {"iteration": 120, "box_ap": 3.0}], tmp_path / "curves.png")
    training, validation, *_ = figures[0].axes
    assert validation.get_xlim() == training.get_xlim()
    assert validation.get_xlim()[0] <= 1 and 120 <= validation.get_xlim()[1] < 140


def test_curves_are_drawn_of_whatever_there_is(tmp_path):
    steps = [{"iteration": i, "loss": 1 / i, "lr": 0.1} for i in range(1, 9)]
    score = {"iteration": 8, "box_ap": 3.0}
    sizes = []
    for metrics in ([], steps, [score], [*steps, score]):
        pictures.curves(metrics, tmp_path / "curves.png")
        sizes.append((tmp_path / "curves.png").stat().st_size)
    assert sizes[0] < sizes[1] < sizes[3] and sizes[0] < sizes[2]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 5)], ids=str)
def test_masks_survive_their_encoding(shape):
    mask = np.random.default_rng(0).random(shape) < 0.4
    rle = encode_mask(mask)
    assert rle["size"] == list(shape) and isinstance(rle["counts"], str)
    assert (decode_mask(rle, *shape) == mask).all()
