"""E³VA: fine-tune big frozen vision backbones for detection and segmentation on small GPUs."""

from e3va.adapter import load_adapter, open_backbone, save_adapter
from e3va.backbone import Backbone
from e3va.config import HighwayConfig
from e3va.highway import Highway
from e3va.methods import E3VABackbone, build_backbone
from e3va.ops.dispatch import backend
from e3va.precision import quantize_trunk
from e3va.trunks import Trunk, trunk_config
from e3va.weights import load_trunk, open_trunk, save_trunk

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "E3VABackbone",
    "Highway",
    "HighwayConfig",
    "Trunk",
    "backend",
    "build_backbone",
    "load_adapter",
    "load_trunk",
    "open_backbone",
    "open_trunk",
    "quantize_trunk",
    "save_adapter",
    "save_trunk",
    "trunk_config",
]
