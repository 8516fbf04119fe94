"""Training batches."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from e3va.detectron2 import Trainer


def test_batches_depend_on_neither_workers_nor_processes(packaged, monkeypatch):
    cfg = packaged("INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", (40, 48, 64))
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False

    def samples(count, start=0):
        loader = Trainer.build_train_loader(cfg)
        loader.start = start
        iterator = iter(loader)
        return [(s["file_name"], s["image"]) for _ in range(count) for s in next(iterator)]

    def assert_equal(a, b):
        for (name, image), (other, pixels) in zip(a, b, strict=True):
            assert name == other
            assert torch.equal(image, pixels)

    alone = samples(6)
    assert len({image.shape for _, image in alone}) > 4  # they are augmented
    cfg.DATALOADER.NUM_WORKERS = 2
    assert_equal(samples(3, start=3), alone[6:])
    cfg.DATALOADER.NUM_WORKERS = 0
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        assert_equal(samples(6), alone[rank::2])


def test_wide_and_high_images_apart(packaged):
    """As ASPECT_RATIO_GROUPING wants it, by default; all are seen."""
    iterator = iter(Trainer.build_train_loader(packaged()))
    seen = [[(s["width"] > s["height"], s["file_name"]) for s in next(iterator)] for _ in range(9)]
    assert all(len({wide for wide, _ in batch}) == 1 for batch in seen)
    assert len({name for batch in seen for _, name in batch}) == 3


def test_images_of_unknown_size(packaged, monkeypatch):
    cfg = packaged()
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    for record in records:
        del record["width"], record["height"]
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: records)
    iterator = iter(Trainer.build_train_loader(cfg))
    names = [s["file_name"] for _ in range(3) for s in next(iterator)]
    assert len(set(names[:3])) == len(set(names[3:])) == 3
