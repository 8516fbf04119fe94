import logging
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logger():
    """Detectron2's set-up would change what every later test's caplog sees of our messages."""
    yield
    ours = logging.getLogger("e3va")
    ours.propagate = True
    ours.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets (nuclei/, microcontrollers/, …)."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("E3VA_DATA", default))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}: set E3VA_DATA to test on it")
    return root
