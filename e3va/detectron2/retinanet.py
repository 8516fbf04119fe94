"""Detectron2's RetinaNet, its losses computed a part at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import Tensor

from e3va.detectron2.rpn import regression_loss

VALUES = 2**17
"""Logits that the focal loss takes at a time."""


@META_ARCH_REGISTRY.register()
class LeanRetinaNet(RetinaNet):
    """Detectron2's ``RetinaNet``, of whose focal loss nothing is kept for backward but the gradient
    of the logits, in their dtype. Boxes are regressed at the positive anchors alone, and anchors
    are matched before the head makes its maps. The same losses, to rounding."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As ``RetinaNet``'s."""
        if not self.training:
            return super().forward(batched_inputs)
        features = self.backbone(self.preprocess_image(batched_inputs).tensor)
        maps = [features[name] for name in self.head_in_features]
        anchors = self.anchor_generator(maps)
        instances = [sample["instances"].to(self.device) for sample in batched_inputs]
        labels, boxes = self.label_anchors(anchors, instances)
        sizes = [self.num_classes, 4]
        logits, deltas = self._transpose_dense_predictions(self.head(maps), sizes)
        return self.losses(anchors, logits, labels, deltas, boxes)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """As ``RetinaNet``'s."""
        labels = torch.stack(gt_labels)  # [B, R]
        image, anchor = ((labels >= 0) & (labels != self.num_classes)).nonzero(as_tuple=True)
        get_event_storage().put_scalar("num_pos_anchors", len(anchor) / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(len(anchor), 1), 100)
        boxes = Boxes.cat(anchors).tensor[anchor]
        deltas = torch.cat(pred_anchor_deltas, dim=1)[image, anchor]
        targets = torch.stack(gt_boxes)[image, anchor]
        return {
            "loss_cls": self._focal_loss(pred_logits, labels) / normalizer,
            "loss_box_reg": regression_loss(self, boxes, deltas, targets) / normalizer,
        }

    def _focal_loss(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """The sum over logits [B, R_l, K] of all levels and labels [B, R], -1 where ignored."""
        levels = labels.split([x.shape[1] for x in logits], dim=1)
        how = self.focal_loss_alpha, self.focal_loss_gamma
        parts = [_FocalLoss.apply(x, y, *how) for x, y in zip(logits, levels, strict=True)]
        return torch.stack(parts).sum()


class _FocalLoss(torch.autograd.Function):
    """The sum of the sigmoid focal losses (arXiv 1708.02002) of logits [B, R, K] and labels [B, R]:
    -1 is ignored, K is no class. Computed in float32 with its gradient, some logits at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        classes = logits.shape[-1]
        # Not yet scaled, gradients of float16 would underflow.
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        ctx.gradient = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        ctx.dtype = logits.dtype
        positive, negative = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
        total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        rows = logits.flatten(0, 1), labels.flatten(), ctx.gradient.flatten(0, 1)
        for x, y, dx in zip(*(v.split(max(1, VALUES // classes)) for v in rows), strict=True):
            row = ((y >= 0) & (y < classes)).nonzero()[:, 0]
            there = row, y[row]
            s = x.to(total.dtype, copy=True)
            s[there] *= -1  # the larger, the worse is what is predicted, now everywhere
            q, cost = s.sigmoid(), F.softplus(s)
            weight = torch.where(y < 0, 0.0, negative)[:, None] * q**gamma
            weight[there] = positive * q[there] ** gamma
            total += (weight * cost).sum()
            torch.sub(1, q, out=s).mul_(cost).mul_(gamma).add_(q).mul_(weight)
            s[there] *= -1
            dx.copy_(s)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = ctx.gradient
        del ctx.gradient  # it is changed in place: a second backward fails, and is not wrong
        return gradient.mul_(grads[0]).to(ctx.dtype), None, None, None
