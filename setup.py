"""Builds what this machine can build of csrc/, and records what it left out and why.

The C++ part needs a C++ compiler; the CUDA part also nvcc and a torch made for CUDA (the toolkit
decides, not a GPU). Where one is missing the package installs without that part; where one is there
and fails, so does the installation. Environment variables:

    CXX                  the C++ compiler (default: the first of c++, g++, clang++)
    TORCH_CUDA_ARCH_LIST GPU architectures, as for torch's own extensions ("8.0;9.0+PTX")
    E3VA_BUILD           "none" builds nothing, "cpu" leaves out the CUDA part
"""

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH = "torch>=2.11"
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable ABI of 2.11 and later
GPU_ARCHITECTURES = (75, 80, 90, 100, 120)  # 80 runs on 86 and 89 too
PTX_ARCHITECTURE = 80  # the least that has every dtype: all other GPUs compile it when they run
COMMON_SOURCES = (
    "csrc/library.cpp",
    "csrc/cpu/adapters.cpp",
    "csrc/cpu/adapters_backward.cpp",
    "csrc/cpu/instruction_set.cpp",
    "csrc/cpu/sublayer_epilogue.cpp",
    "csrc/cpu/tap_gradient.cpp",
    "csrc/cpu/window_attention.cpp",
)
EXTENSION, BUILD_INFO = "e3va._C", "_build_info.json"
CUDA_SOURCES = ("csrc/cuda/window_attention.cu",)


class LeftOut(Exception):
    """A part that cannot be built here, and why."""


