"""Image files, whatever they are, as a model is to see them: [H, W, 3], uint8, RGB, upright."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
"""Of the files in a folder that are taken for images, in small letters."""

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """The pixels of an image: [H, W, 3], uint8, RGB, turned as its EXIF data say.

    Grey images of 16 or 32 bits, as microscopes and depth cameras make them, are scaled from the
    range of their own values to 0..255, and float images from [0, 1] if they lie in it, else from
    their own range; what is transparent is seen on black.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, damaged, or larger than Pillow trusts; names the file.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                grey = _scaled(np.asarray(image.convert("F") if image.mode != "I" else image))
                return np.repeat(grey[..., None], 3, axis=2)
            if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
                image = image.convert("RGBA")
                canvas = Image.new("RGBA", image.size, (0, 0, 0, 255))
                image = Image.alpha_composite(canvas, image)
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image of a kind that Pillow reads") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged, cannot be read as an image: {error}") from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of an image as :func:`read_image` gives it; only the file's head is read.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_image`.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            turned = file.getexif().get(_ORIENTATION) in _TURNED
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image of a kind that Pillow reads") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged, cannot be read as an image: {error}") from error
    return (width, height) if turned else (height, width)


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files in a folder and those below it, in order; hidden ones are left out."""
    folder = Path(folder)
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


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
    found = []
    for name in names:
        path = folder / name.replace("\\", "/")
        if not path.is_file():
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
        found.append(path)
    return found


def _scaled(grey: np.ndarray) -> np.ndarray:
    """Numbers of any range as uint8; what is not finite is black."""
    grey = np.where(np.isfinite(grey), grey, 0).astype(np.float64)
    low, high = float(grey.min(initial=np.inf)), float(grey.max(initial=-np.inf))
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    if low >= 0 and 1 < high <= 255:
        low, high = 0.0, 255.0
    if not high > low:
        return np.zeros(grey.shape, np.uint8)
    return np.rint((grey - low) * (255 / (high - low))).astype(np.uint8)
