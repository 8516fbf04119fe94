"""The largest step of some data is taken before the first, for its memory alone."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from e3va.measure import CappedBytes, LiveBytes
from e3va.torchvision import TrainConfig
from e3va.torchvision.train import try_largest
from tests.data.conftest import coco
from tests.torchvision.conftest import detector

CONFIG = TrainConfig(iterations=1, batch_size=2)


def test_the_largest_step_changes_nothing_and_what_does_not_fit_is_said(tmp_path):
    data = coco(tmp_path, masks=True)
    model = detector("e3va", "mask_rcnn").train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draws, sizes = torch.get_rng_state(), model.transform.min_size
    with LiveBytes() as memory:
        try_largest(model, data, CONFIG, optimizer)
    with (
        CappedBytes(memory.peak // 2),
        pytest.raises(torch.OutOfMemoryError, match=r"2 of the largest images .* lower batch_size"),
    ):
        try_largest(model, data, CONFIG, optimizer)
    with CappedBytes(memory.peak + memory.peak // 10):
        try_largest(model, data, CONFIG, optimizer)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), draws)
    assert model.transform.min_size == sizes
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())


def test_the_largest_images(tmp_path):
    data = coco(tmp_path, masks=False)
    sizes = [(i["height"], i["width"]) for i in data._images]
    largest, most = data.largest(100, 10_000)
    long_over_short = [max(size) / min(size) for size in sizes]
    assert long_over_short[largest] == max(long_over_short)
    counts = [len(data[i][1]["labels"]) for i in range(len(data))]
    assert counts[most] == max(counts)
