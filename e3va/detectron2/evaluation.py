"""What scores predictions: COCO's and Pascal VOC's average precision, and mIoU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator, SemSegEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec

from e3va.data.voc import CORNERS
from e3va.files import write_json


def build_coco_evaluator(cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
    """COCO's average precision of boxes and, with MODEL.MASK_ON, of masks."""
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    metadata = MetadataCatalog.get(dataset_name)
    if hasattr(metadata, "instances") and not hasattr(metadata, "json_file"):
        # pycocotools is shown what was read, completed and checked, and not the file itself.
        path = Path(_folder(cfg)) / "ground_truth.json"
        write_json(path, metadata.instances.content())
        metadata.json_file = str(path)
    return _COCOEvaluator(dataset_name, tasks, output_dir=_folder(cfg))


class _COCOEvaluator(COCOEvaluator):
    """Detectron2's, but a model that predicts nothing scores zero and not NaN, so that a run has a
    best model from its first evaluation on."""

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        return results if coco_eval else dict.fromkeys(results, 0.0)


def build_semantic_evaluator(
    cfg: CfgNode, dataset_name: str, read_map: Callable[[str], np.ndarray]
) -> SemSegEvaluator:
    """Detectron2's mIoU, against maps [H, W] that ``read_map`` reads."""
    return SemSegEvaluator(
        dataset_name,
        output_dir=_folder(cfg),
        sem_seg_loading_fn=lambda path, dtype: read_map(path).astype(dtype),
    )


class VOCTreeEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's AP of Pascal VOC (2012: the area under the curve) of one's own tree.

    Scored are the boxes that the data set has loaded, so that tags that Detectron2's evaluator
    demands may be missing; the mean is over the classes that occur.

    Args:
        dataset_name: as :func:`~e3va.detectron2.data.voc.register_voc_tree` has registered it.
    """

    _predictions: dict[int, list[str]]

    def __init__(self, dataset_name: str) -> None:
        super().__init__(dataset_name)
        self._records = DatasetCatalog.get(dataset_name)
        # The files between prediction and score are separated by blanks, which a name may have.
        self._numbers = {record["image_id"]: i for i, record in enumerate(self._records)}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        numbered = [{"image_id": self._numbers[sample["image_id"]]} for sample in inputs]
        super().process(numbered, outputs)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """ "AP", "AP50" and "AP75" under "bbox"; None in all processes but the first."""
        present = sorted(
            {
                annotation["category_id"]
                for record in self._records
                for annotation in record["annotations"]
                if not annotation["difficult"]
            }
        )
        self._class_names = [str(label) for label in present]
        self._predictions = {i: self._predictions[label] for i, label in enumerate(present)}
        with tempfile.TemporaryDirectory(prefix="e3va_voc_") as folder:
            for i, record in enumerate(self._records):
                _write_annotations(Path(folder) / f"{i}.xml", record["annotations"])
            names = Path(folder) / "images.txt"
            names.write_text("".join(f"{i}\n" for i in range(len(self._records))))
            self._anno_file_template = os.path.join(folder, "{}.xml")
            self._image_set_path = str(names)
            try:
                return super().evaluate()
            finally:
                parse_rec.cache_clear()


def _folder(cfg: CfgNode) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "inference")


def _write_annotations(path: Path, annotations: list[dict[str, Any]]) -> None:
    """What Detectron2's evaluator reads, with numbers for names."""
    root = ElementTree.Element("annotation")
    for annotation in annotations:
        item = ElementTree.SubElement(root, "object")
        tags = {"name": annotation["category_id"], "difficult": int(annotation["difficult"])}
        for tag, value in {**tags, "pose": "", "truncated": 0}.items():
            ElementTree.SubElement(item, tag).text = str(value)
        corners = ElementTree.SubElement(item, "bndbox")
        x1, y1, x2, y2 = annotation["bbox"]
        for corner, value in zip(CORNERS, (x1 + 1, y1 + 1, x2, y2), strict=True):
            ElementTree.SubElement(corners, corner).text = str(round(value))
    ElementTree.ElementTree(root).write(path)
