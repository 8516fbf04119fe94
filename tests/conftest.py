import logging
import os
from pathlib import Path

import pytest
import torch

# The workers of pytest-xdist share the cores, as do the programs that they run: more threads than
# cores would wait for each other.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

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


@pytest.fixture
def compiler():
    """One that has seen nothing: sizes that varied between tests would be traced as symbols, which
    takes many times as long."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets (nuclei/, microcontrollers/, …)."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("E3VA_DATA", default))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}: set E3VA_DATA to test on it")
    return root
