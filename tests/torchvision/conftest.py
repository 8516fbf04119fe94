"""Narrow detectors and what they are trained on."""

import pytest
import torch

import e3va

TINY = e3va.trunks.SwinConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
SMALL = {"out_channels": 16, "min_size": 64, "max_size": 96, "anchor_sizes": (8, 16, 32, 64, 96)}
SMALL_HEADS = {
    "mask_rcnn": {"representation_size": 32, "mask_channels": (16,)},
    "faster_rcnn": {"representation_size": 32},
    "retinanet": {},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-for-bit claims should not hang on how a reduction is split among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def backbone(method="e3va", seed=0, trunk_seed=0, **options):
    """A narrow backbone, its trunk's weights drawn apart from the rest."""
    torch.manual_seed(trunk_seed)
    trunk = e3va.trunks.Swin(TINY).state_dict()
    torch.manual_seed(seed)
    if method.startswith("e3va"):
        options = {"branches": 1, "kernel_dim": 4, **options}
    built = e3va.build_backbone(method, TINY, **options)
    built.trunk.load_state_dict(trunk)
    return built


def detector(method="e3va", kind="mask_rcnn", seed=0, trunk_seed=0, **options):
    """A narrow detector of two classes and the background."""
    from e3va.torchvision import build_detector

    body = backbone(method, seed, trunk_seed)
    return build_detector(kind, body, 3, **{**SMALL, **SMALL_HEADS[kind], **options})


def box_target(height, width, *boxes):
    """A target of rectangles, their labels 1, 2, 1, 2, …"""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.arange(len(boxes)) % 2 + 1
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": labels, "masks": masks}


def batch():
    """Mixed sizes (one below a window), an empty target, a box one pixel high."""
    images = [torch.rand(3, 64, 90), torch.rand(3, 5, 6), torch.rand(3, 70, 48)]
    targets = [
        box_target(64, 90, (5, 5, 40, 40), (30, 20, 80, 60), (10, 50, 60, 51)),
        box_target(5, 6),
        box_target(70, 48, (4, 8, 40, 60)),
    ]
    return images, targets
