"""*Digits in scenes*: handwritten digits on photographs, with exact instance masks.

Digits and photographs come with scikit-learn (``load_digits``, ``load_sample_images``). The digits
are split into three disjoint pools: one to pretrain on, one for training scenes, one for
validation scenes. The photographs are split too: validation scenes lie on their right quarter. What
is chosen by trying, as a learning rate is, is chosen on tuning scenes, which are neither trained on
nor reported: their digits are those of the pretraining.

    python -m e3va.demo.digits [--output output/demo/digits] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm import tqdm

from e3va.files import atomic_path

CLASSES = tuple(str(digit) for digit in range(10))
PIXEL_MEAN = (123.675, 116.28, 103.53)
"""ImageNet's mean of R, G, B in 0..255, which the embedded trunk expects too."""
PIXEL_STD = (58.395, 57.12, 57.375)

POOLS = ("pretrain", "train", "val")
MIN_DIGIT, MAX_DIGIT = 14, 48
"""Height of a digit in pixels."""
DIGITS_PER_SCENE = (3, 8)
MIN_VISIBLE = 0.5
"""Fraction of a digit's pixels that those in front of it leave visible."""

_MANIFEST = "digits.json"


class Scene(NamedTuple):
    """An image and its instances.

    Attributes:
        image: [H, W, 3], uint8, RGB.
        masks: visible pixels of each digit, [instances, H, W], bool, disjoint.
        labels: the digits, [instances].
    """

    image: np.ndarray
    masks: np.ndarray
    labels: np.ndarray


SPLITS = {"train": "train", "val": "val", "tune": "pretrain"}
"""Splits of the scenes, each with the pool that its digits are of."""

_ADE20K = {"train": "training", "val": "validation", "tune": "tuning"}


