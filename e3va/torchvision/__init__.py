"""E³VA in torchvision's detectors: models, training loop and evaluation."""

try:
    import torchvision as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "e3va.torchvision needs torchvision: pip install 'e3va[torchvision]'"
    ) from error

from e3va.torchvision.config import ModelConfig, TrainConfig
from e3va.torchvision.evaluation import detect, evaluate
from e3va.torchvision.model import build_detector, faster_rcnn, mask_rcnn, retinanet
from e3va.torchvision.run import build_model, load_run

__all__ = [
    "ModelConfig",
    "TrainConfig",
    "build_detector",
    "build_model",
    "detect",
    "evaluate",
    "faster_rcnn",
    "load_run",
    "mask_rcnn",
    "retinanet",
]
