"""The CPU kernels are compiled for several instruction sets: the lesser ones, asked for by name."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from e3va.ops.backends.native import build_info

HERE = Path(__file__).parent
KERNELS = ("sublayer_epilogue", "highway", "storage", "window_attention_native")
# What float64 and opcheck look at is PyTorch.
SELECTED = "native and not cuda and not opcheck and not gradcheck and not float64"


@pytest.mark.skipif("C++" not in build_info().built, reason="the CPU kernels were not built")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16"])
def test_each_passes_the_tests(capability):
    most = torch.backends.cpu.get_cpu_capability()
    # PyTorch takes what it is asked for, on a processor without it, too, and dies.
    if "avx512" in capability and most != "AVX512":
        pytest.skip("this processor has no AVX-512")
    if capability.upper() == most != "AVX512":  # of which there are several
        pytest.skip("all other tests run on it")
    files = [str(HERE / f"test_{name}.py") for name in KERNELS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", SELECTED, *files]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout[-3000:]
