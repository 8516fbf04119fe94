"""The CPU kernels read and write nothing that is not theirs, and do nothing undefined; what they
compute by instructions for bfloat16, which few processors have, is what they compute without."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++20", "-O0", "-g1", "-Wno-psabi"]  # to optimise takes longer than it saves
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(program: Path, sources: list[Path], *flags: str) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: the sanitizers were not run")
    subprocess.run([compiler, *FLAGS, *flags, *map(str, sources), "-o", str(program)], check=True)


def failures(program: Path, **environment: str) -> str:
    done = subprocess.run(
        [program], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    return "" if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr}"


def test_this_processors_instructions(tmp_path):
    program = tmp_path / "sanitize"
    build(program, [ROOT / "tests/csrc/sanitize.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")])
    for capability in ("", "avx512", "avx2", "default"):
        found = failures(program, ATEN_CPU_CAPABILITY=capability)
        assert not found, f"{capability}: {found}"


def test_emulated_instructions(tmp_path):
    program, folder = tmp_path / "tiles", ROOT / "tests/csrc"
    kernels = [path for path in (ROOT / "csrc/cpu").glob("*.cpp") if path.stem != "instruction_set"]
    emulated = '-DE3VA_INSTRUCTIONS="emulated_instructions.h"'
    build(program, [folder / "tiles.cpp", *kernels], emulated, f"-I{folder}")
    assert not failures(program)
