"""Detectron2's RoI heads in 16 bits: no copies in 32 of the maps that they pool, none in 16 of
weights that stay."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, StandardROIHeads
from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY
from torch import Tensor, nn

CHANNELS = 64
"""Channels that are widened to float32 at a time."""

ROWS, COLUMNS = 128, 2048
"""Rows of a weight's gradient that are made, and columns of a weight that are cast, at a time."""


class LeanROIAlign(ROIAlign):
    """RoIAlign that computes in float32, as autocast has it, some channels at a time, forward and
    backward: of a map of 16 bits there is no copy in 32, nor of its gradient. The same bits."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Map [B, C, H, W] and boxes [n, 5] (image, x0, y0, x1, y1) → [n, C, *output_size]."""
        narrow = input.dtype in (torch.bfloat16, torch.float16)
        if not narrow or torch.are_deterministic_algorithms_enabled():
            return super().forward(input, rois)
        how = self.spatial_scale, *self.output_size, self.sampling_ratio, self.aligned
        return _RoIAlign.apply(input, rois.to(input.dtype).float(), how)


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rois: Tensor, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.shape, ctx.how = x.shape, how
        with torch.autocast(x.device.type, enabled=False):
            parts = x.split(CHANNELS, dim=1)
            align = torch.ops.torchvision.roi_align
            return torch.cat([align(p.float(), rois, *how).to(x.dtype) for p in parts], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (G,), (rois,) = grads, ctx.saved_tensors
        B, _, H, W = ctx.shape
        scale, height, width, *rest = ctx.how
        dx = G.new_empty(ctx.shape)
        with torch.autocast(G.device.type, enabled=False):
            for dx_i, G_i in zip(dx.split(CHANNELS, 1), G.split(CHANNELS, 1), strict=True):
                size = B, G_i.shape[1], H, W
                dx_i.copy_(
                    torch.ops.torchvision._roi_align_backward(
                        G_i.float(), rois, scale, height, width, *size, *rest
                    )
                )
        return dx, None, None


def lean(pooler: ROIPooler) -> ROIPooler:
    """``pooler``, its RoIAligns replaced by :class:`LeanROIAlign`, in place."""
    for level, align in enumerate(pooler.level_poolers):
        if type(align) is ROIAlign:
            how = align.spatial_scale, align.sampling_ratio, align.aligned
            pooler.level_poolers[level] = LeanROIAlign(align.output_size, *how)
    return pooler


class _LeanPoolers:
    """Mixed into RoI heads, before them."""

    @classmethod
    def _init_box_head(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        made = super()._init_box_head(cfg, input_shape)  # type: ignore[misc]
        return made | {"box_pooler": lean(made["box_pooler"])}

    @classmethod
    def _init_mask_head(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        made = super()._init_mask_head(cfg, input_shape)  # type: ignore[misc]
        pooler = made.get("mask_pooler")
        return made if pooler is None else made | {"mask_pooler": lean(pooler)}


@ROI_HEADS_REGISTRY.register()
class LeanROIHeads(_LeanPoolers, StandardROIHeads):
    """Detectron2's ``StandardROIHeads`` in less memory, see :class:`LeanROIAlign`."""


@ROI_HEADS_REGISTRY.register()
class LeanCascadeROIHeads(_LeanPoolers, CascadeROIHeads):
    """Detectron2's ``CascadeROIHeads`` in less memory, see :class:`LeanROIAlign`."""


@ROI_BOX_HEAD_REGISTRY.register()
class LeanConvFCHead(FastRCNNConvFCHead):
    """Detectron2's ``FastRCNNConvFCHead``. Under autocast its linear layers cast their weights anew
    for the backward, where autocast would keep the copies, tens of MiB each, from the forward on,
    and cast the gradients of weights a part at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """Pooled maps [n, C, H, W] → [n, fc_dim]."""
        device = x.device.type
        for layer in self:
            if isinstance(layer, nn.Linear) and torch.is_autocast_enabled(device):
                x = x.to(torch.get_autocast_dtype(device))
                x = _Linear.apply(x, layer.weight, layer.bias)
            else:
                x = layer(x)
        return x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (G,), (x, weight) = grads, ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dx, dW = torch.empty_like(x), torch.empty_like(weight)
            for dx_i, W_i in zip(dx.split(COLUMNS, 1), weight.split(COLUMNS, 1), strict=True):
                # Laid out so, a CPU multiplies 16 bits twenty times as fast.
                W_i = W_i.t().to(G.dtype, memory_format=torch.contiguous_format)
                dx_i.copy_(nn.functional.linear(G, W_i))
            for dW_i, G_i in zip(dW.split(ROWS), G.split(ROWS, 1), strict=True):
                dW_i.copy_(G_i.t() @ x)
            return dx, dW, G.sum(0, dtype=weight.dtype)
