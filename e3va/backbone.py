"""Backbones for detection: an image in, one map per stage out. Knows no detection framework."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va import ops
from e3va.config import HighwayConfig, SwinConfig
from e3va.highway import Highway
from e3va.ops.reference import norm_parameters, pool_2x2
from e3va.ops.taps import DEFAULT_TAPS
from e3va.peers import PEERS, build_adapters, ride, trained_weights
from e3va.trunk import FrozenSwin, Swin


class OutputNorm(nn.LayerNorm):
    """LayerNorm of a stage's output [B, H, W, C], in the dtype of its input."""

    def forward(self, h: Tensor) -> Tensor:
        weight, bias = norm_parameters(h, self.weight, self.bias)
        with torch.autocast(h.device.type, enabled=False):
            return F.layer_norm(h, self.normalized_shape, weight, bias, self.eps)


class SwinBackbone(nn.Module):
    """A Swin and its output norms: {"p0": [B, C, ⌈H/4⌉, ⌈W/4⌉], …, "p3"}.

    With a trainable :class:`~e3va.trunk.Swin` this is full fine-tuning; with a
    :class:`~e3va.trunk.FrozenSwin` linear probing, and the norms stay frozen too.

    Args:
        trunk: the Swin.
    """

    def __init__(self, trunk: Swin) -> None:
        super().__init__()
        self.trunk = trunk
        self.norms = nn.ModuleList(OutputNorm(dim) for dim in trunk.config.dims)
        if isinstance(trunk, FrozenSwin):
            self.norms.requires_grad_(False)

    def _features(self, maps: list[Any], image: Tensor) -> dict[str, Tensor]:
        """Normalised maps as channels-last views [B, C, H, W], in the autocast dtype under
        autocast, else in that of the norms."""
        features = {}
        for s, (p, norm) in enumerate(zip(maps, self.norms, strict=True)):
            if not torch.is_autocast_enabled(image.device.type):
                p = p.to(norm.weight.dtype)
            features[f"p{s}"] = p.permute(0, 3, 1, 2)
        return features

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [B, 3, H, W], normalised, any H and W ≥ 1 → one map per stage."""
        outputs = zip(self.trunk(image), self.norms, strict=True)
        return self._features([norm(h) for h, norm in outputs], image)


class E3VABackbone(SwinBackbone):
    """A frozen Swin with a gradient highway beside it (arXiv 2306.09729).

    At initialisation its maps equal those of the frozen network. Only the highway and the output
    norms are trained.

    Args:
        trunk: the frozen Swin.
        config: form and shape of the highway.
        taps: how the trunk's taps are kept for backward: "full", "fp8", "int8" or "int4".
    """

    def __init__(
        self,
        trunk: FrozenSwin,
        config: HighwayConfig | None = None,
        taps: str = DEFAULT_TAPS,
    ) -> None:
        super().__init__(trunk)
        if not isinstance(trunk, FrozenSwin):
            raise TypeError(f"trunk must be a FrozenSwin, got {type(trunk).__name__}")
        self.norms.requires_grad_(True)
        self.highway = Highway(trunk.config, config, taps)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [B, 3, H, W], normalised, any H and W ≥ 1 → one map per stage."""
        trunk = self.trunk
        maps: list[Tensor] = []
        x = image.to(trunk.compute_dtype())
        with torch.autocast(image.device.type, enabled=False):
            y = h = trunk.embed(x)
            carry: Tensor | None = None
            stages: Iterable[Any] = self.highway.stages
            norms: Iterable[Any] = self.norms
            for s, (stage, norm) in enumerate(zip(stages, norms, strict=True)):
                ride = stage.ride()
                y_in, y = y, trunk.stage(s, y, ride)
                h, carry = ride.arrive(h, y_in, y, carry)
                merging = trunk.merging(s)
                p, h = ops.stage_exit(h, norm.weight, norm.bias, norm.eps, *(merging or ()))
                if merging:
                    y = trunk.merge(s, y)
                    carry = None if carry is None else pool_2x2(carry)
                maps.append(p)
        return self._features(maps, image)


class PeerBackbone(SwinBackbone):
    """A Swin tuned by one of the published methods in :mod:`e3va.peers`.

    At initialisation its maps equal those of the frozen network. What is trained is in float32, and
    nothing else is, neither a norm of the trunk nor an output norm, unless the method is to train
    norms ("norm"), their biases ("bitfit") or the block that they are in ("partial1").

    Args:
        method: one of :data:`e3va.peers.PEERS`.
        trunk: the Swin; its weights are kept in the dtype they have.

    Raises:
        ImportError: "lora" without PEFT.
    """

    def __init__(self, method: str, trunk: Swin) -> None:
        super().__init__(trunk)
        self.requires_grad_(False)
        for parameter in trained_weights(method, trunk, self.norms):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.adapters = build_adapters(method, trunk)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [B, 3, H, W], normalised, any H and W ≥ 1 → one map per stage."""
        epilogues = [ride(stage) for stage in self.adapters]
        outputs = zip(self.trunk(image, epilogues), self.norms, strict=True)
        return self._features([norm(h) for h, norm in outputs], image)


METHODS = ("full", "frozen", *PEERS, "e3va_paper", "e3va")


def build_backbone(
    method: str,
    swin: SwinConfig,
    *,
    highway: HighwayConfig | None = None,
    taps: str = DEFAULT_TAPS,
    dtype: torch.dtype = torch.float32,
    drop_path: float = 0.0,
) -> SwinBackbone:
    """The backbone of a tuning method, with random weights.

    Args:
        method: "full" (everything is trained), "frozen" (nothing is), "e3va", "e3va_paper" (its
            published form), or one of :data:`e3va.peers.PEERS`.
        swin: architecture of the trunk.
        highway: shape of the highway and, for "e3va", its form.
        taps: how its taps are kept for backward.
        dtype: storage of a frozen trunk's weights (default float32).
        drop_path: stochastic depth; only for "full".

    Raises:
        ValueError: no such method; the message lists them.
        ImportError: "lora" without PEFT.
    """
    if method == "full":
        return SwinBackbone(Swin(swin, drop_path))
    if method == "frozen":
        return SwinBackbone(FrozenSwin(swin, dtype))
    if method == "e3va_paper":
        highway = (highway or HighwayConfig()).published()
    if method in ("e3va", "e3va_paper"):
        return E3VABackbone(FrozenSwin(swin, dtype), highway, taps)
    if method in PEERS:
        return PeerBackbone(method, Swin(swin).to(dtype))
    raise ValueError(f"unknown tuning method {method!r}; known: {', '.join(METHODS)}")
