"""Detectron2's RetinaNet, its losses computed a part at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from e3va.detectron2.rpn import regression_loss

VALUES = 2**18
"""Logits that the focal loss takes at a time."""


@META_ARCH_REGISTRY.register()
class LeanRetinaNet(RetinaNet):
    """Detectron2's ``RetinaNet``, of whose focal loss nothing is kept for backward but the logits:
    what it makes of some of them, a dozen times their size in float32, is made again there. Boxes
    are regressed at the positive anchors alone. The same losses, to rounding."""

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
        step = max(1, VALUES // (self.num_classes * len(labels)))
        parts = []
        levels = labels.split([x.shape[1] for x in logits], dim=1)
        for x, labels_x in zip(logits, levels, strict=True):
            for part in zip(x.split(step, 1), labels_x.split(step, 1), strict=True):
                parts.append(checkpoint(self._part_of_focal_loss, *part, use_reentrant=False))
        return torch.stack(parts).sum()

    def _part_of_focal_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        valid = labels >= 0
        classes = F.one_hot(labels[valid], self.num_classes + 1)[:, :-1].to(logits.dtype)
        how = self.focal_loss_alpha, self.focal_loss_gamma, "sum"
        return sigmoid_focal_loss(logits[valid], classes, *how)
