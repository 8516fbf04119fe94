"""The command ``e3va``."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence

import torch

import e3va
from e3va import native
from e3va.ops import dispatch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status.

    Args:
        arguments: as after ``e3va`` on the command line (default: those of this process).
    """
    parser = argparse.ArgumentParser(prog="e3va", description=e3va.__doc__)
    parser.add_argument("--version", action="version", version=f"e3va {e3va.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser(
        "info", help="what was built, and which backend each op uses here and why"
    )
    info.set_defaults(run=lambda options: print(describe()))
    options = parser.parse_args(arguments)
    options.run(options)
    return 0


def describe() -> str:
    """What ``e3va info`` prints."""
    build = native.build_info()
    lines = [
        f"e3va {e3va.__version__}, Python {platform.python_version()}, {_torch()}",
        f"built:    {', '.join(build.built) or 'nothing: pure Python and Triton'}"
        + (f" ({', '.join(build.compilers)}; torch {build.torch})" if build.built else ""),
    ]
    if build.architectures:
        lines.append(f"for:      {', '.join(build.architectures)}")
    lines += [f"left out: {part}: {reason}" for part, reason in build.left_out.items()]
    if build.built and (error := native.load_error()):
        lines.append(f"BROKEN:   {error}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            lines += ["", f"{device}, {str(dtype).removeprefix('torch.')}"]
            lines += [f"  {op:<24}{_choice(op, device, dtype)}" for op in dispatch.operators()]
    return "\n".join(lines)


def _choice(op: str, device: str, dtype: torch.dtype) -> str:
    try:
        choice = dispatch.explain(op, torch.device(device), dtype)
    except (RuntimeError, ValueError) as error:
        return f"error: {error}"
    return f"{choice.backend} ({choice.reason})"


def _torch() -> str:
    if torch.cuda.is_available():
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__}, no GPU"
