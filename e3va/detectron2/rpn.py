"""A region proposal network that is trained where anchors are sampled, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn


@PROPOSAL_GENERATOR_REGISTRY.register()
class SampledRPN(RPN):
    """Detectron2's RPN, its losses computed from the 3×3 neighbourhoods of the sampled anchors.

    The losses are of a few hundred anchors; proposals, of all, carry no gradient. So the head runs
    over whole maps without autograd, and once more over those neighbourhoods with it: no hidden map
    is kept for backward, and none is differentiated. Losses and gradients are RPN's to rounding.

    Args:
        as Detectron2's ``RPN``.

    Raises:
        ValueError: the head sees more than 3×3 positions.
    """

    @configurable
    def __init__(self, *, head: nn.Module, **kwargs: Any) -> None:
        super().__init__(head=head, **kwargs)
        conv = getattr(head, "conv", None)
        if not isinstance(head, StandardRPNHead) or getattr(conv, "kernel_size", None) != (3, 3):
            raise ValueError(
                "SampledRPN needs StandardRPNHead with one 3×3 convolution, MODEL.RPN.CONV_DIMS "
                "[-1]: for any other set MODEL.PROPOSAL_GENERATOR.NAME RPN"
            )
        head.conv.activation = nn.ReLU(inplace=True)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As ``RPN``'s: the proposals of each image, and the losses in training."""
        if not self.training:
            return super().forward(images, features, gt_instances)
        assert gt_instances is not None
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)
        labels, gt_boxes = self.label_and_sample_anchors(anchors, gt_instances)
        # First what autograd sees: autocast keeps the weights that it has cast, and casts made
        # without autograd would hide the weights from it.
        losses = self._sampled_losses(maps, anchors, torch.stack(labels), gt_boxes)
        del labels, gt_boxes
        with torch.no_grad():
            return self._proposals(images, maps, anchors), losses

    def _sampled_losses(
        self, maps: list[Tensor], anchors: list[Boxes], labels: Tensor, gt_boxes: list[Tensor]
    ) -> dict[str, Tensor]:
        """The losses of the anchors whose ``labels`` [B, R] are 0 or 1."""
        image, anchor = (labels >= 0).nonzero(as_tuple=True)
        cells = self.anchor_generator.num_cell_anchors[0]
        (logits,), (deltas,) = self.rpn_head([neighbourhoods(maps, image, anchor, cells)])
        row, which = torch.arange(len(anchor), device=anchor.device), anchor % cells
        logits = logits[row, which, 1, 1]
        deltas = deltas[:, :, 1, 1].unflatten(1, (cells, -1))[row, which]

        positive = labels[image, anchor] == 1
        boxes = Boxes.cat(anchors).tensor[anchor[positive]]
        targets = torch.stack(gt_boxes)[image[positive], anchor[positive]]
        localization = regression_loss(self, boxes, deltas[positive], targets)
        objectness = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="sum")
        storage, sampled = get_event_storage(), len(anchor)
        storage.put_scalar("rpn/num_pos_anchors", len(boxes) / len(labels))
        storage.put_scalar("rpn/num_neg_anchors", (sampled - len(boxes)) / len(labels))
        normalizer = self.batch_size_per_image * len(labels)
        losses = {"loss_rpn_cls": objectness, "loss_rpn_loc": localization}
        weights = self.loss_weight
        return {name: v / normalizer * weights.get(name, 1.0) for name, v in losses.items()}

    def _proposals(
        self, images: ImageList, maps: list[Tensor], anchors: list[Boxes]
    ) -> list[Instances]:
        logits, deltas = [], []
        for x in maps:
            (score,), (delta,) = self.rpn_head([x])
            logits.append(score.permute(0, 2, 3, 1).flatten(1))
            delta = delta.unflatten(1, (-1, self.anchor_generator.box_dim))
            deltas.append(delta.permute(0, 3, 4, 1, 2).flatten(1, -2))
        return self.predict_proposals(anchors, logits, deltas, images.image_sizes)


def regression_loss(net: Any, boxes: Tensor, deltas: Tensor, targets: Tensor) -> Tensor:
    """The sum of the box losses, as ``net``, an RPN or a RetinaNet, has them, of some anchors
    ``boxes`` [n, 4], what is predicted of them and what they should become."""
    return _dense_box_regression_loss(
        [Boxes(boxes)],
        net.box2box_transform,
        [deltas[None]],
        [targets],
        torch.ones(1, len(boxes), dtype=torch.bool, device=boxes.device),
        box_reg_loss_type=net.box_reg_loss_type,
        smooth_l1_beta=net.smooth_l1_beta,
    )


def neighbourhoods(maps: Sequence[Tensor], image: Tensor, anchor: Tensor, cells: int) -> Tensor:
    """What a 3×3 convolution sees at the positions of anchors, zero beyond the maps' ends.

    Args:
        maps: one for each level, [B, C, H, W].
        image: the anchors' images, int64 [n].
        anchor: the anchors among those of an image, ascending in each: level by level, row by row,
            ``cells`` to a position, int64 [n].
        cells: anchors to a position.

    Returns:
        [n, C, 3, 3].
    """
    position = anchor // cells
    parts, places, first = [], [], 0
    offset = torch.arange(-1, 2, device=anchor.device)
    for x in maps:
        height, width = x.shape[2:]
        here = ((position >= first) & (position < first + height * width)).nonzero()[:, 0]
        local = position[here] - first
        rows = (local // width)[:, None, None] + offset[:, None]  # [n, 3, 1]
        columns = (local % width)[:, None, None] + offset  # [n, 1, 3]
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        patch = _Take.apply(x, image[here][:, None, None], rows, columns)  # [n, 3, 3, C]
        parts.append(torch.where(inside[..., None], patch, 0))
        places.append(here)
        first += height * width
    found = torch.cat(parts)[torch.cat(places).argsort()]
    return found.permute(0, 3, 1, 2)


class _Take(torch.autograd.Function):
    """x[image, :, row, column], whose gradient is the same to the last bit every time: threads of a
    CPU would otherwise add what overlaps in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
        ctx.save_for_backward(image, row, column)
        ctx.shape = x.shape
        return x[image, :, row, column]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (G,) = grads
        dx = G.new_zeros(ctx.shape)
        before = torch.are_deterministic_algorithms_enabled()
        warn = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            dx.movedim(1, -1).index_put_(ctx.saved_tensors, G, accumulate=True)
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn)
        return dx, None, None, None
