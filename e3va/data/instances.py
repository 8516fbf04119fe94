"""Instances on images, from whatever format, as the content of a COCO JSON file.

Each format's reader adds what it finds; what cannot be trained on is left out and counted by
reason, what cannot be meant ends the reading and is named.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e3va.data import geometry
from e3va.data.geometry import Unusable

CLIPPED = "box reaching out of its image"


@dataclass
class Instances:
    """The images of a split and what is on them.

    Attributes:
        source: the file or folder that they come from, for messages.
        categories: COCO's, ordered by id.
        images: COCO's, ``file_name`` being the whole path; their ids are unique.
        annotations: COCO's, with ``bbox`` clipped to the image, ``area``, ``iscrowd`` (0 or 1) and
            a ``segmentation`` where there is a mask.
        dropped: instances left out, by reason.
        clipped: instances kept whose boxes reached out of their image by more than a pixel or so.
        examples: where the first instance is that was dropped for a reason, or :data:`CLIPPED`.
        notes: what a user should know of how they were read.
    """

    source: str
    categories: list[dict[str, Any]]
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    clipped: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Names of the categories, ordered by id."""
        return [category["name"] for category in self.categories]

    @property
    def has_masks(self) -> bool:
        return any("segmentation" in annotation for annotation in self.annotations)

    def counts(self) -> dict[str, int]:
        """Instances of each class, crowds left out."""
        number = Counter(a["category_id"] for a in self.annotations if not a["iscrowd"])
        return {category["name"]: number[category["id"]] for category in self.categories}

    def empty(self) -> list[int]:
        """Positions of the images that have no instance, crowds left out."""
        full = {a["image_id"] for a in self.annotations if not a["iscrowd"]}
        return [i for i, image in enumerate(self.images) if image["id"] not in full]

    def add_image(
        self, path: Path, height: int, width: int, image_id: Any = None, **more: Any
    ) -> dict[str, Any]:
        """An image; its id is counted from 1 where none is given."""
        image = {
            **more,
            "id": len(self.images) + 1 if image_id is None else image_id,
            "file_name": str(path),
            "height": height,
            "width": width,
        }
        self.images.append(image)
        return image

    def add(
        self,
        image: Mapping[str, Any],
        category_id: Any,
        bbox: Sequence[float] | None,
        segmentation: Any = None,
        *,
        where: str,
        crowd: bool = False,
        wants_mask: bool = False,
        **more: Any,
    ) -> None:
        """An instance on ``image``, if it is usable.

        Args:
            image: as :meth:`add_image` gave it.
            category_id: id of its category.
            bbox: [x, y, width, height]; None: the extent of its mask.
            segmentation: polygons or a run-length encoding; None: no mask.
            where: names it, in messages.
            crowd: neither trained on nor scored.
            wants_mask: whether its mask is wanted: it is left out where it has none; else its box
                alone is kept.
            more: further entries of the annotation, such as ``area``.

        Raises:
            ValueError: its geometry cannot be meant.
        """
        height, width = image["height"], image["width"]
        mask = None
        try:
            if wants_mask or bbox is None:
                mask = geometry.check_segmentation(segmentation, height, width)
            if bbox is None:
                assert mask is not None
                x1, y1, x2, y2 = mask.extent()
                bbox = [x1, y1, x2 - x1, y2 - y1]
            box = geometry.clip_box(bbox, height, width)
            if mask is not None:
                geometry.check_mask_in_box(mask, box)
        except Unusable as reason:
            self.drop(str(reason), where=where)
            return
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
        if geometry.is_cut(bbox, box):
            self.clipped += 1
            self.examples.setdefault(CLIPPED, where)
        x1, y1, x2, y2 = box
        annotation = {
            "area": (x2 - x1) * (y2 - y1),
            **more,
            "id": len(self.annotations) + 1,
            "image_id": image["id"],
            "category_id": category_id,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "iscrowd": int(crowd),
        }
        if mask is not None and wants_mask:
            annotation["segmentation"] = mask.segmentation
        self.annotations.append(annotation)

    def drop(self, reason: str, count: int = 1, where: str | None = None) -> None:
        """Count instances that are left out; ``where`` names the first."""
        self.dropped[reason] += count
        if where:
            self.examples.setdefault(reason, where)

    def warn(self, logger: logging.Logger) -> None:
        """Tell what was dropped, and why, and what was clipped, in one warning."""
        told = []
        if self.dropped:
            reasons = "; ".join(
                f"{number}: {reason}{self._example(reason)}"
                for reason, number in self.dropped.items()
            )
            total = len(self.annotations) + self.dropped.total()
            told.append(f"dropped {self.dropped.total()} of {total} instances ({reasons})")
        if self.clipped:
            example = self._example(CLIPPED)
            told.append(f"clipped {self.clipped} boxes to their images{example}")
        if told:
            logger.warning("%s: %s", self.source, ", ".join(told))

    def _example(self, reason: str) -> str:
        return f", such as {self.examples[reason]}" if reason in self.examples else ""

    def content(self) -> dict[str, Any]:
        """As a COCO JSON file has it."""
        return {
            "info": {"description": f"read from {self.source} by E3VA"},
            "images": self.images,
            "categories": self.categories,
            "annotations": self.annotations,
        }

    def subset(self, images: Iterable[Mapping[str, Any]]) -> Instances:
        """Those on some of the images."""
        kept = list(images)
        ids = {image["id"] for image in kept}
        return Instances(
            self.source,
            self.categories,
            [dict(image) for image in kept],
            [a for a in self.annotations if a["image_id"] in ids],
        )

    def renamed(self, names: Mapping[str, str | None], classes: Sequence[str]) -> Instances:
        """With other classes: ``names`` of the old ones, None where one is left out."""
        numbers = {name: number for number, name in enumerate(classes, start=1)}
        new = {
            category["id"]: numbers[name]
            for category in self.categories
            if (name := names.get(category["name"])) is not None
        }
        kept = [
            {**a, "category_id": new[a["category_id"]]}
            for a in self.annotations
            if a["category_id"] in new
        ]
        result = Instances(self.source, categories_of(classes), self.images, kept)
        result.dropped, result.notes = self.dropped.copy(), list(self.notes)
        result.clipped, result.examples = self.clipped, dict(self.examples)
        if left_out := len(self.annotations) - len(kept):
            result.drop("class left out", left_out)
        return result


def categories_of(names: Iterable[str]) -> list[dict[str, Any]]:
    """COCO's categories of class names, counted from 1."""
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
