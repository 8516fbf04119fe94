"""E³VA's backbones as Detectron2 knows backbones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.utils.file_io import PathHandler, PathManager
from torch import Tensor, nn

from e3va.backbone import Backbone as CoreBackbone
from e3va.detectron2.config import dtype_of, method_options
from e3va.detectron2.fpn import LeanFPN
from e3va.methods import METHODS, build_backbone
from e3va.precision import quantize_trunk
from e3va.trunks import family_of, trunk_config
from e3va.weights import load_trunk, resolve

logger = logging.getLogger(__name__)


class BottomUp(Backbone):
    """A :class:`~e3va.backbone.Backbone` as a bottom-up network of Detectron2: maps "p0" to "p3"
    of strides 4 to 32.

    Args:
        net: the network, of any tuning method.
    """

    @configurable
    def __init__(self, net: CoreBackbone) -> None:
        super().__init__()
        self.net = net
        config = net.trunk.config
        names = [f"p{s}" for s in range(len(config.dims))]
        self._out_features = names
        self._out_feature_channels = dict(zip(names, config.dims, strict=True))
        self._out_feature_strides = dict(zip(names, config.strides, strict=True))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        if input_shape.channels != 3:
            raise ValueError(
                "the backbone needs images of 3 channels, but MODEL.PIXEL_MEAN has "
                f"{input_shape.channels}"
            )
        trunk, method = cfg.MODEL.TRUNK, cfg.MODEL.TUNING.METHOD
        options = method_options(cfg)
        config = trunk_of(cfg)
        dtype = dtype_of("MODEL.TRUNK.DTYPE", trunk.DTYPE)
        if METHODS[method].trains_trunk and dtype != torch.float32:
            logger.warning("MODEL.TRUNK.DTYPE is of frozen weights: %s tuning has none", method)
            dtype = torch.float32
        net = build_backbone(method, config, dtype=dtype, **options)
        with_weights(net, trunk.WEIGHTS)
        if trunk.PRECISION:
            if cfg.MODEL.DEVICE.startswith("cuda"):
                net.to(cfg.MODEL.DEVICE)  # which decides what fp8 can be
            quantize_trunk(net.trunk, trunk.PRECISION)
        if trunk.COMPILE:
            # Sizes that vary take many times as long to trace as one size by itself.
            net.compile(dynamic=False)
        return {"net": net}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [B, 3, H, W], normalised → one map per stage."""
        return self.net(image)


def trunk_of(cfg: CfgNode) -> Any:
    """The config of the trunk that cfg.MODEL.TRUNK describes.

    Raises:
        ValueError: there is no such variant, or it is of another family.
    """
    trunk = cfg.MODEL.TRUNK
    changes = {"window_size": trunk.WINDOW_SIZE} if trunk.WINDOW_SIZE else {}
    config = trunk_config(trunk.VARIANT, **changes)
    if trunk.FAMILY not in ("", family := family_of(config).name):
        raise ValueError(
            f"MODEL.TRUNK.VARIANT {trunk.VARIANT} is a {family}, but MODEL.TRUNK.FAMILY is "
            f"{trunk.FAMILY!r}"
        )
    return config


def local_weights(weights: str) -> Path | str:
    """The file that cfg.MODEL.TRUNK.WEIGHTS names, downloaded if need be: as
    :func:`e3va.weights.resolve`, or by a prefix that Detectron2 knows; timm:NAME stays as it is."""
    if weights.startswith(("http://", "https://")):
        return resolve(weights)
    return PathManager.get_local_path(weights)


def with_weights(net: CoreBackbone, weights: str) -> CoreBackbone:
    """``net``, its trunk's weights loaded from a path, URL or timm:NAME; empty: left alone."""
    if weights:
        load_trunk(net.trunk, local_weights(weights))
        logger.info("Loaded the trunk's weights from %s", weights)
    else:
        logger.warning(
            "MODEL.TRUNK.WEIGHTS is empty: the trunk's weights are random, unless a checkpoint "
            "brings them"
        )
    return net


@BACKBONE_REGISTRY.register()
def build_e3va_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> BottomUp:
    """The bare backbone that cfg.MODEL.TRUNK, HIGHWAY and TUNING describe."""
    return BottomUp(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_e3va_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The backbone under Detectron2's FPN, with "p6" on top, as Mask R-CNN uses it."""
    return _fpn(cfg, build_e3va_swin_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_e3va_swin_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The backbone under Detectron2's FPN, with "p6" and "p7" on top, made of the backbone's last
    map, as RetinaNet uses it."""
    bottom_up = build_e3va_swin_backbone(cfg, input_shape)
    last = cfg.MODEL.FPN.IN_FEATURES[-1]
    channels = bottom_up.output_shape()[last].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, last))


def _fpn(cfg: CfgNode, bottom_up: BottomUp, top_block: nn.Module) -> FPN:
    in_features = cfg.MODEL.FPN.IN_FEATURES
    for name, norm in zip(bottom_up.output_shape(), bottom_up.net.norms, strict=True):
        if name not in in_features:  # it would get no gradient, which distributed training demands
            norm.requires_grad_(False)
    return LeanFPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


class _PackagedWeights(PathHandler):
    """Resolves e3va://NAME to the weights that ship with the package."""

    PREFIX = "e3va://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        return str(resolve(path))


PathManager.register_handler(_PackagedWeights())
