"""E³VA in torchvision's detectors: Mask R-CNN, its training loop and evaluation."""

try:
    import torchvision as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "e3va.torchvision needs torchvision: pip install 'e3va[torchvision]'"
    ) from error

from e3va.torchvision.evaluation import detect, evaluate
from e3va.torchvision.model import mask_rcnn

__all__ = ["detect", "evaluate", "mask_rcnn"]