def digit_pool(pool: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a pool: "pretrain" (a half), "train" or "val" (a quarter each).

    Returns:
        images [n, 8, 8] in 0..1 and labels [n].

    Raises:
        ValueError: no such pool.
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
    images, labels = _digits()
    part = np.random.default_rng(0).permutation(len(labels)) % 4
    chosen = {"pretrain": part < 2, "train": part == 2, "val": part == 3}[pool]
    return images[chosen], labels[chosen]


def background(pool: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A random crop of the pool's part of a photograph, perhaps mirrored: [H, W, 3], 0..255.

    Raises:
        ValueError: the crop does not fit into that part.
    """
    photo = _photos()[rng.integers(2)]
    border = photo.shape[1] * 3 // 4
    photo = photo[:, border:] if pool == "val" else photo[:, :border]
    if not (1 <= height <= photo.shape[0] and 1 <= width <= photo.shape[1]):
        raise ValueError(
            f"size must be at least 1×1 and at most {photo.shape[0]}×{photo.shape[1]} pixels, "
            f"got {height}×{width}"
        )
    top = rng.integers(photo.shape[0] - height + 1)
    left = rng.integers(photo.shape[1] - width + 1)
    crop = photo[top : top + height, left : left + width].astype(np.float32)
    return crop[:, ::-1].copy() if rng.random() < 0.5 else crop


def paste(
    canvas: np.ndarray, digit: np.ndarray, height: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Draw a digit at a random place, angle and tint.

    Args:
        canvas: [H, W, 3], 0..255, float; changed in place.
        digit: [8, 8] in 0..1.
        height: of the digit, in pixels.

    Returns:
        Its pixels, [H, W], bool; None, with the canvas unchanged, if it does not fit.
    """
    alpha = _render(digit, height, rng)
    free = np.array(canvas.shape[:2]) - alpha.shape
    if (free < 0).any():
        return None
    top, left = rng.integers(free + 1)
    bottom, right = top + alpha.shape[0], left + alpha.shape[1]
    under = canvas[top:bottom, left:right]
    tint = _tint(under, rng)
    canvas[top:bottom, left:right] = under + alpha[..., None] * (tint - under)
    mask = np.zeros(canvas.shape[:2], bool)
    mask[top:bottom, left:right] = alpha >= 0.5
    return mask


def make_scene(pool: str, height: int, width: int, rng: np.random.Generator) -> Scene:
    """A photograph's crop with a few digits of the pool, partly in front of each other."""
    images, labels = digit_pool(pool)
    canvas = background(pool, height, width, rng)
    wanted = rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1)
    largest = min(MAX_DIGIT, height // 2, width // 2)
    masks: list[np.ndarray] = []
    whole: list[int] = []
    chosen: list[int] = []
    for _ in range(20 * wanted):
        if len(masks) == wanted:
            break
        index = rng.integers(len(labels))
        attempt = canvas.copy()
        size = round(np.exp(rng.uniform(np.log(MIN_DIGIT), np.log(largest))))
        mask = paste(attempt, images[index], size, rng)
        if mask is None or not mask.any():
            continue
        visible = [m & ~mask for m in masks]
        if any(v.sum() < MIN_VISIBLE * area for v, area in zip(visible, whole, strict=True)):
            continue
        canvas, masks = attempt, [*visible, mask]
        whole.append(int(mask.sum()))
        chosen.append(int(labels[index]))
    noisy = canvas + rng.normal(0, 4, canvas.shape)
    return Scene(np.clip(noisy, 0, 255).astype(np.uint8), np.stack(masks), np.array(chosen))


def write_digits(
    root: str | Path,
    *,
    train: int = 400,
    val: int = 100,
    tune: int = 100,
    size: tuple[int, int] = (128, 160),
    seed: int = 0,
) -> Path:
    """Write the scenes as COCO, Pascal VOC and semantic maps; a tree already there is kept.

    ``root/coco/images/{train,val,tune}``, ``root/coco/annotations/instances_{train,val,tune}.json``
    (masks as RLE); ``root/voc`` in the layout of VOC; ``root/semantic`` in that of ADE20K, where 0
    is unlabelled and 1 the digit 0 (training, validation, tuning). The same arguments give the same
    bytes.

    Args:
        root: a folder that is not there yet, or an earlier one of this function, which is
            replaced as a whole if it was written with other arguments.
        train, val, tune: number of scenes.
        size: (height, width) of a scene in pixels.
        seed: of everything random.

    Raises:
        TypeError: a number is no integer.
        ValueError: a number is out of range.
        FileExistsError: ``root`` holds something else.
    """
    counts = {"train": train, "val": val, "tune": tune}
    for name, value in counts.items():
        _check_int(name, value, 1)
    _check_int("seed", seed, 0)
    for name, value in zip(("height", "width"), size, strict=True):
        _check_int(name, value, 2 * MIN_DIGIT + 4)
    root = Path(root)
    manifest = {**counts, "size": list(size), "seed": seed, "format": 2}
    if root.exists():
        if not (root / _MANIFEST).is_file():
            raise FileExistsError(f"{root} exists and holds no digits in scenes: choose another")
        if json.loads((root / _MANIFEST).read_text()) == manifest:
            return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        new = Path(temporary) / "new"
        for number, (split, pool) in enumerate(SPLITS.items()):
            rng = np.random.default_rng([seed, number])
            scenes = (make_scene(pool, *size, rng) for _ in range(counts[split]))
            bar = tqdm(scenes, total=counts[split], desc=f"digits {split}", unit="scene")
            _write_split(new, split, bar)
        (new / _MANIFEST).write_text(json.dumps(manifest) + "\n")
        if root.exists():
            root.rename(Path(temporary) / "old")
        new.rename(root)
    return root


def _write_split(root: Path, split: str, scenes: Iterator[Scene]) -> None:
    from pycocotools import mask as rle

    ade = _ADE20K[split]
    folders = {
        "coco": root / "coco/images" / split,
        "voc": root / "voc/JPEGImages",
        "semantic": root / "semantic/images" / ade,
        "maps": root / "semantic/annotations" / ade,
        "xml": root / "voc/Annotations",
        "sets": root / "voc/ImageSets/Main",
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, scene in enumerate(scenes):
        name = f"{split}_{i:06d}"
        height, width = scene.image.shape[:2]
        photo = folders["coco"] / f"{name}.jpg"
        Image.fromarray(scene.image).save(photo, quality=95)
        for other in ("voc", "semantic"):
            shutil.copyfile(photo, folders[other] / photo.name)
        images.append({"id": i + 1, "file_name": photo.name, "height": height, "width": width})
        boxes = []
        semantic = np.zeros((height, width), np.uint8)
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
            boxes.append([int(value) for value in rle.toBbox(encoded)])
            semantic[mask] = label + 1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": int(label) + 1,
                    "segmentation": {
                        "size": [height, width],
                        "counts": encoded["counts"].decode("ascii"),
                    },
                    "area": int(mask.sum()),
                    "bbox": boxes[-1],
                    "iscrowd": 0,
                }
            )
        Image.fromarray(semantic).save(folders["maps"] / f"{name}.png")
        _write_voc(folders["xml"] / f"{name}.xml", (height, width), scene.labels, boxes)
    names = "".join(f"{Path(image['file_name']).stem}\n" for image in images)
    (folders["sets"] / f"{split}.txt").write_text(names)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    with atomic_path(root / f"coco/annotations/instances_{split}.json") as path:
        path.write_text(json.dumps(content))


def _write_voc(path: Path, size: tuple[int, int], labels: np.ndarray, boxes: list[Any]) -> None:
    def add(parent: ElementTree.Element, **values: object) -> None:
        for key, value in values.items():
            ElementTree.SubElement(parent, key).text = str(value)

    root = ElementTree.Element("annotation")
    add(root, folder="voc", filename=f"{path.stem}.jpg")
    add(ElementTree.SubElement(root, "size"), width=size[1], height=size[0], depth=3)
    for label, (x, y, width, height) in zip(labels, boxes, strict=True):
        item = ElementTree.SubElement(root, "object")
        add(item, name=CLASSES[label], difficult=0, truncated=0)
        # VOC counts pixels from 1 and includes the last.
        box = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
        add(ElementTree.SubElement(item, "bndbox"), **box)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path)


