"""Small data of each format, as people have them."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as masks

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60)}


def scene(seed, height=72, width=96):
    """A picture with a red and a green rectangle: pixels, and (name, x, y, w, h) of each."""
    random = np.random.default_rng(seed)
    pixels = random.integers(90, 130, (height, width, 3), dtype=np.uint8)
    boxes = []
    for i, (name, colour) in enumerate(COLOURS.items()):
        w, h = random.integers(18, 30, 2).tolist()
        x, y = i * width // 2 + int(random.integers(0, 12)), int(random.integers(2, height - h - 2))
        pixels[y : y + h, x : x + w] = colour
        boxes.append((name, x, y, w, h))
    return pixels, boxes


def polygon(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def encoding(x, y, w, h, height=72, width=96):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = masks.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def write_coco(root, splits=("train", "valid"), images=4, encoded=()):
    """Roboflow's layout; the masks of ``encoded`` splits are run-length encodings."""
    for s, split in enumerate(splits):
        (root / split).mkdir(parents=True)
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(COLOURS)]
        for i in range(images):
            pixels, boxes = scene(100 * s + i)
            Image.fromarray(pixels).save(root / split / f"{i}.jpg", quality=95)
            content["images"].append({"id": i, "file_name": f"{i}.jpg", "height": 72, "width": 96})
            for name, *box in boxes:
                mask = encoding(*box) if split in encoded else [polygon(*box)]
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]),
                        "image_id": i,
                        "category_id": list(COLOURS).index(name),
                        "bbox": box,
                        "segmentation": mask,
                    }
                )
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def write_yolo(root, images=5):
    """A data.yaml with one split, of boxes."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for i in range(images):
        pixels, boxes = scene(i)
        Image.fromarray(pixels).save(root / f"images/{i}.png")
        lines = [
            f"{list(COLOURS).index(name)} {(x + w / 2) / 96} {(y + h / 2) / 72} {w / 96} {h / 72}"
            for name, x, y, w, h in boxes
        ]
        (root / f"labels/{i}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text("train: images\nnames: [red, green]\n")
    return root


def write_maps(root, images=5):
    """Black and white masks of the red rectangle."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(images):
        pixels, ((_, x, y, w, h), _) = scene(i)
        mask = np.zeros(pixels.shape[:2], np.uint8)
        mask[y : y + h, x : x + w] = 255
        Image.fromarray(pixels).save(root / f"images/{i}.jpg", quality=95)
        Image.fromarray(mask).save(root / f"masks/{i}.png")
    return root
