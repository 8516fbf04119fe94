"""E³VA for Detectron2: backbones and a head in its registries, config keys, data sets, a trainer.
``train_net.py`` at the root of the repository is the script that puts them together."""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "e3va.detectron2 needs Detectron2, which is installed from its own sources: "
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
    ) from error

from e3va.detectron2.average import WeightAverage
from e3va.detectron2.backbone import (
    BottomUp,
    build_e3va_swin_backbone,
    build_e3va_swin_fpn_backbone,
    build_e3va_swin_retinanet_fpn_backbone,
    with_weights,
)
from e3va.detectron2.checkpoint import CompleteCheckpointer, SafeCheckpointer
from e3va.detectron2.config import add_e3va_config, load_config
from e3va.detectron2.data import register_datasets
from e3va.detectron2.data.coco import register_coco_json
from e3va.detectron2.data.maps import register_semantic_maps
from e3va.detectron2.data.voc import register_voc_tree
from e3va.detectron2.evaluation import VOCTreeEvaluator
from e3va.detectron2.fpn import LeanConv2d, LeanFPN
from e3va.detectron2.inference import SemanticInference
from e3va.detectron2.retinanet import LeanRetinaNet
from e3va.detectron2.roi_heads import (
    LeanCascadeROIHeads,
    LeanConvFCHead,
    LeanROIAlign,
    LeanROIHeads,
)
from e3va.detectron2.rpn import SampledRPN
from e3va.detectron2.train import Trainer
from e3va.detectron2.upernet import UPerNetHead

__all__ = [
    "BottomUp",
    "CompleteCheckpointer",
    "LeanCascadeROIHeads",
    "LeanConv2d",
    "LeanConvFCHead",
    "LeanFPN",
    "LeanROIAlign",
    "LeanROIHeads",
    "LeanRetinaNet",
    "SafeCheckpointer",
    "SampledRPN",
    "SemanticInference",
    "Trainer",
    "UPerNetHead",
    "VOCTreeEvaluator",
    "WeightAverage",
    "add_e3va_config",
    "build_e3va_swin_backbone",
    "build_e3va_swin_fpn_backbone",
    "build_e3va_swin_retinanet_fpn_backbone",
    "load_config",
    "register_coco_json",
    "register_datasets",
    "register_semantic_maps",
    "register_voc_tree",
    "with_weights",
]
