"""PTX of the project's kernels, from Triton's compiler and from nvcc. Needs no GPU.

Triton reads ``TRITON_INTERPRET`` when it is first imported, and kernels defined under it cannot be
compiled; so this module, run as a program, is a process of its own that does: requests and answers
are lines of JSON. A request names a kernel and its arguments; which specialisation they get, the
divisibility of pointers and integers by 16 and integers that are 1, is the choice of Triton's own
JIT, which is stopped before the launch.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.ptx.machine import Program
from tests.ptx.parser import parse

ROOT = Path(__file__).resolve().parents[2]


KEPT = 64
"""Kernels: each takes some megabytes."""


class Compiled(NamedTuple):
    program: Program
    threads: int
    parameters: list[str]
    """The arguments that are handed over when it is launched."""
    ptx: str
    shared: int
    """Bytes of shared memory whose size the launch says."""


def load(ptx: str, shared: int, threads: int, parameters: list[str]) -> Compiled:
    """A module with one kernel."""
    (entry,) = parse(ptx).values()
    return Compiled(Program(entry, shared), threads, parameters, ptx, shared)


class TritonCompiler:
    """Answers requests; those that were made lately at once."""

    def __init__(self) -> None:
        self._known: dict[str, Compiled] = {}
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment | {"PYTHONPATH": os.pathsep.join(path)},
            cwd=ROOT,
            text=True,
        )

    def close(self) -> None:
        self._process.communicate()

    def compile(self, module: str, kernel: str, architecture: int, **arguments: Any) -> Compiled:
        """``arguments``: by name, constants and options among them. A tensor is a pair of its
        dtype and its address."""
        request = json.dumps([module, kernel, architecture, arguments])
        if request not in self._known:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the compiler gave up on {request}")
            if len(self._known) == KEPT:
                del self._known[next(iter(self._known))]
            self._known[request] = load(*json.loads(answer))
        return self._known[request]


@functools.cache
def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


@functools.cache
def compiles(architecture: int) -> bool:
    """Whether there is an nvcc, and one that knows the architecture."""
    if nvcc() is None:
        return False
    known = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return f"compute_{architecture}" in known.stdout.split()


@functools.cache
def cuda(source: str, architecture: int, form: str = "ptx") -> bytes:
    """A file of ``csrc/cuda`` as "ptx" or as "cubin"."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels"
        command = [nvcc(), f"-{form}", f"-arch=sm_{architecture}", "-std=c++17", "-O3", source]
        subprocess.run([*command, "-o", out], cwd=ROOT / "csrc/cuda", check=True)
        return out.read_bytes()


# The process of its own


class Target:
    """What Triton's JIT asks of a driver before a launch."""

    def __init__(self) -> None:
        self.architecture = 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        """Of what the JIT keeps, each architecture has its own."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


class Pointer:
    """A tensor, as far as the JIT looks at it."""

    def __init__(self, dtype: str, address: int):
        import torch

        self.dtype, self._address = getattr(torch, dtype), address

    def data_ptr(self) -> int:
        return self._address


def _serve() -> None:
    from triton.runtime.driver import driver

    target = Target()
    driver.set_active(target)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # a compiler's prints are no answers
    for request in sys.stdin:
        module, name, target.architecture, arguments = json.loads(request)
        kernel = getattr(importlib.import_module(module), name)
        values = {k: Pointer(*v) if isinstance(v, list) else v for k, v in arguments.items()}
        compiled = kernel.warmup(grid=(1,), **values)
        parameters = [k for k, v in compiled.src.signature.items() if v != "constexpr"]
        answer = (
            compiled.asm["ptx"],
            compiled.metadata.shared,
            32 * compiled.metadata.num_warps,
            parameters,
        )
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