def find_torch() -> Path | None:
    """The folder of the torch to build against: that of the environment being installed into, else
    one brought along for the build. Pip hides the former from the build, through PYTHONPATH."""
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    origin = subprocess.run(
        [sys.executable, "-EP", "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not origin and (spec := find_spec("torch")) is not None:
        origin = spec.origin or ""
    return Path(origin).parent if origin else None


def find_compiler() -> list[str]:
    if os.environ.get("E3VA_BUILD") == "none":
        raise LeftOut("E3VA_BUILD is none")
    if os.name != "posix":
        raise LeftOut("the build knows GCC and Clang on Linux and macOS only")
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise LeftOut(f"no C++ compiler: {asked[0] if asked else 'c++, g++ or clang++'} not found")


def find_nvcc(torch_cuda: str | None) -> str:
    """The CUDA compiler, if it goes with a torch made for the CUDA version ``torch_cuda``."""
    if os.environ.get("E3VA_BUILD") == "cpu":
        raise LeftOut("E3VA_BUILD is cpu")
    if torch_cuda is None:
        raise LeftOut("this torch was made without CUDA")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        raise LeftOut("no nvcc on PATH or in CUDA_HOME")
    version = nvcc_version(nvcc)
    if int(version.split(".")[0]) > int(torch_cuda.split(".")[0]):
        # A driver that is good enough for torch may be too old for code of a newer toolkit.
        raise LeftOut(f"nvcc {version} is newer than the CUDA {torch_cuda} of torch")
    return nvcc


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise RuntimeError(f"{nvcc} --version names no release:\n{text}")
    return match[1]


def gpu_architectures(nvcc: str) -> list[str]:
    """``sm_*`` of machine code and ``compute_*`` of PTX, which later GPUs compile when they run."""
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        wanted = []
        for name in asked.replace(";", " ").split():
            match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
            if match is None:
                raise SystemExit(
                    "TORCH_CUDA_ARCH_LIST must hold numbers such as '8.0;9.0+PTX', "
                    f"got {name!r} in {asked!r}"
                )
            wanted += [f"sm_{match[1]}{match[2]}"]
            wanted += [f"compute_{match[1]}{match[2]}"] if match[3] else []
        return wanted
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [a for a in GPU_ARCHITECTURES if f"compute_{a}" in listed.stdout.split()]
    ptx = PTX_ARCHITECTURE if PTX_ARCHITECTURE in known else known[-1]
    return [*(f"sm_{a}" for a in known), f"compute_{ptx}"]


def ninja_file(
    output: Path, torch: Path, compiler: list[str], nvcc: str | None, architectures: list[str]
) -> str:
    include, lib = torch / "include", torch / "lib"
    cxx = shlex.join(compiler)
    flags = (
        f"-O3 -std=c++20 -fPIC -Wall -Wno-psabi -isystem {include} "
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    )
    link, libraries = f"{cxx} -shared", f"-L{lib} -lc10 -ltorch_cpu"
    if sys.platform == "darwin":
        libraries += " -undefined dynamic_lookup"
    codes = []
    for name in architectures:
        number = name.partition("_")[2]
        codes.append(f"-gencode arch=compute_{number},code={name}")
    if nvcc is not None:
        # The CUDA runtime goes in, so that any driver that suits torch does.
        flags += " -DE3VA_CUDA -DUSE_CUDA"
        link = f"{nvcc} -ccbin {shlex.quote(compiler[0])} -shared -cudart static"
        libraries += " -ltorch_cuda"
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {flags} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {nvcc} -ccbin {shlex.quote(compiler[0])} -MMD -MF $out.d -O3 -std=c++17 "
        f"-Xcompiler -fPIC --threads 2 {' '.join(codes)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link} $in -o $out {libraries}",
    ]
    objects = []
    for source in (*COMMON_SOURCES, *(CUDA_SOURCES if nvcc else ())):
        objects.append(f"{source.removeprefix('csrc/')}.o")
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        lines.append(f"build {objects[-1]}: {rule} {escaped(ROOT / source)}")
    lines.append(f"build {escaped(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escaped(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


class BuildNative(build_ext):
    """Builds csrc/ with ninja into one library, ``e3va/_C.abi3.so``, and ``e3va/_build_info.json``
    beside it. The library is no Python module: torch loads it."""

    def build_extensions(self) -> None:
        info: dict[str, Any] = {"built": [], "architectures": [], "left_out": {}}
        output = Path(self.get_ext_fullpath(EXTENSION)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.build_native(output, info)
        except LeftOut as reason:
            info["left_out"] = {"C++": str(reason), "CUDA": str(reason)}
            self.extensions = []
        (output.parent / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")
        for part, why in info["left_out"].items():
            print(f"e3va: built without its {part} part: {why}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        # A library of an earlier build must not be taken for this one's.
        for stale in (ROOT / "e3va").glob("_C.*"):
            stale.unlink()
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib, "e3va", BUILD_INFO), ROOT / "e3va" / BUILD_INFO)

    def build_native(self, output: Path, info: dict[str, Any]) -> None:
        compiler = find_compiler()
        torch = find_torch()
        if torch is None:
            raise LeftOut("no torch to build against: pip install torch, then install e3va again")
        version = runpy.run_path(str(torch / "version.py"))
        nvcc, architectures = None, []
        try:
            nvcc = find_nvcc(version["cuda"])
            architectures = gpu_architectures(nvcc)
        except LeftOut as reason:
            info["left_out"] = {"CUDA": str(reason)}
        folder = ROOT / "build" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(
            ninja_file(output, torch, compiler, nvcc, architectures)
        )
        ninja = shutil.which("ninja")
        if ninja is None:
            raise SystemExit("e3va: building csrc/ needs ninja: pip install ninja")
        if subprocess.run([ninja, "-C", str(folder)]).returncode:
            raise SystemExit(
                "e3va: csrc/ does not compile here, see above; E3VA_BUILD=cpu leaves out the CUDA "
                "part, E3VA_BUILD=none both"
            )
        info["built"] = ["C++", "CUDA"] if nvcc else ["C++"]
        info["architectures"] = [platform.machine(), *architectures]
        info["torch"] = str(version["__version__"])
        info["compilers"] = [shlex.join(compiler)]
        if nvcc:
            info["compilers"].append(f"nvcc {nvcc_version(nvcc)}")


def build_requirements() -> list[str]:
    """Torch, where it would be built against and the environment has none."""
    try:
        find_compiler()
    except LeftOut:
        return []
    return [] if find_torch() else [TORCH]


setup(
    packages=[*find_packages(include=["e3va", "e3va.*"]), "e3va.kernels", "e3va.configs"],
    package_dir={"e3va.kernels": "kernels", "e3va.configs": "detectron2_configs"},
    ext_modules=[Extension(EXTENSION, sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    setup_requires=build_requirements(),
)
