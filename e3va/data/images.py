"""Image files, whatever they are, as a model is to see them: [H, W, 3], uint8, RGB, upright."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from e3va.data.checks import check_files
from e3va.files import placeholder

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif"),
    *(".jp2", ".pbm", ".pgm", ".pnm", ".ppm"),
)
"""Of the files in a folder that are taken for images, in small letters."""

MISSING = 1e30
"""Pixels at least this far from 0 mark missing data."""

CONTRAST = (0.5, 99.5)
"""Percentiles of an image of 16 or 32 bits that become black and white: a few hot pixels or a
saturated reflection do not take the range of all others."""

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
_PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An image file as Pillow opens it; whatever goes wrong within is told with its name.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_image`.
    """
    try:
        with Image.open(path) as file:
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except UnidentifiedImageError:
        if what := placeholder(path):
            raise ValueError(f"{path} is no image but {what}") from None
        raise ValueError(
            f"{path} is no image that can be read, or is cut short: export it again, or leave it "
            "out"
        ) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large to be trusted, cut it into tiles: {error}") from None
    except Exception as error:  # of a damaged file Pillow's readers raise whatever they stumble on
        raise ValueError(
            f"{path} is damaged, cannot be read as an image: {error} (copy it again, or leave it "
            "out)"
        ) from error


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """The pixels of an image: [H, W, 3], uint8, RGB, turned as its EXIF data say.

    Grey images of 16 or 32 bits, as microscopes and depth cameras make them, are scaled to 0..255:
    from [0, 1] or [0, 255] where their values lie in it, else from the percentiles
    :data:`CONTRAST` of their own finite values, and what lies beyond is clipped. What is
    transparent is seen on black. Of several pages or frames the first is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, damaged, or larger than Pillow trusts; names the file.
    """
    with open_image(path) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            grey = _scaled(np.asarray(image))
            return np.repeat(grey[..., None], 3, axis=2)
        if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(canvas, image)
        return np.array(image.convert("RGB"))


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of an image as :func:`read_image` gives it; its pixels are not decoded.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_image`.
    """
    with open_image(path) as file:
        width, height = file.size
        if file.format == "TIFF":  # whose size some versions of Pillow turn on their own
            width, height = file.tag_v2[256], file.tag_v2[257]  # type: ignore[attr-defined]
        # A PNG may say after its pixels how it is turned, and Pillow decodes them to get there.
        late = file.format == "PNG" and "exif" not in file.info
        if late and not _mentions(path, _PNG_MARKS):
            return height, width
        turned = file.getexif().get(_ORIENTATION) in _TURNED
    return (width, height) if turned else (height, width)


def check_images(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """(height, width) of image files that are whole, as :func:`check_image`; in parallel, and not
    again while a file stays as it is (:mod:`e3va.data.checks`)."""
    return [(height, width) for height, width in check_files(check_image, paths)]


def check_image(path: Path) -> tuple[int, int]:
    """(height, width) of an image as :func:`image_size`, if the file is not cut short: of a JPEG or
    PNG that does not end as it should, and of other kinds not at all, all is decoded.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_image`.
    """
    size = image_size(path)
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(max(0, os.path.getsize(path) - _TAIL))
        end = file.read()
    mark = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(start[:2])
    if mark is not None and mark not in end:
        read_image(path)
    return size


_TAIL = 4096
"""Bytes at the end of a file in which the mark of its end is looked for: cameras append to it."""


def check_size(path: Path, true_size: tuple[int, int], size: tuple[int, int], by: object) -> None:
    """That ``by`` gives the true (height, width) of an image.

    Raises:
        ValueError: it is another size.
    """
    if size != true_size:
        why = "the annotations are of another image"
        if size == true_size[::-1]:
            why = "height and width are swapped"
            with open_image(path) as file:
                if (file.height, file.width) == size:
                    why = (
                        "the annotations are of the image as it was before its EXIF data turned "
                        "it: take these away (exiftool -Orientation= FILE), or annotate it anew"
                    )
        raise ValueError(
            f"{by} says {size[1]}×{size[0]} pixels, but {path} is {true_size[1]}×{true_size[0]}: "
            f"{why}"
        )


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files in a folder and those below it, in order; as :func:`list_files`."""
    return list_files(folder, SUFFIXES)


def list_files(folder: str | os.PathLike[str], suffixes: tuple[str, ...]) -> list[Path]:
    """The files with one of some suffixes, in small letters, in a folder and those below it, links
    followed, in order; hidden ones are left out."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (f for f in files if f.lower().endswith(suffixes) and not f.startswith("."))
        found += [path for name in names if (path := Path(place, name)).is_file()]
    return sorted(found)


def match_images(
    names: Sequence[str], folder: str | os.PathLike[str], listed_by: str | os.PathLike[str]
) -> list[Path]:
    """The files that ``names`` mean: paths within ``folder``, or, where one is missing, its last
    part anywhere below it.

    Raises:
        FileNotFoundError: one is not there.
        ValueError: several files could be meant.
    """
    folder = Path(folder)
    below: dict[str, list[Path]] | None = None
    found: dict[Path, str] = {}
    for name in names:
        path = folder / name.replace("\\", "/")
        if not os.path.isfile(path):  # unlike Path's it takes any text
            if below is None:
                below = {}
                for image in list_images(folder):
                    below.setdefault(image.name, []).append(image)
            same = below.get(path.name, [])
            if len(same) > 1:
                raise ValueError(
                    f"{listed_by} lists {name!r}, and there are several of that name: {same[0]}, "
                    f"{same[1]}"
                )
            if not same:
                raise FileNotFoundError(
                    f"no image at {path}, which {listed_by} lists: its file names must be relative "
                    "to the image folder"
                )
            (path,) = same
        if path in found:
            raise ValueError(
                f"{listed_by} lists {found[path]!r} and {name!r}, but there is one file for both: "
                f"{path}"
            )
        found[path] = name
    return list(found)


def _mentions(path: str | os.PathLike[str], marks: Sequence[bytes]) -> bool:
    content = Path(path).read_bytes()
    return any(mark in content for mark in marks)


def _scaled(grey: np.ndarray) -> np.ndarray:
    """Numbers of any range as uint8; what is not finite, or marks missing data as the largest
    floats do, is black."""
    grey = grey.astype(np.float64)
    valid = np.abs(grey) < MISSING  # false for NaN
    if not valid.any():
        return np.zeros(grey.shape, np.uint8)
    own = grey[valid]
    low, high = float(own.min()), float(own.max())
    full = next((full for full in (1.0, 255.0) if low >= 0 and high <= full), None)
    if full is not None:
        low, high = 0.0, full
    else:
        inner = np.percentile(own, CONTRAST)
        if inner[0] < inner[1]:  # else nearly all are one value, and the few others are what counts
            low, high = inner.tolist()
    scaled = (np.where(valid, grey, low) - low) * (255 / max(high - low, 1e-30))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)
