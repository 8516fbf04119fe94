"""The demo's pictures, drawn from its results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO

from e3va.figures import pyplot, save

SCENES = 4
MIN_SCORE = 0.5
plt = pyplot()
COLOURS = plt.get_cmap("tab10").colors


def predictions(path: Path, coco_root: Path, detections: dict[str, list[dict[str, Any]]]) -> None:
    """Some validation scenes: ground truth, then each method's detections over a score of 0.5."""
    coco = COCO(coco_root / "annotations/instances_val.json")
    scenes = [image for image in coco.dataset["images"] if coco.getAnnIds(image["id"])][:SCENES]
    columns = ["ground truth", *detections]
    figure, axes = plt.subplots(
        len(scenes), len(columns), figsize=(3 * len(columns), 2.5 * len(scenes)), squeeze=False
    )
    for row, scene in zip(axes, scenes, strict=True):
        image = np.asarray(Image.open(coco_root / "images/val" / scene["file_name"]).convert("RGB"))
        truth = coco.loadAnns(coco.getAnnIds(scene["id"]))
        found = [
            [d for d in results if d["image_id"] == scene["id"] and d["score"] >= MIN_SCORE]
            for results in detections.values()
        ]
        for axis, instances in zip(row, [truth, *found], strict=True):
            _draw(axis, coco, image, instances)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title)
    _save(figure, path)


def curves(
    path: Path, losses: dict[str, list[tuple[int, float]]], results: dict[str, dict[str, Any]]
) -> None:
    """Training loss by iteration, and what the accuracy of each method costs in memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for method, points in losses.items():
        iteration, loss = np.array(points).T
        window = max(1, len(loss) // 20)
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        left.plot(iteration[window - 1 :], smooth, label=method)
    left.set(xlabel="iteration", ylabel=f"loss (mean of {window})", title="training")
    left.legend()
    for method, result in results.items():
        right.scatter(result["peak_live_bytes"] / 2**20, result["mask_ap"], s=60)
        right.annotate(
            method,
            (result["peak_live_bytes"] / 2**20, result["mask_ap"]),
            xytext=(6, 6),
            textcoords="offset points",
        )
    right.set(xlabel="peak live MiB in a step", ylabel="mask AP", title="accuracy and its cost")
    right.set_xlim(left=0)
    right.margins(0.2)
    _save(figure, path)


def _draw(axis: Axes, coco: COCO, image: np.ndarray, instances: list[dict[str, Any]]) -> None:
    overlay = image.astype(float) / 255
    axis.set_axis_off()
    for instance in instances:
        colour = COLOURS[instance["category_id"] % len(COLOURS)]
        mask = masks.decode(instance["segmentation"]).astype(bool)
        overlay[mask] = 0.4 * overlay[mask] + 0.6 * np.array(colour)
        x, y, _, _ = instance["bbox"]
        name = coco.cats[instance["category_id"]]["name"]
        axis.text(x, y, name, color="white", fontsize=9, va="bottom", bbox=_label(colour))
    axis.imshow(overlay)


def _label(colour: tuple[float, ...]) -> dict[str, Any]:
    return {"facecolor": colour, "edgecolor": "none", "pad": 1}


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    save(figure, path)
