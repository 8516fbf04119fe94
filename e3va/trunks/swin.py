"""The Swin Transformer (arXiv 2103.14030): trainable (:class:`Swin`) and frozen
(:class:`FrozenSwin`). Parameter names are those of the official implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va import ops
from e3va.config import check_positive_int
from e3va.ops import functional
from e3va.ops.backends import reference
from e3va.trunks import swin_weights
from e3va.trunks.base import (
    Epilogue,
    Frozen,
    Linear,
    Transition,
    Trunk,
    TrunkFamily,
    layer_norm,
    register_family,
)

PATCH_SIZE = 4


@dataclass(frozen=True)
class SwinConfig:
    """Architecture of a Swin Transformer (arXiv 2103.14030, table 7).

    Attributes:
        embed_dim: channels C of stage 0; stage s has ``embed_dim * 2**s``.
        depths: Swin blocks per stage. Every second block shifts its windows.
        num_heads: attention heads per stage; must divide the stage's channels.
        window_size: side of an attention window in tokens.
        mlp_ratio: hidden width of the MLP over C.

    Raises:
        TypeError: a field is not an integer (``mlp_ratio``: a number).
        ValueError: a field is out of range, or heads do not divide the channels.
    """

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "num_heads", tuple(self.num_heads))
        for name in ("embed_dim", "window_size"):
            check_positive_int(name, getattr(self, name))
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ValueError(
                "depths and num_heads must be non-empty and of one length, got "
                f"{self.depths} and {self.num_heads}"
            )
        for depth in self.depths:
            check_positive_int("depths", depth)
        for dim, heads in zip(self.dims, self.num_heads, strict=True):
            check_positive_int("num_heads", heads)
            if dim % heads:
                raise ValueError(
                    f"num_heads must divide the channels of its stage: {heads} does not divide "
                    f"{dim} (embed_dim={self.embed_dim}, num_heads={self.num_heads})"
                )
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels C of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(self.num_stages))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels for each token of a stage, along each side."""
        return tuple(PATCH_SIZE * 2**stage for stage in range(self.num_stages))

    @property
    def num_taps(self) -> tuple[int, ...]:
        """Taps K of each stage: the outputs of W-MSA and MLP of each block."""
        return tuple(2 * depth for depth in self.depths)


class Swin(Trunk):
    """Swin Transformer without output norms or classifier, trainable.

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

    config: SwinConfig

    # The trainable network needs a backward through attention, which the op does not have, and the
    # input of the GELU.
    _window_attention = staticmethod(reference.window_attention)
    _gelu: Callable[[Tensor], Tensor] = staticmethod(F.gelu)

    def __init__(self, config: SwinConfig, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        self.patch_embed = _PatchEmbed(config.embed_dim)
        rates = torch.linspace(0, drop_path, sum(config.depths), device="cpu")
        self.layers = nn.ModuleList(
            _Stage(config, stage, part.tolist())
            for stage, part in enumerate(rates.split(list(config.depths)))
        )
        self.apply(_init_weights)

    def storage_dtype(self) -> torch.dtype:
        return self.patch_embed.proj.weight.dtype

    def embed(self, image: Tensor) -> Tensor:
        """Patch embedding: image [B, 3, H, W] → [B, ⌈H/4⌉, ⌈W/4⌉, C], in the image's dtype.

        Raises:
            ValueError: the image has another shape.
        """
        if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape[2:]:
            raise ValueError(f"image must have shape [B, 3, H, W], got {list(image.shape)}")
        bottom, right = (-n % PATCH_SIZE for n in image.shape[-2:])
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        conv, norm = self.patch_embed.proj, self.patch_embed.norm
        y = F.conv2d(image, conv.weight.to(image), _bias(conv).to(image), stride=PATCH_SIZE)
        return layer_norm(y.permute(0, 2, 3, 1).contiguous(), norm)

    def stage(self, stage: int, y: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        """The blocks of one stage: [B, H, W, C] → [B, H, W, C].

        ``epilogue`` completes each sub-layer; default: residual add, with stochastic depth in
        training.
        """
        blocks: Any = self.blocks(stage)
        z = layer_norm(y, blocks[0].norm1)
        for i, block in enumerate(blocks):
            complete = epilogue or block.residual
            y, z = complete(block.attention(z, self._window_attention), y, block.norm2)
            after = blocks[i + 1].norm1 if i + 1 < len(blocks) else None
            y, z = complete(block.mlp(z, self._gelu), y, after)
        return y

    def transition(self, stage: int) -> PatchMerging | None:
        downsample = self._layer(stage).downsample
        return PatchMerging(downsample) if downsample is not None else None

    def blocks(self, stage: int) -> Sequence[nn.Module]:
        return self._layer(stage).blocks

    def qkv(self, stage: int) -> Sequence[nn.Linear]:
        blocks: Any = self.blocks(stage)
        return [block.attn.qkv for block in blocks]

    def _layer(self, stage: int) -> Any:
        return self.layers[stage]


def _gelu_in_place(x: Tensor) -> Tensor:
    """Saves the largest map of all. PyTorch has no GEMM with an exact GELU as its epilogue;
    oneDNN's, behind a private op, was faster on the first stage alone."""
    return torch.ops.aten.gelu_(x)


