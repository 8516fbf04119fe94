"""Backbones for detection: an image in, one map per stage out. Knows no detection framework."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va.ops.functional import norm_parameters
from e3va.trunks import Trunk
from e3va.trunks.base import Frozen


class OutputNorm(nn.LayerNorm):
    """LayerNorm of a stage's output [B, H, W, C], in the dtype of its input."""

    def forward(self, h: Tensor) -> Tensor:
        weight, bias = norm_parameters(h, self.weight, self.bias)
        with torch.autocast(h.device.type, enabled=False):
            return F.layer_norm(h, self.normalized_shape, weight, bias, self.eps)


class Backbone(nn.Module):
    """A trunk and its output norms: {"p0": [B, C, H, W] of the first stage, "p1", …}.

    With a trainable trunk this is full fine-tuning; with a frozen one linear probing, and the norms
    stay frozen too.

    Args:
        trunk: the trunk.

    Attributes:
        method: the config of the tuning method that it was built by, see
            :func:`e3va.methods.build_backbone`; None: by hand.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.method: Any = None
        self.norms = nn.ModuleList(OutputNorm(dim) for dim in trunk.config.dims)
        if isinstance(trunk, Frozen):
            self.norms.requires_grad_(False)

    def features(self, maps: list[Tensor], image: Tensor) -> dict[str, Tensor]:
        """Normalised maps [B, H, W, C] as channels-last views [B, C, H, W], in the autocast dtype
        under autocast, else in that of the norms; on a CPU in float32 contiguous."""
        features = {}
        norms: Any = self.norms
        device = image.device.type
        for s, (p, norm) in enumerate(zip(maps, norms, strict=True)):
            if not torch.is_autocast_enabled(device):
                p = p.to(norm.weight.dtype)
            p = p.permute(0, 3, 1, 2)
            if device == "cpu" and p.dtype == torch.float32:
                # With AVX2 oneDNN takes up to six times as long for the gradients of convolutions
                # of channels-last maps; a copy costs little.
                p = p.contiguous()
            features[f"p{s}"] = p
        return features

    def normalised(self, maps: list[Tensor], image: Tensor) -> dict[str, Tensor]:
        """The features of the stages' outputs [B, H, W, C]."""
        outputs = zip(maps, self.norms, strict=True)
        return self.features([norm(h) for h, norm in outputs], image)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [B, 3, H, W], normalised, any H and W ≥ 1 → one map per stage."""
        return self.normalised(self.trunk(image), image)

    def adapter_names(self) -> set[str]:
        """Names of the tensors that make this backbone, over the trunk's pretrained weights, what
        it was trained to be: all outside of the trunk, and those in it that are trained."""
        trained = {name for name, p in self.trunk.named_parameters() if p.requires_grad}
        return {
            name
            for name in self.state_dict()
            if not name.startswith("trunk.") or name.removeprefix("trunk.") in trained
        }
