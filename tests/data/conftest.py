"""Small data sets in COCO's format, made as tests need them."""

import itertools
import json

import numpy as np
from PIL import Image

from e3va.data.coco import CocoInstances


def rectangle(x, y, w, h, kind="polygon", size=(60, 80)):
    if kind == "polygon":
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    import pycocotools.mask

    mask = np.zeros(size, dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    encoded = pycocotools.mask.encode(mask)
    if kind == "rle":
        return {"size": list(size), "counts": encoded["counts"].decode()}
    runs = [len(list(run)) for _, run in itertools.groupby(mask.flatten(order="F"))]
    return {"size": list(size), "counts": [0] * int(mask[0, 0]) + runs}  # zeros come first


def coco_tree(folder, images=4, extra=(), seed=0):
    """A COCO tree of coloured rectangles; its ids start at 0 and its categories have gaps."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 7, "name": "wide"}, {"id": 3, "name": "tall"}]
    for i in range(images):
        pixels = random.integers(0, 80, (60, 80, 3), dtype=np.uint8)
        record = {"id": i, "file_name": f"{i}.png", "width": 80, "height": 60}
        content["images"].append(record)
        for j, kind in enumerate(("polygon", "rle", "counts")[: i % 4]):
            w, h = ((24, 12), (12, 24))[j % 2]
            x, y = int(random.integers(0, 80 - w)), int(random.integers(0, 60 - h))
            pixels[y : y + h, x : x + w] = (200, 90, 0) if w > h else (0, 90, 200)
            annotation = {
                "id": len(content["annotations"]),
                "image_id": i,
                "category_id": 7 if w > h else 3,
                "bbox": [x, y, w, h],
                "segmentation": rectangle(x, y, w, h, kind),
            }
            content["annotations"].append(annotation)
        Image.fromarray(pixels).save(folder / record["file_name"])
    content["annotations"] += extra
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def coco(folder, masks=True, **options):
    return CocoInstances(coco_tree(folder, **options), folder, masks=masks)


def annotation(bbox, segmentation=None, **more):
    return {
        "id": 99,
        "image_id": 0,
        "category_id": 3,
        "bbox": bbox,
        "segmentation": rectangle(4, 4, 9, 9) if segmentation is None else segmentation,
        **more,
    }
