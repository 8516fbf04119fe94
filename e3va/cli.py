"""The command ``e3va``."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import e3va
from e3va import native
from e3va.ops import dispatch, trial


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
    selftest = commands.add_parser(
        "selftest", help="try every kernel here: is it right, and faster than PyTorch?"
    )
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    selftest.add_argument("--device", choices=devices, default=devices[0])
    selftest.set_defaults(run=_selftest)
    convert = commands.add_parser(
        "convert", help="a trunk's weights, of any format that is known, as one of ours"
    )
    convert.add_argument("source", type=Path, help="a file of Microsoft's, timm, …, or timm:NAME")
    convert.add_argument("target", type=Path, help="the .safetensors file to write")
    convert.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    convert.set_defaults(run=_convert)
    predict = commands.add_parser("predict", help="pictures and JSON of what a model finds")
    predict.add_argument("images", type=Path, nargs="+")
    predict.add_argument("--output", type=Path, default=Path("output/predictions"))
    predict.add_argument("--min-score", type=float, default=0.5, help="(default 0.5)")
    predict.set_defaults(run=_predict)
    export = commands.add_parser("export", help="a model and its frozen trunk as one file")
    export.add_argument("target", type=Path, help="a .safetensors or .pth file to write")
    export.set_defaults(run=_export)
    for command in (predict, export):
        command.add_argument("--config", required=True, help="config.yaml of its training's output")
        command.add_argument("--weights", required=True, help="the trained model's file")
        command.add_argument(
            "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE")
        )
    options = parser.parse_args(arguments)
    return options.run(options) or 0


def _selftest(options: argparse.Namespace) -> int:
    print(describe(), end="\n\n")
    device, wrong, tried = torch.device(options.device), 0, 0
    for op, backend, dtype, variant, verdict in trial.selftest(device):
        word = "ok" if verdict.right else "WRONG"
        line = f"{word:6}{op:19}{backend:8}{dtype:9}{verdict.describe()}"
        print(f"{line} ({trial.fields(variant)})", flush=True)
        wrong, tried = wrong + (not verdict.right), tried + 1
    print(f"{tried - wrong} of {tried} kernels are right on {device.type}")
    return 1 if wrong else 0


def _convert(options: argparse.Namespace) -> None:
    trunk = e3va.open_trunk(options.source)
    e3va.save_trunk(trunk, options.target, getattr(torch, options.dtype or "", None))
    print(f"{options.target}: {trunk.config}")


def _predict(options: argparse.Namespace) -> None:
    from e3va.detectron2.inference import PREDICTIONS, predict

    entries = predict(_config(options), options.images, options.output, options.min_score)
    print(f"{len(entries)} pictures and {PREDICTIONS} are in {options.output}")


def _export(options: argparse.Namespace) -> None:
    from e3va.detectron2.inference import export

    export(_config(options), options.target)
    print(f"{options.target}: {options.target.stat().st_size / 2**20:.1f} MiB")


def _config(options: argparse.Namespace) -> Any:
    """The Detectron2 config that the options speak of. Its data need not be there."""
    from e3va.detectron2 import load_config

    overrides = [word for pair in options.set for word in pair]
    cfg = load_config(options.config, [*overrides, "MODEL.WEIGHTS", options.weights])
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


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
        tried = trial.verdicts(torch.device(device)) if device in dispatch.TRIED_ON else {}
        lines += [f"  {name}: {verdict.describe()}" for name, verdict in sorted(tried.items())]
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
