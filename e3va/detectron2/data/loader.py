"""Training batches as a function of the seed and the iteration, so that a run can be resumed."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.build import _train_loader_from_config
from detectron2.data.common import DatasetFromList, MapDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from e3va.runs.interrupt import ignore_interrupts
from e3va.seeding import reseed

Sample = dict[str, Any]

AUTO = -1
"""SOLVER.ACCUMULATE is to be found before the first step."""


class TrainLoader:
    """Endless batches for one process, from the data, sampler and augmentations of a config.

    As Detectron2's own loader, but batch i does not depend on how many were loaded before: the
    sampler is replayed up to it, and each sample seeds its augmentations by its position in the
    whole run. So neither a restart nor the number of processes or workers changes a sample. (Of
    Detectron2's samplers, the random subset and the weighted ones draw a seed where SEED is
    negative: a restart then changes their order.)

    Args:
        cfg: the config.
        mapper: makes a sample of a data set's record (default: Detectron2's, as ``cfg`` has it).

    Attributes:
        start: the first iteration to load (0).
        seed: of the augmentations (SEED, or 0 where that is negative).
        records: height, width (None: not known) and number of instances of each image.

    Raises:
        ValueError: SOLVER.IMS_PER_BATCH does not divide among the processes.
    """

    def __init__(
        self, cfg: CfgNode, mapper: Callable[[Sample], Sample | None] | None = None
    ) -> None:
        parts = _train_loader_from_config(cfg, mapper)
        self.start = 0
        self.seed = max(cfg.SEED, 0)
        self._batch_size = batch_share(cfg)
        self._sampler = parts["sampler"]
        self._workers = parts["num_workers"]
        group = parts["aspect_ratio_grouping"]
        # Records of semantic segmentation need not tell their size: they are all together.
        self._wide = [group and r.get("width", 0) > r.get("height", 0) for r in parts["dataset"]]
        self.records = [
            (r.get("height"), r.get("width"), len(r.get("annotations", ())))
            for r in parts["dataset"]
        ]
        self._samples = MapDataset(DatasetFromList(parts["dataset"], copy=False), parts["mapper"])

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(
            DataLoader(
                _Seeded(self._samples, self.seed),
                batch_sampler=itertools.islice(self._batches(), self.start, None),
                collate_fn=list,
                num_workers=self._workers,
                worker_init_fn=ignore_interrupts,
            )
        )

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (position in the run, index in the data set), wide images and high ones apart
        where ASPECT_RATIO_GROUPING wants that."""
        positions = itertools.count(comm.get_rank(), comm.get_world_size())
        buckets: defaultdict[bool, list[tuple[int, int]]] = defaultdict(list)
        for position, index in zip(positions, self._sampler, strict=False):
            bucket = buckets[self._wide[index]]
            bucket.append((position, index))
            if len(bucket) == self._batch_size:
                yield bucket.copy()
                bucket.clear()


class _Seeded(Dataset[Sample]):
    """Samples by (position, index), the position seeding what is random about them."""

    def __init__(self, samples: Dataset[Sample], seed: int) -> None:
        self._samples = samples
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        position, index = key
        reseed(self._seed, 0, position)
        return self._samples[index]


def batch_share(cfg: CfgNode) -> int:
    """Images of a batch for each process.

    Raises:
        ValueError: SOLVER.IMS_PER_BATCH does not divide among the processes, or their share not
            into SOLVER.ACCUMULATE micro-batches.
    """
    images, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    accumulate = cfg.SOLVER.ACCUMULATE
    if accumulate == AUTO:
        accumulate = 1
    if accumulate < 1 or images < 1 or images % (processes * accumulate):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH ({images}) must be a multiple of SOLVER.ACCUMULATE "
            f"({accumulate}) times the number of processes ({processes})"
        )
    return images // processes
