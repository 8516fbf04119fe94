"""Pretrain the demo's trunk: which single digit is that, and where?

    python -m e3va.demo.pretrain

Digits of the pretraining pool (disjoint from those of all scenes) are drawn alone on crops of the
photographs. The maps of the four stages together tell digit from photograph at every patch and
name the digit, and the pooled last map names it too: a trunk this small learns where to look from
the former and hardly at all from the latter alone. A tenth of the pool is held out and scored.
Half an hour on a CPU core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from e3va.demo.digits import (
    CLASSES,
    MIN_DIGIT,
    PIXEL_MEAN,
    PIXEL_STD,
    background,
    digit_pool,
    paste,
)
from e3va.methods import build_backbone
from e3va.trunks import trunk_config
from e3va.weights import save_trunk

CONFIG = trunk_config("swin_digits")
SIDE = 48
"""Of a crop, in pixels."""
LARGEST = 44
EASY = 30
"""Heights of digits, in pixels: the smallest of the first crops, and the largest."""
HELD_OUT = 512
"""Crops that the accuracy is measured on."""


def sample(
    images: np.ndarray, labels: np.ndarray, count: int, smallest: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random digits on random crops.

    Returns:
        images [count, 3, SIDE, SIDE], normalised; labels [count]; the digits' masks as fractions
        of patches [count, SIDE/4, SIDE/4].
    """
    crops = np.empty((count, SIDE, SIDE, 3), np.float32)
    masks = np.empty((count, 1, SIDE, SIDE), np.float32)
    chosen = rng.integers(len(labels), size=count)
    for i, index in enumerate(chosen):
        canvas = background("pretrain", SIDE, SIDE, rng)
        mask = None
        while mask is None:  # rotated, a large digit may not fit
            height = round(np.exp(rng.uniform(np.log(smallest), np.log(LARGEST))))
            mask = paste(canvas, images[index], height, rng)
        noisy = np.clip(canvas + rng.normal(0, 4, canvas.shape), 0, 255)
        crops[i] = (noisy - PIXEL_MEAN) / PIXEL_STD
        masks[i] = mask
    fractions = F.avg_pool2d(torch.from_numpy(masks), CONFIG.strides[0])[:, 0]
    return (
        torch.from_numpy(crops).permute(0, 3, 1, 2),
        torch.from_numpy(labels[chosen]).long(),
        fractions,
    )


class Reader(nn.Module):
    """A trunk under linear layers that read a digit off it: once per image and at every patch."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = build_backbone("full", CONFIG).trunk
        for layer in self.trunk.modules():
            if isinstance(layer, nn.Linear):
                # The trunk's own 0.02 is meant for hundreds of channels; tens would stay silent.
                nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
        dims = self.trunk.config.dims
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        self.patches = nn.ModuleList(nn.Linear(dim, 1 + len(CLASSES)) for dim in dims)
        self.pooled = nn.Linear(dims[-1], len(CLASSES))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] → digit [B, 10]; is it one, and which, per patch [B, 11, h, w]."""
        maps = [norm(y) for norm, y in zip(self.norms, self.trunk(image), strict=True)]
        size = maps[0].shape[1:3]
        patches = torch.zeros(())
        for layer, y in zip(self.patches, maps, strict=True):
            scores = layer(y).permute(0, 3, 1, 2)
            patches = patches + F.interpolate(scores, size=size, mode="bilinear")
        return self.pooled(maps[-1].mean((1, 2))), patches


def loss_of(model: Reader, image: Tensor, label: Tensor, fraction: Tensor) -> Tensor:
    pooled, patches = model(image)
    digit = fraction > 0.4
    where = F.binary_cross_entropy_with_logits(patches[:, 0], digit.float())
    named = patches[:, 1:].permute(0, 2, 3, 1)[digit]
    which = F.cross_entropy(named, label[:, None, None].expand_as(digit)[digit])
    return F.cross_entropy(pooled, label) + which + where


@torch.no_grad()
def accuracy_of(model: Reader, image: Tensor, label: Tensor) -> float:
    """Fraction of the images whose digit the pooled last map names."""
    return (model(image)[0].argmax(1) == label).float().mean().item()


def main(arguments: list[str] | None = None) -> None:
    default = Path("output/swin_digits.safetensors")
    parser = argparse.ArgumentParser(
        prog="python -m e3va.demo.pretrain", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=default, help="safetensors file to write")
    parser.add_argument("--iterations", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    images, labels = digit_pool("pretrain")
    held_out = np.arange(len(labels)) % 10 == 0
    test = sample(
        images[held_out],
        labels[held_out],
        HELD_OUT,
        MIN_DIGIT,
        np.random.default_rng(options.seed + 1),
    )[:2]
    images, labels = images[~held_out], labels[~held_out]
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, options.iterations, pct_start=0.1
    )
    accuracy = 0.0
    with tqdm(range(options.iterations), desc="pretraining", unit="it") as progress:
        for iteration in progress:
            ease = max(0.0, 1 - 2 * iteration / options.iterations)
            smallest = round(MIN_DIGIT + ease * (EASY - MIN_DIGIT))
            loss = loss_of(model, *sample(images, labels, options.batch_size, smallest, rng))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (iteration + 1) % 100 == 0 or iteration + 1 == options.iterations:
                accuracy = accuracy_of(model, *test)
            progress.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.1%}")
    command = (
        f"python -m e3va.demo.pretrain --iterations {options.iterations} "
        f"--batch-size {options.batch_size} --lr {options.lr} --seed {options.seed}"
    )
    metadata = {"command": command, "accuracy": f"{accuracy:.3f}"}
    save_trunk(model.trunk, options.output, dtype=torch.float16, metadata=metadata)
    print(f"{options.output}: {accuracy:.1%} of {HELD_OUT} held-out digits named")


if __name__ == "__main__":
    main()
