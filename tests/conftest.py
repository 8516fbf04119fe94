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


def _mend_interpreter_of_triton() -> None:
    """Before 3.8 it takes an array of one number for a whole number, which NumPy 2.4 refuses. Since
    3.9 it refuses masks of whole numbers, but makes one of a comparison between two scalars."""
    try:
        import triton
    except ImportError:
        return
    from triton.runtime import interpreter

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 8):
        patch = interpreter._patch_lang_tensor

        def patch_with_index(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

        interpreter._patch_lang_tensor = patch_with_index
    if version >= (3, 9):
        create = interpreter.InterpreterBuilder.create_splat

        def create_splat(self, kind, value):
            block = create(self, kind, value)
            block.data = block.data.astype(value.data.dtype)
            return block

        interpreter.InterpreterBuilder.create_splat = create_splat


_mend_interpreter_of_triton()


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
