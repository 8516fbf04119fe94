"""UPerNet."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.layers import ShapeSpec
from torch import nn

from e3va.detectron2 import UPerNetHead

SHAPES = {f"p{s}": ShapeSpec(channels=8 * 2**s, stride=4 * 2**s) for s in range(4)}


def features(height, width):
    sizes = [(height, width)]
    for _ in range(3):
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    return {
        name: torch.randn(2, shape.channels, *size)
        for (name, shape), size in zip(SHAPES.items(), sizes, strict=True)
    }


@pytest.mark.parametrize("size", [(16, 24), (13, 7), (1, 1)])
@pytest.mark.parametrize("norm", ["GN", "BN", ""])
def test_upernet_shapes_and_gradients(size, norm):
    head = UPerNetHead(SHAPES, num_classes=5, conv_dim=32, norm=norm, aux_dim=32)
    maps = features(*size)
    for p in maps.values():
        p.requires_grad_()
    height, width = 4 * size[0] - 1, 4 * size[1] - 3
    targets = torch.randint(0, 5, (2, height, width))
    targets[0] = 255
    _, losses = head(maps, targets)
    assert set(losses) == {"loss_sem_seg", "loss_sem_seg_aux"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(p.grad.isfinite().all() for p in maps.values())

    head.eval()
    logits, losses = head(maps)
    assert logits.shape == (2, 5, 4 * size[0], 4 * size[1])
    assert losses == {}


@pytest.mark.parametrize("norm", ["BN", "naiveSyncBN"])
def test_upernet_says_what_to_do_with_one_image(norm):
    head = UPerNetHead(SHAPES, num_classes=5, conv_dim=32, norm=norm, aux_dim=32)
    maps = {name: p[:1] for name, p in features(8, 8).items()}
    with pytest.raises(ValueError, match=r"MODEL\.SEM_SEG_HEAD\.NORM GN"):
        head(maps, torch.zeros(1, 32, 32, dtype=torch.long))
    assert head.eval()(maps)[0].isfinite().all()


def test_upernet_losses():
    """The mean over labelled pixels; the auxiliary one has its weight."""
    head = UPerNetHead(SHAPES, num_classes=5, conv_dim=32, norm="GN", aux_dim=32, dropout=0.0)
    maps, targets = features(8, 8), torch.randint(0, 5, (2, 32, 32))
    targets[:, :9] = 255
    _, losses = head(maps, targets)
    logits, _ = head.eval()(maps)
    expected = nn.functional.cross_entropy(logits, targets, ignore_index=255)
    assert losses["loss_sem_seg"].item() == pytest.approx(expected.item(), rel=1e-5)
    auxiliary = head.auxiliary(maps["p2"])
    auxiliary = nn.functional.interpolate(auxiliary, scale_factor=16, mode="bilinear")
    expected = nn.functional.cross_entropy(auxiliary, targets, ignore_index=255)
    assert losses["loss_sem_seg_aux"].item() == pytest.approx(0.4 * expected.item(), rel=1e-5)

    alone = UPerNetHead(SHAPES, num_classes=5, conv_dim=32, norm="GN", aux_loss_weight=0)
    assert set(alone(maps, targets)[1]) == {"loss_sem_seg"}
    with pytest.raises(ValueError, match="AUX_FEATURE must be one of p0, p1, p2, p3, got 'res4'"):
        UPerNetHead(SHAPES, num_classes=5, aux_feature="res4")