def _render(digit: np.ndarray, height: int, rng: np.random.Generator) -> np.ndarray:
    """Its opacity at a random angle and width, cropped to what is visible: [h, w] in 0..1."""
    aspect = rng.uniform(0.8, 1.2)
    image = Image.fromarray((digit * 255).astype(np.uint8))
    image = image.resize((max(1, round(height * aspect)), height), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)
    # A steeper ramp than the pen's, so that strokes have an edge.
    alpha = np.clip((np.asarray(image, np.float32) / 255 - 0.25) * 2.5, 0, 1)
    rows, columns = (np.flatnonzero(alpha.max(axis) >= 0.5) for axis in (1, 0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _tint(under: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour that can be told from what lies under it."""
    mean = under.mean((0, 1))
    candidates = rng.uniform(0, 255, (4, 3)).astype(np.float32)
    return candidates[np.abs(candidates - mean).sum(1).argmax()]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    datasets = _sklearn_datasets()
    digits = datasets.load_digits()
    return digits.images.astype(np.float32) / 16, digits.target


@cache
def _photos() -> list[np.ndarray]:
    return list(_sklearn_datasets().load_sample_images().images)


def _sklearn_datasets() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        message = "digits in scenes needs scikit-learn: pip install 'e3va[demo]'"
        raise ImportError(message) from error
    return datasets


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m e3va.demo.digits", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("output/demo/digits"))
    parser.add_argument("--train", type=int, default=400, help="scenes (default 400)")
    parser.add_argument("--val", type=int, default=100, help="scenes (default 100)")
    parser.add_argument("--tune", type=int, default=100, help="scenes (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    counts = {split: getattr(options, split) for split in SPLITS}
    print(write_digits(options.output, **counts, seed=options.seed))


if __name__ == "__main__":
    main()
