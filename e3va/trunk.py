"""The Swin Transformer: trainable (:class:`Swin`) and frozen (:class:`FrozenSwin`).

Maps are [B, H, W, C] throughout. Parameter names are those of the official implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va import ops
from e3va.config import SwinConfig
from e3va.ops import reference

PATCH_SIZE = 4

WEIGHT_HASH = "weight_hash"
"""Name of the buffer that tells which weights a frozen trunk has."""

Epilogue = Callable[[Tensor, Tensor, "nn.LayerNorm | None"], tuple[Tensor, Tensor]]
"""What completes a sub-layer: (x, y, norm) → (y', norm(y')), where x is the sub-layer's output
(a *tap*), y the residual stream and norm the LayerNorm that the next sub-layer begins with (None
after a stage's last one, whose second result is not used)."""


class StageOutput(NamedTuple):
    """One stage of the trunk: its input and output, and its 2·depth taps; each [B, H, W, C]."""

    y_in: Tensor
    y_out: Tensor
    taps: tuple[Tensor, ...]


class Swin(nn.Module):
    """Swin Transformer without output norms or classifier (arXiv 2103.14030), trainable.

    Computes in the dtype of the image, whatever that of the weights; :meth:`forward` chooses it.
    Follows Detectron2 where conventions differ: the shift stays on maps no larger than a window
    (timm, torchvision and transformers drop it there), and maps are padded to whole windows before
    they are shifted (timm: after).

    Args:
        config: the architecture.
        drop_path: stochastic depth rate of the last block, growing linearly from 0 (default 0).
            Only in training.

    Raises:
        ValueError: ``drop_path`` is not in [0, 1).
    """

    # The trainable network needs a backward through attention, which the op does not have.
    _window_attention = staticmethod(reference.window_attention)

    def __init__(self, config: SwinConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        self.config = config
        self.patch_embed = _PatchEmbed(config.embed_dim)
        rates = torch.linspace(0, drop_path, sum(config.depths), device="cpu")
        self.layers = nn.ModuleList(
            _Stage(config, stage, part.tolist())
            for stage, part in enumerate(rates.split(list(config.depths)))
        )
        self.apply(_init_weights)

    def compute_dtype(self) -> torch.dtype:
        """Autocast's dtype where autocast is enabled, else that of the weights."""
        weight = self.patch_embed.proj.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    def embed(self, image: Tensor) -> Tensor:
        """Patch embedding: image [B, 3, H, W] → [B, ⌈H/4⌉, ⌈W/4⌉, C], in the image's dtype.

        Raises:
            ValueError: the image has another shape.
        """
        if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape[2:]:
            raise ValueError(f"image must have shape [B, 3, H, W], got {list(image.shape)}")
        H, W = image.shape[-2:]
        image = F.pad(image, (0, -W % PATCH_SIZE, 0, -H % PATCH_SIZE))
        conv, norm = self.patch_embed.proj, self.patch_embed.norm
        y = F.conv2d(image, conv.weight.to(image), _bias(conv).to(image), stride=PATCH_SIZE)
        return _layer_norm(y.permute(0, 2, 3, 1).contiguous(), norm)

    def stage(self, stage: int, y: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        """The blocks of one stage: [B, H, W, C] → [B, H, W, C].

        ``epilogue`` completes each sub-layer; default: residual add, with stochastic depth in
        training.
        """
        blocks = self._layer(stage).blocks
        z = _layer_norm(y, blocks[0].norm1)
        for i, block in enumerate(blocks):
            complete = epilogue or block.residual
            y, z = complete(block.attention(z, self._window_attention), y, block.norm2)
            y, z = complete(block.mlp(z), y, blocks[i + 1].norm1 if i + 1 < len(blocks) else None)
        return y

    def _layer(self, stage: int) -> Any:
        return self.layers[stage]

    def merging(self, stage: int) -> tuple[Tensor, Tensor, float, Tensor] | None:
        """What :meth:`merge` multiplies with: weight, bias and epsilon of its norm, its projection;
        None after the last stage."""
        downsample = self._layer(stage).downsample
        if downsample is None:
            return None
        norm, reduction = downsample.norm, downsample.reduction
        return norm.weight, norm.bias, norm.eps, reduction.weight

    def merge(self, stage: int, y: Tensor) -> Tensor:
        """Down-sampling from ``stage`` to the next: [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, 2C]."""
        merging = self.merging(stage)
        if merging is None:
            raise ValueError(f"no stage follows stage {stage}")
        return reference.patch_merging(y, *merging)

    def forward(self, image: Tensor, epilogues: Sequence[Epilogue | None] = ()) -> list[Tensor]:
        """Image [B, 3, H, W], normalised, any H and W ≥ 1 → each stage's output [B, H, W, C].

        Computes in the autocast dtype under autocast, else in the dtype of the weights.
        ``epilogues``: each stage's, as in :meth:`stage`; default: none.
        """
        image = image.to(self.compute_dtype())
        outputs = []
        with torch.autocast(image.device.type, enabled=False):
            y = self.embed(image)
            for stage in range(self.config.num_stages):
                if stage:
                    y = self.merge(stage - 1, y)
                y = self.stage(stage, y, epilogues[stage] if epilogues else None)
                outputs.append(y)
        return outputs


class FrozenSwin(Swin):
    """A Swin that only ever runs forward: no autograd, no stochastic depth, not even in training.

    Its parameters require no gradient and its :meth:`train` does nothing. Its buffer
    ``weight_hash`` (uint8 [32]) is the SHA-256 of the weights as their file had them, or zero where
    that is not known; see :func:`e3va.weights.trunk_hash`.

    Args:
        config: the architecture.
        dtype: the dtype that its weights are stored in (default float32).
    """

    weight_hash: Tensor
    precision: str | None = None
    """What :func:`e3va.precision.quantize_trunk` made of its weights; None: nothing."""

    _window_attention = staticmethod(ops.window_attention)

    def __init__(self, config: SwinConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, got {dtype}")
        self.register_buffer(WEIGHT_HASH, torch.zeros(32, dtype=torch.uint8))
        self.to(dtype)
        self.requires_grad_(False)
        super().train(False)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Weights that come without their hash leave it unknown, rather than that of the old ones.
        if any(
            name.startswith((f"{prefix}patch_embed.", f"{prefix}layers.")) for name in state_dict
        ):
            if self.precision is not None:
                raise RuntimeError(
                    f"the trunk's weights are quantised to {self.precision}: load them before"
                )
            state_dict.setdefault(prefix + WEIGHT_HASH, torch.zeros_like(self.weight_hash))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        return self

    @torch.no_grad()
    def embed(self, image: Tensor) -> Tensor:
        return super().embed(image)

    @torch.no_grad()
    def stage(self, stage: int, y: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        return super().stage(stage, y, epilogue or self._residual)

    @staticmethod
    def _residual(x: Tensor, y: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        weight, bias, eps = (norm.weight, norm.bias, norm.eps) if norm else (None, None, 0.0)
        y, z, *_ = ops.sublayer_epilogue(x, y, weight, bias, eps)
        return y, z

    @torch.no_grad()
    def merge(self, stage: int, y: Tensor) -> Tensor:
        return super().merge(stage, y)

    @torch.no_grad()
    def forward_taps(self, image: Tensor) -> list[StageOutput]:
        """As :meth:`forward`, but handing out each stage's input, output and taps."""
        image = image.to(self.compute_dtype())
        stages = []
        with torch.autocast(image.device.type, enabled=False):
            y = self.embed(image)
            for stage in range(self.config.num_stages):
                if stage:
                    y = self.merge(stage - 1, y)
                taps: list[Tensor] = []

                def keep(
                    x: Tensor, y: Tensor, norm: nn.LayerNorm | None, taps: list[Tensor] = taps
                ) -> tuple[Tensor, Tensor]:
                    taps.append(x)
                    return self._residual(x, y, norm)

                y_in, y = y, self.stage(stage, y, keep)
                stages.append(StageOutput(y_in, y, tuple(taps)))
        return stages


class Linear(nn.Linear):
    """A linear layer with bias that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x), _bias(self).to(x))


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_SIZE, PATCH_SIZE)
        self.norm = nn.LayerNorm(dim)


class _Stage(nn.Module):
    def __init__(self, config: SwinConfig, stage: int, drop_path: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(config, stage, shift=config.window_size // 2 * (i % 2), drop_path=rate)
            for i, rate in enumerate(drop_path)
        )
        last = stage == config.num_stages - 1
        self.downsample = None if last else _PatchMerging(config.dims[stage])


class _Block(nn.Module):
    def __init__(self, config: SwinConfig, stage: int, shift: int, drop_path: float) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.shift = shift
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _Attention(dim, config.num_heads[stage], config.window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _MLP(dim, int(dim * config.mlp_ratio))

    def attention(self, z: Tensor, window_attention: Callable[..., Tensor]) -> Tensor:
        attn = self.attn
        qkv = attn.qkv(z)
        table = attn.relative_position_bias_table
        out = window_attention(qkv, _bias(attn.qkv), table, attn.window_size, self.shift)
        del qkv
        return attn.proj(out)

    def residual(self, x: Tensor, y: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        if self.training and self.drop_path:
            keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_path)
            x = x * keep / (1 - self.drop_path)
        y = y + x
        return y, y if norm is None else _layer_norm(y, norm)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, heads)
        )
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.fc1(z)
        if torch.is_grad_enabled():
            hidden = F.gelu(hidden)
        else:
            # Saves the largest map of all. PyTorch has no GEMM with an exact GELU as its epilogue;
            # oneDNN's, behind a private op, was faster on the first stage alone.
            torch.ops.aten.gelu_(hidden)
        return self.fc2(hidden)


class _PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x), norm.bias.to(x), norm.eps)


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
