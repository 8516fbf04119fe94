import functools

import pytest
import torch

from e3va.trunks import FrozenSwin
from tests import libraries
from tests.weights.files import CONFIG, SIZE


@pytest.fixture(scope="module")
def source():
    """A trunk with random weights, to be found again in every file."""
    torch.manual_seed(1)
    trunk = FrozenSwin(CONFIG)
    libraries.randomise(trunk)
    return trunk


@pytest.fixture(scope="module")
def model_of():
    """Another library's Swin, built once."""
    return functools.cache(lambda library: libraries.build(library, CONFIG, SIZE))
