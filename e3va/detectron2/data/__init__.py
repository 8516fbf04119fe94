"""One's own data, named by config keys: a file for each format, and a table of them."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from e3va.detectron2.data import coco, maps, voc
from e3va.detectron2.evaluation import build_coco_evaluator

FORMATS = (coco.FORMAT, voc.FORMAT, maps.FORMAT)
"""What :mod:`e3va.detectron2.config` takes its sections of DATASETS from."""


def register_datasets(cfg: CfgNode) -> None:
    """Register the data sets that a section of cfg.DATASETS in :data:`FORMATS` names, and make
    ``cfg`` use them and their number of classes.

    Raises:
        FileNotFoundError: something that the section names is not there.
        ValueError: more than one section is given, or its data are not what they should be.
    """
    given = [f for f in FORMATS if f.is_given(cfg)]
    if len(given) > 1:
        names = " and ".join(f"DATASETS.{f.section}" for f in given)
        raise ValueError(f"{names} are both given: give one")
    for dataset_format in given:
        dataset_format.register(cfg)


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """What scores a registered data set, by its evaluator type; COCO's metrics for a type that is
    in none of :data:`FORMATS`."""
    evaluators = {kind: build for f in FORMATS for kind, build in f.evaluators.items()}
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    return evaluators.get(kind, build_coco_evaluator)(cfg, dataset_name)
