"""Steps on shapes alone make what real ones make."""

import contextlib

import pytest
import torch

import e3va
from e3va.budget import ShapesOnly
from e3va.measure import LiveBytes


@pytest.mark.parametrize("method", ["full", "frozen", "partial1", "mona", "e3va"])
@pytest.mark.parametrize("size", [(203, 331), (224, 448)])
def test_a_forward_on_shapes_takes_what_a_real_one_does(method, size):
    """At its peak and when it is over, of windows that need padding and of those that do not."""
    found = []
    for shapes in (None, ShapesOnly()):
        torch.manual_seed(0)
        backbone = e3va.build_backbone(method, e3va.trunk_config("swin_t"))
        image = torch.randn(1, 3, *size)
        if shapes:
            shapes.forget(*backbone.parameters())
            shapes.never_look_in(backbone)
        autocast = torch.autocast("cpu", torch.bfloat16)
        with shapes or contextlib.nullcontext(), LiveBytes() as memory, autocast:
            maps = backbone(image)
        found.append((memory.peak, memory.live, {name: p.shape for name, p in maps.items()}))
    (real_peak, real_live, real_maps), (peak, live, maps) = found
    assert maps == real_maps
    # A kernel may keep the statistics of a norm in another dtype.
    assert peak == pytest.approx(real_peak, rel=3e-3)
    assert live == pytest.approx(real_live, rel=3e-3)
