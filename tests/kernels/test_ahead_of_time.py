"""Every kernel compiles for every architecture without a GPU, and nothing spills."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.ptx.compiler import compiles

triton = pytest.importorskip(
    "triton", reason="triton is not installed: its kernels are not compiled"
)

ROOT = Path(__file__).resolve().parents[2]
FORMS = "0", "3 state", "7 state", "0 coded", "3 state coded", "7 state coded"
KERNELS = (
    r"sublayer_epilogue",
    r"sublayer_epilogue norm",
    r"sublayer_epilogue \(no norm\)",
    r"sublayer_epilogue \(no adapter\)",
    r"sublayer_epilogue int4",
    r"sublayer_epilogue norm int4",
    r"sublayer_epilogue int4 \(no norm\)",
    *(rf"adapters {form}" for form in FORMS),
    *(rf"adapters_backward {form}" for form in FORMS),
    r"fold",
    r"fold_backward",
    r"tap_gradient int4",
    r"stage_exit_backward",
    r"stage_exit_backward \(last\)",
)
STACK = {"3.6": 24, "3.9": 16}.get(".".join(triton.__version__.split(".")[:2]), 0)
"""Bytes that a thread may spill: Triton 3.9 gives two kernels a frame of 8 and of 16, and 3.6 three
of 8 to 24."""


@pytest.mark.parametrize(
    ("architecture", "half"),
    [
        ("75", "fp16"),
        ("80", "bf16"),
        ("90", "bf16"),
        pytest.param("80", "fp16", marks=pytest.mark.long),
        pytest.param("90", "fp16", marks=pytest.mark.long),
    ],
)
def test_compiles_ahead_of_time_without_spills(architecture, half):
    """In a process of its own: the interpreter's kernels cannot be compiled."""
    command = [sys.executable, "-m", "bench.registers", "--architectures", architecture]
    command += ["--dtypes", "fp32", half, "--spill", str(STACK), "--tables", "compiled"]
    command += ["--channels", "1536", "--ranks", "16", "--storages", "int4", "int8"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for kernel in KERNELS:
        assert re.search(rf"^{kernel} +{architecture} +{half} +1536 +16 +768 ", done.stdout, re.M)
    if not compiles(int(architecture)):
        warnings.warn("no nvcc: window attention is not compiled", stacklevel=1)
        return
    for form in ("4", "8", "12", "plain"):
        row = rf"^window_attention {form} +{architecture} +{half} +\d+ +0 "
        assert re.search(row, done.stdout, re.M)
