from functools import partial

import pytest
import torch
from torch import nn

from e3va import E3VABackbone, HighwayConfig, ops, optim
from e3va.measure import (
    SPLIT,
    LiveBytes,
    SavedBytes,
    peak_live_bytes,
    resident_bytes,
    saved_bytes,
    step_split,
    trainable_parameters,
    whole_step_bytes,
)
from e3va.optim import take_step
from e3va.trunks import FrozenSwin, SwinConfig

MIB = 2**18  # float32 values in a MiB


def test_live_bytes_of_known_code():
    before = torch.zeros(MIB)
    with LiveBytes() as memory:
        a = before + 1
        assert memory.live == 2**20
        b = a.view(2, -1) * 2  # a view is no storage of its own
        assert memory.live == memory.peak == 2 * 2**20
        del b
        assert memory.live == 2**20
        a.add_(1)
        c = a + 1
    assert (memory.live, memory.peak) == (2 * 2**20, 2 * 2**20)
    del a, c
    assert memory.live == 0


def test_live_bytes_include_the_backward():
    x = torch.randn(MIB, requires_grad=True)
    with LiveBytes() as memory:
        (x.exp() * 2).sum().backward()
    assert memory.peak >= 3 * 2**20  # exp(x), its gradient, the gradient of x
    assert memory.live == 2**20  # x.grad


def test_live_bytes_look_into_our_own_ops():
    """stage_exit concatenates and normalises inside: two maps of the input's size."""
    h = torch.randn(1, 64, 64, 16)
    with LiveBytes() as memory:
        norm = torch.ones(16), torch.zeros(16), 1e-5
        merging = torch.ones(64), torch.zeros(64), 1e-5, torch.randn(32, 64)
        _, out = ops.stage_exit(h, *norm, *merging)
    assert memory.peak >= 2 * h.nbytes > out.nbytes


def test_saved_bytes_count_a_storage_once_and_parameters_never():
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def run():
        return layer(x).tanh().exp().exp()  # saved: x, tanh, exp, exp

    assert saved_bytes(layer, run) == 4 * 4 * 8 * 4
    with SavedBytes() as saved:
        run()
    assert saved.total == 4 * 4 * 8 * 4 + layer.weight.nbytes


def test_trainable_parameters():
    trunk = FrozenSwin(SwinConfig(16, (1,), (1,), 3))
    backbone = E3VABackbone(trunk, HighwayConfig(1, 4))
    assert trainable_parameters(trunk) == 0
    per_tap = 2 * 16 * 4 + 2 * 4 * 8 + 8 + 2 * 4 * 4 + 4 * 3 * 3 + 4
    assert trainable_parameters(backbone) == 2 * per_tap + 16 + 2 * 16


class _Part(nn.Module):
    """Makes ``bytes_`` bytes while it runs, and keeps as many for its backward."""

    def __init__(self, bytes_, inner=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.bytes_, self.inner = bytes_, inner

    def forward(self, x):
        x = x if self.inner is None else self.inner(x)
        wide = (x.sum() * self.weight[0]).expand(self.bytes_ // 4).exp()  # saved for its backward
        return wide.sum()


def _detector():
    """Each part makes one storage of note; the RoI heads' is the largest."""
    model = nn.Module()
    backbone = _Part(2**20)
    model.backbone = _Part(2**21, backbone)
    model.backbone.bottom_up = backbone
    model.rpn, model.roi_heads = _Part(2**22), _Part(2**23)
    model.backbone.bottom_up.weight.requires_grad_(False)
    return model


def test_split_of_a_step_by_what_made_it():
    model = _detector()

    def loss():
        image = torch.randn(2**16)
        kept = torch.randn(2**18).requires_grad_()  # 1 MiB that belongs to no part
        x = model.backbone(image.requires_grad_())
        return model.rpn(x) + model.roi_heads(x) + (kept * kept).sum()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    split = step_split(model, lambda: take_step(loss, optimizer), optimizer)
    assert tuple(split) == SPLIT
    small = 2**10
    fixed = {"trunk_weights": 16, "other_weights": 48, "optimizer": 96 + 3 * 4}
    assert {key: split[key] for key in fixed} == fixed
    assert split["gradients"] == 0  # there are none yet at the peak
    assert 0 <= split["backbone_saved"] - 2**20 < small and split["backbone_transient"] < small
    assert 0 <= split["neck"] - 2**21 < small
    assert 0 <= split["proposals"] - 2**22 < small
    # Its exp(x) and the gradient of that, which the backward makes, are alive with all the others.
    assert 0 <= split["heads"] - 2 * 2**23 < small
    assert split["loss_and_data"] >= 2**20 + 2**18
    assert sum(split.values()) == whole_step_bytes(
        model, optimizer, lambda: take_step(loss, optimizer)
    )
    assert sum(split.values()) - sum(fixed.values()) == pytest.approx(
        peak_live_bytes(model, loss), abs=small
    )
    # Made beforehand, as by the last part of an accumulated step, they stay.
    assert step_split(model, lambda: loss().backward(), optimizer)["gradients"] == 48


@pytest.mark.parametrize(("early", "gradients"), [(False, 2), (True, 1)])
def test_gradients_are_those_that_there_are_at_once(early, gradients, monkeypatch):
    monkeypatch.setattr(optim, "READY", 0)
    size = 2**8
    model = nn.Module()
    model.backbone, model.roi_heads = nn.Module(), nn.Linear(size, size, bias=False)
    model.backbone.bottom_up = nn.Linear(size, size, bias=False)

    def loss():
        return model.roi_heads(model.backbone.bottom_up(torch.ones(1, size))).sum()

    sgd = torch.optim.SGD(model.parameters(), foreach=False)
    split = step_split(model, lambda: take_step(loss, sgd, early), sgd)
    assert split["gradients"] == gradients * 4 * size**2


def test_what_the_backbone_makes_is_saved_only_if_it_outlives_the_forward():
    class Backbone(_Part):
        def forward(self, x):
            torch.zeros(2**22)  # freed at once, and the peak
            return super().forward(x)

    model = _detector()
    model.backbone.bottom_up = model.backbone.inner = Backbone(2**20)
    model.rpn = model.roi_heads = None
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    step = partial(take_step, lambda: model.backbone(torch.ones(4)), optimizer)
    split = step_split(model, step, optimizer)
    assert split["backbone_transient"] == 2**24
    assert split["backbone_saved"] == split["neck"] == split["proposals"] == 0
    assert split["optimizer"] == 32 and split["gradients"] == 0


def test_whole_step_bytes_count_gradients_while_they_are_there():
    layer = nn.Linear(512, 512, bias=False)  # a MiB
    adam = torch.optim.Adam(layer.parameters(), lr=0.0, fused=True)
    x = torch.zeros(1, 512)

    def step():
        layer(x).sum().backward()
        adam.step()
        adam.zero_grad()

    total = whole_step_bytes(layer, adam, step)
    assert resident_bytes(layer, adam) == 3 * 2**20 + 4  # weight, two moments, the number of steps
    assert 4 * 2**20 <= total < 4.1 * 2**20
    assert whole_step_bytes(layer, adam, step, limit=total) == total
    with pytest.raises(torch.OutOfMemoryError):
        whole_step_bytes(layer, adam, step, limit=total - 1)
