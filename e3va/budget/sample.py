"""What images of a step hold, where there are no data."""

from __future__ import annotations

import torch
from torch import Tensor

INSTANCES = 8
"""Of an image, where nobody says."""


def sample_image(height: int, width: int) -> Tensor:
    """Noise [3, H, W], uint8, seeded."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def sample_circles(height: int, width: int, number: int) -> list[tuple[float, float, float]]:
    """x and y of the centre, and the radius, of circles of eight sizes in such an image, seeded."""
    generator = torch.Generator().manual_seed(0)
    circles = []
    for i in range(number):
        radius = min(height, width) * (0.05 + 0.04 * (i % 8)) / 2
        x, y = (
            radius + (side - 2 * radius) * torch.rand((), generator=generator).item()
            for side in (width, height)
        )
        circles.append((x, y, radius))
    return circles
