"""E³VA: fine-tune big frozen vision backbones for detection and segmentation on small GPUs."""

from e3va import native as native  # attaches the compiled kernels to the ops
from e3va import triton as triton
from e3va.adapter import load_adapter, save_adapter
from e3va.backbone import E3VABackbone, SwinBackbone, build_backbone
from e3va.config import HighwayConfig, SwinConfig, swin_config
from e3va.highway import Highway
from e3va.ops.dispatch import backend
from e3va.precision import quantize_trunk
from e3va.trunk import FrozenSwin, Swin
from e3va.weights import load_trunk, open_trunk, save_trunk

__version__ = "0.1.0"

__all__ = [
    "E3VABackbone",
    "FrozenSwin",
    "Highway",
    "HighwayConfig",
    "Swin",
    "SwinBackbone",
    "SwinConfig",
    "backend",
    "build_backbone",
    "load_adapter",
    "load_trunk",
    "open_trunk",
    "quantize_trunk",
    "save_adapter",
    "save_trunk",
    "swin_config",
]
