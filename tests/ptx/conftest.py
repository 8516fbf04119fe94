import functools
import importlib.util

import pytest


@pytest.fixture(scope="session")
def compiler():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: its kernels are not executed")
    from tests.ptx.compiler import TritonCompiler

    compiler = TritonCompiler()
    yield compiler
    compiler.close()


@pytest.fixture
def device(compiler):
    """device(architecture, …): see :class:`tests.ptx.device.Device`."""
    from tests.ptx.device import Device

    return functools.partial(Device, compiler)
