"""UPerNet (arXiv 1807.10221) as a semantic segmentation head of Detectron2."""

from __future__ import annotations

from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.utils import comm
from torch import Tensor, nn


@SEM_SEG_HEADS_REGISTRY.register()
class UPerNetHead(nn.Module):
    """Pyramid pooling of the last map, an FPN over all maps, and their fusion; beside it, while
    training, an auxiliary FCN head.

    Args:
        input_shape: of the maps, by name.
        num_classes: classes to tell apart.
        conv_dim: channels of the FPN.
        norm: of the convolutions, as Detectron2's ``get_norm`` knows it.
        pool_scales: side of each pooled grid.
        dropout: before the last convolution of each head.
        loss_weight: of the loss.
        ignore_value: label of the pixels that are not trained on.
        aux_feature: name of the map under the auxiliary head.
        aux_dim: its channels.
        aux_loss_weight: weight of its loss; 0: there is none.

    Raises:
        ValueError: ``aux_feature`` is none of the maps.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dim: int = 512,
        norm: str = "SyncBN",
        pool_scales: tuple[int, ...] = (1, 2, 3, 6),
        dropout: float = 0.1,
        loss_weight: float = 1.0,
        ignore_value: int = 255,
        aux_feature: str = "p2",
        aux_dim: int = 256,
        aux_loss_weight: float = 0.4,
    ) -> None:
        super().__init__()
        shapes = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in shapes]
        if aux_loss_weight and aux_feature not in self.in_features:
            raise ValueError(
                f"MODEL.UPERNET.AUX_FEATURE must be one of {', '.join(self.in_features)}, "
                f"got {aux_feature!r}"
            )
        channels = [shape.channels for _, shape in shapes]
        self.common_stride = shapes[0][1].stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.pool_scales = tuple(pool_scales)
        self.norm = norm
        pooled = len(self.pool_scales) * conv_dim
        self.pools = nn.ModuleList(_conv(channels[-1], conv_dim, 1, norm) for _ in pool_scales)
        self.bottleneck = _conv(channels[-1] + pooled, conv_dim, 3, norm)
        self.laterals = nn.ModuleList(_conv(c, conv_dim, 1, norm) for c in channels[:-1])
        self.outputs = nn.ModuleList(_conv(conv_dim, conv_dim, 3, norm) for _ in channels[:-1])
        self.fusion = _conv(len(channels) * conv_dim, conv_dim, 3, norm)
        self.predictor = _predictor(conv_dim, num_classes, dropout)
        self.aux_feature = aux_feature
        self.aux_loss_weight = aux_loss_weight
        self.auxiliary: nn.Module | None = None
        if aux_loss_weight:
            shape = input_shape[aux_feature]
            self.aux_stride = shape.stride
            self.auxiliary = nn.Sequential(
                _conv(shape.channels, aux_dim, 3, norm),
                _predictor(aux_dim, num_classes, dropout),
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head, upernet = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.UPERNET
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "num_classes": head.NUM_CLASSES,
            "conv_dim": head.CONVS_DIM,
            "norm": head.NORM,
            "loss_weight": head.LOSS_WEIGHT,
            "ignore_value": head.IGNORE_VALUE,
            "pool_scales": upernet.POOL_SCALES,
            "dropout": upernet.DROPOUT,
            "aux_feature": upernet.AUX_FEATURE,
            "aux_dim": upernet.AUX_DIM,
            "aux_loss_weight": upernet.AUX_LOSS_WEIGHT,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Maps by name, and while training labels [B, H, W] → (None, losses) while training, else
        (logits [B, classes, 4 · height, 4 · width of the first map], {}).

        Raises:
            ValueError: a batch norm is to train on one image.
        """
        logits = self.layers(features)
        if not self.training:
            return _upsample(logits, self.common_stride), {}
        assert targets is not None
        losses = {
            "loss_sem_seg": self.loss_weight * self._loss(logits, targets, self.common_stride)
        }
        if self.auxiliary is not None:
            auxiliary = self.auxiliary(features[self.aux_feature])
            loss = self._loss(auxiliary, targets, self.aux_stride)
            losses["loss_sem_seg_aux"] = self.aux_loss_weight * loss
        return None, losses

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        """Logits at the size of the first map."""
        maps = [features[name] for name in self.in_features]
        top = maps[-1]
        averaged = self.norm == "BN" or (self.norm.endswith("BN") and comm.get_world_size() == 1)
        if self.training and averaged and len(top) == 1 and 1 in self.pool_scales:
            raise ValueError(
                "a batch norm cannot average over one image pooled to one pixel: set "
                "MODEL.SEM_SEG_HEAD.NORM GN, or train on more images at a time"
            )
        pooled = [
            _resize(conv(F.adaptive_avg_pool2d(top, scale)), top.shape[-2:])
            for conv, scale in zip(self.pools, self.pool_scales, strict=True)
        ]
        path = [self.bottleneck(torch.cat([top, *pooled], dim=1))]
        for lateral, feature in reversed(list(zip(self.laterals, maps, strict=False))):
            path.append(lateral(feature) + _resize(path[-1], feature.shape[-2:]))
        top, *finer = path
        fused = [conv(p) for conv, p in zip(self.outputs, reversed(finer), strict=True)] + [top]
        size = maps[0].shape[-2:]
        return self.predictor(self.fusion(torch.cat([_resize(p, size) for p in fused], dim=1)))

    def _loss(self, logits: Tensor, targets: Tensor, stride: int) -> Tensor:
        height, width = targets.shape[-2:]
        logits = _upsample(logits, stride)[..., :height, :width]
        total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=self.ignore_value)
        # A crop may show nothing but unlabelled pixels, whose mean does not exist.
        return total / (targets != self.ignore_value).sum().clamp(min=1)


def _conv(channels: int, out_channels: int, kernel_size: int, norm: str) -> Conv2d:
    conv = Conv2d(
        channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    weight_init.c2_msra_fill(conv)
    return conv


def _predictor(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    conv = Conv2d(channels, num_classes, kernel_size=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Dropout2d(dropout), conv)


def _upsample(logits: Tensor, stride: int) -> Tensor:
    # Not to the size of the image: the backbone pads it to whole patches on the right and below,
    # and the maps are aligned with the padded one.
    return F.interpolate(logits.float(), scale_factor=stride, mode="bilinear", align_corners=False)


def _resize(x: Tensor, size: Any) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
