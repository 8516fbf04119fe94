"""The CPU kernels read and write nothing that is not theirs, and do nothing undefined."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++20", "-O1", "-g", "-Wno-psabi", "-fno-sanitize-recover=all"]


def build_and_run(tmp_path, *flags):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: the sanitizers were not run")
    program = tmp_path / "sanitize"
    sources = [ROOT / "tests/csrc/sanitize.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")]
    command = [compiler, *FLAGS, *flags, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([program], capture_output=True, text=True, check=False)


def test_address_and_undefined_behaviour(tmp_path):
    done = build_and_run(tmp_path, "-fsanitize=address,undefined")
    assert done.returncode == 0, done.stderr
