"""torchvision's own detectors over the features of a :class:`Backbone`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from e3va.backbone import Backbone

ANCHOR_SIZES = (32, 64, 128, 256, 512)
ASPECT_RATIOS = (0.5, 1.0, 2.0)

Model = TypeVar("Model", bound=nn.Module)


class BackboneFPN(nn.Module):
    """A backbone and torchvision's feature pyramid over it.

    Args:
        body: the backbone.
        out_channels: channels of each map.
        top: what makes the coarsest levels (default: "pool", every second position of the last).
        first: the first stage of the backbone that has a level (default 0).
    """

    def __init__(
        self,
        body: Backbone,
        out_channels: int,
        top: ExtraFPNBlock | None = None,
        first: int = 0,
    ) -> None:
        super().__init__()
        self.body = body
        dims = body.trunk.config.dims
        self.levels = [f"p{stage}" for stage in range(first, len(dims))]
        self.fpn = FeaturePyramidNetwork(
            list(dims[first:]), out_channels, extra_blocks=top or LastLevelMaxPool()
        )
        self.out_channels = out_channels

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [B, 3, H, W], normalised → one map [B, out_channels, h, w] per level."""
        features = self.body(image)
        return self.fpn({level: features[level] for level in self.levels})


class Float32Anchors(AnchorGenerator):
    """Anchors in float32 whatever the dtype of the features: in bfloat16, pixel positions above
    256 are no longer whole numbers."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        shapes = [torch.empty(1, device=f.device).expand(f.shape) for f in feature_maps]
        return super().forward(image_list, shapes)


def mask_rcnn(
    backbone: Backbone,
    num_classes: int,
    *,
    mask_channels: Sequence[int] = (256, 256, 256, 256),
    **options: Any,
) -> MaskRCNN:
    """torchvision's Mask R-CNN: :func:`faster_rcnn` with a mask head.

    Args:
        backbone, num_classes: see :func:`faster_rcnn`.
        mask_channels: widths of the mask head's convolutions.
        options: further arguments of :func:`faster_rcnn`, and of torchvision's MaskRCNN.

    Raises:
        TypeError, ValueError: as :func:`faster_rcnn`.
    """
    parts = _two_stages(MaskRCNN, backbone, num_classes, **options)
    _check_whole("mask_channels", mask_channels, several=True)
    channels = parts["backbone"].out_channels
    return _boxes_in_float32(
        MaskRCNN(
            **parts,
            mask_roi_pool=MultiScaleRoIAlign(
                parts["backbone"].levels, output_size=14, sampling_ratio=2
            ),
            mask_head=MaskRCNNHeads(channels, mask_channels, dilation=1),
            mask_predictor=MaskRCNNPredictor(mask_channels[-1], mask_channels[-1], num_classes),
        ),
        "rpn.head",
        "roi_heads.box_predictor",
        "roi_heads.mask_predictor",
    )


def faster_rcnn(backbone: Backbone, num_classes: int, **options: Any) -> FasterRCNN:
    """torchvision's Faster R-CNN over p0..p3 of ``backbone`` and a pooled fifth level.

    It takes and gives what torchvision's detectors do: images [3, H, W] in [0, 1], RGB, of any
    sizes; in training with targets, giving losses. Under autocast the boxes stay in float32.

    Args:
        backbone: of any tuning method; see :func:`e3va.build_backbone`.
        num_classes: number of classes *including the background*, as torchvision counts.
        options: ``out_channels`` of the FPN (default 256), ``anchor_sizes``, the side of the
            anchors on each level (default 32, 64, …, 512; one more than the backbone has stages),
            each in the aspect ratios 1:2, 1:1, 2:1; ``representation_size``, the width of the box
            head (default 1024); and further arguments of torchvision's FasterRCNN: ``min_size``,
            the shorter side that images are resized to (default 800; several: one is drawn in
            training), ``max_size``, the most that the longer side may then have (default 1333), ….

    Raises:
        TypeError: ``backbone`` is no Backbone, or torchvision knows no such option.
        ValueError: ``num_classes`` leaves no object class, the anchor sizes do not fit, or an
            option is out of range.
    """
    parts = _two_stages(FasterRCNN, backbone, num_classes, **options)
    return _boxes_in_float32(FasterRCNN(**parts), "rpn.head", "roi_heads.box_predictor")


def retinanet(
    backbone: Backbone,
    num_classes: int,
    *,
    out_channels: int = 256,
    anchor_sizes: Sequence[int] = ANCHOR_SIZES,
    **options: Any,
) -> RetinaNet:
    """torchvision's RetinaNet over p1..p3 of ``backbone`` and two coarser levels, P6 and P7.

    It takes and gives what :func:`faster_rcnn` does, labels from 1 included, but has no output for
    the background.

    Args:
        backbone, num_classes: see :func:`faster_rcnn`.
        out_channels: channels of the FPN.
        anchor_sizes: side of the smallest anchors on each level: one more than the backbone has
            stages. The others of a level are 2^⅓ and 2^⅔ times as large; each in the aspect ratios
            1:2, 1:1, 2:1.
        options: further arguments of torchvision's RetinaNet: ``min_size``, ``max_size``, ….

    Raises:
        TypeError, ValueError: as :func:`faster_rcnn`.
    """
    _check(RetinaNet, backbone, num_classes, anchor_sizes, options)
    _check_whole("out_channels", out_channels)
    top = LastLevelP6P7(backbone.trunk.config.dims[-1], out_channels)
    scales = [tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in anchor_sizes]
    model = _RetinaNet(
        BackboneFPN(backbone, out_channels, top, first=1),
        num_classes - 1,
        anchor_generator=Float32Anchors(tuple(scales), (ASPECT_RATIOS,) * len(scales)),
        **options,
    )
    return _boxes_in_float32(model, "head")


class Detector(NamedTuple):
    """A kind of detector: what builds it, and whether it trains on masks and predicts them."""

    build: Callable[..., nn.Module]
    masks: bool


DETECTORS = {
    "mask_rcnn": Detector(mask_rcnn, masks=True),
    "faster_rcnn": Detector(faster_rcnn, masks=False),
    "retinanet": Detector(retinanet, masks=False),
}


def build_detector(
    name: str, backbone: Backbone, num_classes: int, **options: Any
) -> MaskRCNN | FasterRCNN | RetinaNet:
    """The detector called ``name``, with random weights outside of ``backbone``.

    Args:
        name: one of :data:`DETECTORS`.
        backbone: of any tuning method; see :func:`e3va.build_backbone`.
        num_classes: number of classes, including the background.
        options: keyword arguments of the function that builds it.

    Raises:
        TypeError, ValueError: no such detector (the message lists them), or as that function.
    """
    if name not in DETECTORS:
        raise ValueError(f"unknown detector {name!r}; known: {', '.join(DETECTORS)}")
    return DETECTORS[name].build(backbone, num_classes, **options)


class _RetinaNet(RetinaNet):
    """torchvision's RetinaNet has an output for each label from 0 on; here labels begin at 1."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if targets is not None:
            targets = [{**target, "labels": target["labels"] - 1} for target in targets]
        found = super().forward(images, targets)
        if self.training:
            return found
        return [{**detections, "labels": detections["labels"] + 1} for detections in found]


