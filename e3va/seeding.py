"""What is random follows from the seed and a place in the run, so that a run can be resumed."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """One of 2³² seeds for each ``key``, integers that are not negative: the seed of a run, what is
    drawn, and where in the run."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def reseed(*key: int) -> None:
    """Seed Python's, numpy's and PyTorch's generators from ``key``, see :func:`seed_of`."""
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