class FrozenSwin(Frozen, Swin):
    """A Swin that only ever runs forward: no autograd, no stochastic depth, not even in training;
    see :class:`~e3va.trunks.base.Frozen`."""

    _window_attention = staticmethod(ops.window_attention)
    _gelu = staticmethod(_gelu_in_place)


class PatchMerging(Transition):
    """Down-sampling [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, 2C]: 2×2 neighbours are concatenated,
    normalised and projected (arXiv 2103.14030, sec. 3.1)."""

    def __init__(self, downsample: _Downsample) -> None:
        norm = downsample.norm
        self._parameters = norm.weight, norm.bias, norm.eps, downsample.reduction.weight

    def __call__(self, y: Tensor) -> Tensor:
        return functional.patch_merging(y, *self._parameters)

    def exit(self, h: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return ops.stage_exit(h, norm.weight, norm.bias, norm.eps, *self._parameters)

    def pool(self, carry: Tensor) -> Tensor:
        return functional.pool_2x2(carry)


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
        self.downsample = None if last else _Downsample(config.dims[stage])


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
        return y, y if norm is None else layer_norm(y, norm)


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

    def forward(self, z: Tensor, gelu: Callable[[Tensor], Tensor]) -> Tensor:
        return self.fc2(gelu(self.fc1(z)))


class _Downsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


SWIN_VARIANTS: dict[str, SwinConfig] = {
    "swin_t": SwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": SwinConfig(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": SwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    # 2.3 M parameters; its weights ship with the package (e3va/demo).
    "swin_digits": SwinConfig(32, (2, 2, 2, 2), (1, 2, 4, 8)),
}


_RELEASE = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0"
SOURCES = {
    "swin_t": f"{_RELEASE}/swin_tiny_patch4_window7_224.pth",
    "swin_s": f"{_RELEASE}/swin_small_patch4_window7_224.pth",
    "swin_b": f"{_RELEASE}/swin_base_patch4_window7_224_22k.pth",
    "swin_l": f"{_RELEASE}/swin_large_patch4_window7_224_22k.pth",
    "swin_digits": "e3va://swin_digits.safetensors",
}


def _config_of(state: Mapping[str, Tensor]) -> SwinConfig:
    return SwinConfig(*swin_weights.architecture_of(state))


def _describe(config: SwinConfig) -> str:
    for variant, known in SWIN_VARIANTS.items():
        if dataclasses.replace(known, window_size=config.window_size) == config:
            return f"{variant} with windows of {config.window_size}"
    return (
        f"a Swin of {config.embed_dim} channels, depths {config.depths}, heads {config.num_heads} "
        f"and windows of {config.window_size}"
    )


register_family(
    TrunkFamily(
        name="swin",
        config=SwinConfig,
        variants=SWIN_VARIANTS,
        trainable=Swin,
        frozen=FrozenSwin,
        translate=swin_weights.translate,
        config_of=_config_of,
        describe=_describe,
        marks=swin_weights.MARKS,
        sources=SOURCES,
        no_decay=frozenset({"relative_position_bias_table"}),
        is_quantizable=lambda name: "blocks" in name,
    )
)