def _two_stages(
    kind: type[FasterRCNN],
    backbone: Backbone,
    num_classes: int,
    *,
    out_channels: int = 256,
    anchor_sizes: Sequence[int] = ANCHOR_SIZES,
    representation_size: int = 1024,
    **options: Any,
) -> dict[str, Any]:
    """The arguments that torchvision's FasterRCNN and MaskRCNN share."""
    _check(kind, backbone, num_classes, anchor_sizes, options)
    _check_whole("out_channels", out_channels)
    _check_whole("representation_size", representation_size)
    fpn = BackboneFPN(backbone, out_channels)
    return {
        "backbone": fpn,
        "rpn_anchor_generator": Float32Anchors(
            tuple((size,) for size in anchor_sizes), (ASPECT_RATIOS,) * len(anchor_sizes)
        ),
        "box_roi_pool": MultiScaleRoIAlign(fpn.levels, output_size=7, sampling_ratio=2),
        "box_head": TwoMLPHead(out_channels * 7 * 7, representation_size),
        "box_predictor": FastRCNNPredictor(representation_size, num_classes),
        **options,
    }


def _check(
    kind: type[nn.Module],
    backbone: Backbone,
    num_classes: int,
    anchor_sizes: Sequence[int],
    options: Mapping[str, Any],
) -> None:
    if not isinstance(backbone, Backbone):
        raise TypeError(f"backbone must be a Backbone, got {type(backbone).__name__}")
    # torchvision ignores what it does not know, and checks little of what it does.
    known = {
        name: parameter.default
        for of in (GeneralizedRCNNTransform, kind)
        for name, parameter in signature(of).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    if unknown := sorted(options.keys() - known.keys()):
        raise TypeError(f"{kind.__name__} takes no option {', '.join(unknown)}")
    if not _is_whole(num_classes) or num_classes < 2:
        raise ValueError(
            f"num_classes counts the background, so it is at least 2, got {num_classes}"
        )
    levels = len(backbone.trunk.config.dims) + 1
    if not isinstance(anchor_sizes, Sequence) or len(anchor_sizes) != levels:
        raise ValueError(
            f"anchor_sizes needs one size for each of {levels} levels, got {anchor_sizes}"
        )
    for name, value in options.items():
        if type(known[name]) is int:
            several = name == "min_size" and isinstance(value, (list, tuple))
            _check_whole(name, value, several=several)
        elif type(known[name]) is float:
            _check_fraction(name, value)
    settings = known | dict(options)
    for of in ("", "rpn_", "box_"):
        positive, negative = f"{of}fg_iou_thresh", f"{of}bg_iou_thresh"
        if positive in known and settings[positive] < settings[negative]:
            raise ValueError(
                f"{positive} must not be below {negative}, got {settings[positive]} and "
                f"{settings[negative]}"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, *, several: bool = False) -> None:
    """Refuse what is no whole number from 1 on or, where there may be several, no list of them."""
    numbers = value if several and isinstance(value, Sequence) else [value]
    if not numbers or not all(_is_whole(number) and number >= 1 for number in numbers):
        what = "whole numbers" if several else "a whole number"
        raise ValueError(f"{name} must be {what} from 1 on, got {value!r}")


def _check_fraction(name: str, value: Any) -> None:
    """Refuse what is no number from 0 to 1: torchvision's options that are floats are overlaps,
    shares of a sample, and scores, of which a limit below 0 keeps all."""
    lowest = -math.inf if name.endswith("score_thresh") else 0
    if not isinstance(value, Real) or isinstance(value, bool) or not lowest <= float(value) <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


def _boxes_in_float32(model: Model, *heads: str) -> Model:
    """Box arithmetic follows the dtype of the heads' outputs; see :class:`Float32Anchors`."""
    for head in heads:
        model.get_submodule(head).register_forward_hook(_to_float)
    return model


def _to_float(module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map_only(Tensor, Tensor.float, output)
