"""Where a result was measured: every result file carries this."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from e3va.ops.verdicts import driver


def environment() -> dict[str, object]:
    """Device, its driver (None: a CPU), versions (None: not installed), commit ("unknown" where the
    package lies in no clone, or there is no git), and whether the tree differed from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        if not (root / ".git").exists():  # installed; git would tell of a project around it
            return ""
        command = ["git", *arguments]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # git is not installed
            return ""
        return done.stdout.strip()

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "driver": driver() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "detectron2": _version("detectron2"),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
