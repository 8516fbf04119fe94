"""The Swin of other libraries, each built from our config with random weights: oracles."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va.trunks import SwinConfig


def timm(config: SwinConfig, size: tuple[int, int]) -> nn.Module:
    pytest.importorskip("timm")
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=tuple(math.ceil(n / 4) * 4 for n in size),
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window_size,
        mlp_ratio=config.mlp_ratio,
        num_classes=0,
    )


def torchvision(config: SwinConfig, size: tuple[int, int]) -> nn.Module:
    pytest.importorskip("torchvision")
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=[config.window_size] * 2,
        mlp_ratio=config.mlp_ratio,
        num_classes=1,
    )


def transformers(config: SwinConfig, size: tuple[int, int]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.SwinModel(
        transformers.SwinConfig(
            image_size=224,
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=config.window_size,
            mlp_ratio=config.mlp_ratio,
        ),
        add_pooling_layer=False,
    )


def detectron2(config: SwinConfig, size: tuple[int, int]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("detectron2")
        from detectron2.modeling.backbone.swin import SwinTransformer

    return SwinTransformer(
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=config.window_size,
        mlp_ratio=config.mlp_ratio,
        out_indices=tuple(range(config.num_stages)),
    )


LIBRARIES = {
    "timm": timm,
    "torchvision": torchvision,
    "transformers": transformers,
    "detectron2": detectron2,
}


def build(library: str, config: SwinConfig, size: tuple[int, int] = (64, 64)) -> nn.Module:
    """The library's Swin in eval mode, each of its parameters random."""
    model = LIBRARIES[library](config, size).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that keep activations moderate, and biases, norms and tables that matter."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "table" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.2)


@torch.no_grad()
def stage_outputs(library: str, model: nn.Module, image: Tensor) -> list[Tensor]:
    """What the last block of each stage puts out, as [B, H·W, C]."""
    if library == "torchvision":
        stages = list(model.features[1::2])
    elif library == "transformers":
        stages = [layer.blocks for layer in model.encoder.layers]
    else:
        stages = [layer.blocks for layer in model.layers]
    outputs: list[Tensor] = []

    def keep(block: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        y = output[0] if isinstance(output, tuple) else output
        outputs.append(y.reshape(y.shape[0], -1, y.shape[-1]))

    handles = [stage[-1].register_forward_hook(keep) for stage in stages]
    height, width = image.shape[-2:]
    model(F.pad(image, (0, -width % 4, 0, -height % 4)))
    for handle in handles:
        handle.remove()
    return outputs
