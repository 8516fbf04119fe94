"""Where tests of the ops run, and which backend they ask for."""

import pytest
import torch

from e3va.ops.backends import native

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def backend_of(name: str) -> str:
    """What to hand to ``e3va.backend``.

    "native" leaves float64 to the reference; the test is skipped only where it was not built.
    """
    if name != "native":
        return name
    left_out = native.build_info().left_out.get("C++")
    if left_out:
        pytest.skip(f"compiled kernels left untested: {left_out}")
    return "native,reference"
