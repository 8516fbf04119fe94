"""torchvision's own FPN and Mask R-CNN over the features of a :class:`Backbone`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from e3va.backbone import Backbone


class SwinFPN(nn.Module):
    """A backbone and torchvision's feature pyramid over it: {"p0", …, "p3", "pool"}.

    Args:
        body: the backbone.
        out_channels: channels of each map.
    """

    def __init__(self, body: Backbone, out_channels: int) -> None:
        super().__init__()
        self.body = body
        dims = list(body.trunk.config.dims)
        self.fpn = FeaturePyramidNetwork(dims, out_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(image))


class _Anchors(AnchorGenerator):
    """Anchors in float32 whatever the dtype of the features: in bfloat16, pixel positions above
    256 are no longer whole numbers."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        shapes = [torch.empty(1, device=f.device).expand(f.shape) for f in feature_maps]
        return super().forward(image_list, shapes)


def mask_rcnn(
    backbone: Backbone,
    num_classes: int,
    *,
    out_channels: int = 256,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    representation_size: int = 1024,
    mask_channels: Sequence[int] = (256, 256, 256, 256),
    **options: Any,
) -> MaskRCNN:
    """torchvision's Mask R-CNN over p0..p3 of ``backbone``.

    Takes and gives what torchvision's detectors do: images [3, H, W] in [0, 1], RGB, of any sizes;
    in training with targets, giving losses. Under autocast the boxes stay in float32.

    Args:
        backbone: of any tuning method; see :func:`e3va.build_backbone`.
        num_classes: number of classes *including the background*, as torchvision counts.
        out_channels: channels of the FPN.
        min_size: the shorter side that images are resized to; several: one is drawn in training.
        max_size: the most that the longer side may then have.
        anchor_sizes: side of the anchors on each level, p0 to the pooled one: one more than
            the backbone has stages. Each in the aspect ratios 1:2, 1:1, 2:1.
        representation_size: width of the box head.
        mask_channels: widths of the mask head's convolutions.
        options: further arguments of torchvision's MaskRCNN.

    Raises:
        TypeError: ``backbone`` is no Backbone.
        ValueError: ``num_classes`` leaves no object class, or the anchor sizes do not fit.
    """
    if not isinstance(backbone, Backbone):
        raise TypeError(f"backbone must be a Backbone, got {type(backbone).__name__}")
    if num_classes < 2:
        raise ValueError(
            f"num_classes counts the background, so it is at least 2, got {num_classes}"
        )
    levels = len(backbone.trunk.config.dims)
    if len(anchor_sizes) != levels + 1:
        raise ValueError(
            f"anchor_sizes needs one size for each of {levels + 1} levels, "
            f"got {tuple(anchor_sizes)}"
        )
    names = [f"p{stage}" for stage in range(levels)]
    box_pool = MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)
    mask_pool = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
    model = MaskRCNN(
        SwinFPN(backbone, out_channels),
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=_Anchors(
            tuple((size,) for size in anchor_sizes), ((0.5, 1.0, 2.0),) * len(anchor_sizes)
        ),
        box_roi_pool=box_pool,
        box_head=TwoMLPHead(out_channels * 7 * 7, representation_size),
        box_predictor=FastRCNNPredictor(representation_size, num_classes),
        mask_roi_pool=mask_pool,
        mask_head=MaskRCNNHeads(out_channels, mask_channels, dilation=1),
        mask_predictor=MaskRCNNPredictor(mask_channels[-1], mask_channels[-1], num_classes),
        **options,
    )
    # Box arithmetic follows the dtype of the heads' outputs; see _Anchors.
    for head in (model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor):
        head.register_forward_hook(_to_float)
    return model


def _to_float(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_to_float(module, args, part) for part in output)
