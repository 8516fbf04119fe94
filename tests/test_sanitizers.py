"""The CPU kernels read and write nothing that is not theirs, and do nothing undefined."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++20", "-O0", "-g", "-Wno-psabi"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_address_and_undefined_behaviour(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: the sanitizers were not run")
    program = tmp_path / "sanitize"
    sources = [ROOT / "tests/csrc/sanitize.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")]
    command = [compiler, *FLAGS, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    for capability in ("", "avx512", "avx2", "default"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [program], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, f"{capability}: {done.stderr}"
