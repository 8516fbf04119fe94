"""Images of any kind, as a model is shown them."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from e3va.data.images import check_size, image_size, list_images, match_images, read_image
from tests.data.factories import write_image

RAMP = np.arange(1200).reshape(30, 40)
# Of its 1200 even steps the darkest and the brightest half per cent are clipped.
STRETCHED = ((RAMP - 0.005 * 1199) / (0.99 * 1199)).clip(0, 1) * 255


def saved(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_of_16_bits_is_scaled_from_its_own_percentiles(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", (1000 + 20 * RAMP).astype(np.uint16))
    pixels = read_image(path)
    assert pixels.shape == (30, 40, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[..., 1], np.rint(STRETCHED))
    assert image_size(path) == (30, 40)


def test_big_endian_16_bits(tmp_path):
    Image.frombytes("I;16B", (40, 30), (RAMP * 50).astype(">u2").tobytes()).save(tmp_path / "a.tif")
    assert (read_image(tmp_path / "a.tif")[..., 0] == np.rint(STRETCHED)).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((RAMP * 50_000).astype(np.int32), STRETCHED),
        (RAMP.astype(np.int32) - 600, STRETCHED),
        ((RAMP % 200).astype(np.int32), RAMP % 200),  # in 0..255: as it is
        ((RAMP / 2400).astype(np.float32), RAMP / 2400 * 255),  # in [0, 1]: not stretched
        ((RAMP / 6).astype(np.float32), RAMP / 6),
        ((RAMP * 7.0 - 900).astype(np.float32), STRETCHED),
        (np.full((30, 40), 70_000, np.int32), np.zeros((30, 40))),
        (np.zeros((30, 40), np.float32), np.zeros((30, 40))),
    ],
)
def test_grey_of_32_bits(tmp_path, values, expected):
    pixels = read_image(saved(tmp_path / "a.tif", values))
    assert np.abs(pixels[..., 2] - np.rint(expected)).max() <= 1e-6 * 255 + (values.dtype == "f4")


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf, -3.4e38, 3.4e38])
def test_missing_pixels_do_not_take_the_others_range(tmp_path, missing):
    values = (1000 + RAMP).astype(np.float32)
    values[3, 4] = missing
    pixels = read_image(saved(tmp_path / "a.tif", values))[..., 0].astype(int)
    assert pixels[3, 4] == 0
    others = np.ones(RAMP.shape, bool)
    others[3, 4] = False
    assert np.abs(pixels - np.rint(STRETCHED))[others].max() <= 1


def test_hot_pixels_do_not_take_the_others_range(tmp_path):
    values = (1000 + RAMP).astype(np.uint16)
    values[3, 4], values[7, 8] = 65535, 0
    pixels = read_image(saved(tmp_path / "a.tif", values))[..., 0].astype(int)
    assert pixels[3, 4] == 255 and pixels[7, 8] == 0
    others = (values > 0) & (values < 65535)
    assert np.abs(pixels - STRETCHED)[others].max() <= 1


def test_a_few_spots_on_nothing_are_seen(tmp_path):
    values = np.full((100, 100), 500, np.uint16)
    values[5, 5:10] = 700, 900, 1100, 1300, 1500  # less than the percentiles clip
    pixels = read_image(saved(tmp_path / "a.png", values))[..., 0]
    assert pixels[5, 5:10].tolist() == [51, 102, 153, 204, 255] and pixels.sum() == 765


def test_nothing_but_nan(tmp_path):
    assert not read_image(saved(tmp_path / "a.tif", np.full((3, 4), np.nan, np.float32))).any()


def test_palette(tmp_path):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50, 9, 9, 9])
    image.save(tmp_path / "plain.png")
    assert (read_image(tmp_path / "plain.png") == [200, 100, 50]).all()
    image.putpixel((0, 0), 2)
    image.save(tmp_path / "clear.png", transparency=1)
    pixels = read_image(tmp_path / "clear.png")
    assert (pixels[0, 0] == 9).all() and not pixels[1].any()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_is_transparent_is_seen_on_black(tmp_path, mode):
    image = Image.new(mode, (4, 2), (200,) * (len(mode) - 1) + (0,))
    image.putpixel((1, 1), (200,) * (len(mode) - 1) + (255,))
    image.putpixel((2, 1), (200,) * (len(mode) - 1) + (128,))
    image.save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png")
    assert (pixels[1, 1] == 200).all() and abs(int(pixels[1, 2, 0]) - 100) <= 1
    assert not pixels[0].any()


def test_cmyk_and_one_bit(tmp_path):
    Image.new("CMYK", (4, 2), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - [255, 0, 0]).max() < 8
    Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png")[..., 0] == 255 * np.eye(4)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_turns_size_and_pixels(tmp_path, suffix, orientation):
    upright = np.zeros((30, 40, 3), np.uint8)
    upright[:15, :20] = 250  # the upper left quarter
    turn = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),  # the file's top is the picture's right side
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(turn(upright))).save(path, exif=exif)
    assert image_size(path) == (30, 40)
    assert np.abs(read_image(path).astype(int) - upright).mean() < 8


def test_png_that_says_after_its_pixels_how_it_is_turned(tmp_path):
    path = write_image(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + body))
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert image_size(path) == read_image(path).shape[:2] == (40, 30)


def test_the_size_of_a_png_is_told_without_its_pixels(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(path) == (30, 40)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_truncated(tmp_path, suffix):
    path = write_image(tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"a\.{suffix} is damaged"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
@pytest.mark.parametrize("read", [read_image, image_size])
def test_no_image(tmp_path, content, read):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png is (no image|damaged)"):
        read(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"no image at .*none\.png"):
        read(tmp_path / "none.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_nothing_reads_is_told_in_plain_words(tmp_path):
    path = write_image(tmp_path / "a.tif", compression="tiff_lzw")
    path.write_bytes(path.read_bytes()[:1000])  # what tells of its pixels comes last
    (tmp_path / "b.tif").write_text("a letter")
    for name in ("a.tif", "b.tif"):
        words = rf"{name} is no image that can be read, or is cut short: export it again"
        with pytest.raises(ValueError, match=words):
            read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_garbage_after_a_head_is_a_value_error_with_a_name(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "tif", "gif", "bmp", "webp", "ppm"):
        path = write_image(tmp_path / f"a.{suffix}")
        whole = path.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(2, min(len(data), 400), 6):
                data[place] = rng.integers(256)
            path.write_bytes(data)
            for read in (read_image, image_size):
                try:
                    read(path)
                except ValueError as error:
                    assert f"a.{suffix}" in str(error)


@pytest.mark.parametrize("read", [read_image, image_size])
def test_decompression_bomb(tmp_path, read):
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    idat = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + idat)
    with pytest.raises(ValueError, match=r"a\.png is too large"):
        read(tmp_path / "a.png")


def test_check_size(tmp_path):
    path = write_image(tmp_path / "a.png")
    check_size(path, (30, 40), (30, 40), "x.json")
    with pytest.raises(ValueError, match=r"x\.json says 41×30 .*a\.png is 40×30"):
        check_size(path, (30, 40), (30, 41), "x.json")
    with pytest.raises(ValueError, match="height and width are swapped"):
        check_size(path, (30, 40), (40, 30), "x.json")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "b.jpg", exif=turned)
    with pytest.raises(ValueError, match="before its EXIF data turned it: take these away"):
        check_size(tmp_path / "b.jpg", image_size(tmp_path / "b.jpg"), (30, 40), "x.json")


def test_what_stands_where_an_image_should_be_is_named(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(ValueError, match=r"a\.jpg is no image but a pointer of Git LFS: run"):
        read_image(path)
    path.write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(ValueError, match="no image but an HTML page"):
        read_image(path)


def test_list_images(tmp_path):
    wanted = [tmp_path / n for n in ("a.jpg", "b.JPG", "sub/deep/c.Tiff", "sub/d.e.png")]
    for path in wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("._a.jpg", ".hidden/a.jpg", "a.txt", "a.xml", "a", "sub/jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert list_images(tmp_path) == sorted(wanted)


def test_list_images_follows_links_once(tmp_path):
    write_image(tmp_path / "elsewhere/a.png")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/train")
    os.symlink(tmp_path / "data", tmp_path / "elsewhere/up")
    assert list_images(tmp_path / "data") == [tmp_path / "data/train/a.png"]


def test_match_images(tmp_path):
    for name in ("a.png", "sub/b.png", "x/c.png", "y/c.png"):
        write_image(tmp_path / name)
    names = ["a.png", "sub\\b.png"]
    assert match_images(names, tmp_path, "l") == [tmp_path / "a.png", tmp_path / "sub/b.png"]
    assert match_images(["C:\\me\\b.png"], tmp_path, "l") == [tmp_path / "sub/b.png"]
    with pytest.raises(ValueError, match=r"l lists 'z/c.png', .* several .*x/c\.png.*y/c\.png"):
        match_images(["z/c.png"], tmp_path, "l")
    for missing in ("none.png", "a" * 5000 + ".png", "nul\0.png"):
        with pytest.raises(FileNotFoundError, match="which l lists"):
            match_images([missing], tmp_path, "l")


def test_one_file_for_two_names_is_refused(tmp_path):
    write_image(tmp_path / "images/1.png")
    for names in (["images/1.png"] * 2, ["cam1/1.png", "cam2/1.png"]):
        with pytest.raises(ValueError, match="one file for both"):
            match_images(names, tmp_path, "l")
