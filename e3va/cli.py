"""The command ``e3va``."""

from __future__ import annotations

import argparse
import io
import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError

import e3va
from e3va.files import write_json
from e3va.methods import METHODS
from e3va.ops import dispatch, trial, verdicts
from e3va.ops.backends import native
from e3va.ops.backends.registry import PREFERENCE
from e3va.runs.interrupt import interrupted_by_sigterm
from e3va.weights import resolve
from e3va.words import did_you_mean

ENGINES = ("detectron2", "torchvision")
TASKS = ("boxes", "masks", "semantic")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status.

    Args:
        arguments: as after ``e3va`` on the command line (default: those of this process).
    """
    parser = _Parser(prog="e3va", description=e3va.__doc__)
    parser.add_argument("--version", action="version", version=f"e3va {e3va.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
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
    convert.add_argument("source", help="a file of Microsoft's, timm, …, or timm:NAME")
    convert.add_argument("target", type=Path, help="the .safetensors file to write")
    convert.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    convert.set_defaults(run=_convert)
    _add_runs(commands)
    options, more = parser.parse_known_args(arguments)
    wrong = [word for word in more if word.startswith("--")]
    if wrong or (more and options.run not in (_train, _plan)):
        commands.choices[options.command].refuse([*wrong, *more][0])
    options.overrides = more
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be text
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # libraries warn those who write programs
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", module=r"e3va\b")
            for library in ("torch.fx", "torch.utils._pytree", "bitsandbytes"):
                logging.getLogger(library).setLevel(logging.ERROR)
            with interrupted_by_sigterm():
                if options.command != "info":  # which tells that E3VA_BACKEND names none
                    dispatch.requested_backends()
                status = options.run(options) or 0
                sys.stdout.flush()
                return status
    except KeyboardInterrupt as stop:
        print(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `e3va info | head`
        if os.environ.get("E3VA_TRACEBACK"):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (
        FloatingPointError,
        ImportError,
        KeyError,
        OSError,
        SafetensorError,
        TypeError,
        ValueError,
        torch.OutOfMemoryError,
        dispatch.BackendUnavailable,
    ) as error:
        if os.environ.get("E3VA_TRACEBACK"):
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Says in one line what it does not understand."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def refuse(self, word: str) -> NoReturn:
        """End with exit code 2, for there is no such option."""
        options = re.findall(r"--[a-z-]+", self.format_usage())
        self.error(f"unrecognized argument {word}{did_you_mean(word.partition('=')[0], options)}")


def _message(error: Exception) -> str:
    """In one line."""
    return " ".join(
        str(error.args[0] if isinstance(error, KeyError) and error.args else error).split()
    )


def _add_runs(commands: Any) -> None:
    """The commands on data and runs."""
    data = commands.add_parser("data", help="what a folder of data holds, with pictures")
    _add_data(data)
    data.add_argument("--json", type=Path, metavar="FILE", help="write the report to this file")
    data.add_argument(
        "--output", type=Path, metavar="PNG", help="the pictures (default: output/data/DATA.png)"
    )
    data.set_defaults(run=_data)
    train = commands.add_parser(
        "train",
        help="train on a folder of data, or by the config.yaml of a RUN",
        epilog="KEY VALUE pairs at the end override the engine's own settings.",
    )
    _add_data(train)
    train.add_argument("--model", help="a trunk, or a detector and a trunk: retinanet_swin_b")
    train.add_argument("--weights", help="the trunk's: a file, a URL or timm:NAME")
    train.add_argument("--method", choices=METHODS, default="e3va", help="(default e3va)")
    train.add_argument("--engine", choices=ENGINES, help="(default detectron2, where it is)")
    train.add_argument("--iterations", type=_positive, help="(default: by the number of images)")
    train.add_argument("--output", type=Path, default=Path("output/run"), metavar="RUN")
    train.add_argument("--resume", action="store_true", help="go on where RUN has stopped")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="write RUN with its config.yaml, to be looked at and edited, and train nothing",
    )
    train.set_defaults(run=_train, default=train.get_default)
    evaluate = commands.add_parser("eval", help="score a trained model")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="the training's output")
    _add_data(evaluate, optional=True)
    evaluate.set_defaults(run=_evaluate)
    predict = commands.add_parser("predict", help="pictures and JSON of what a model finds")
    predict.add_argument("folder", type=Path, metavar="RUN", help="the training's output")
    predict.add_argument(
        "images", nargs="+", help="files, folders, globs, or - for names on standard input"
    )
    predict.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to write to (default: RUN/predictions)"
    )
    predict.add_argument("--min-score", type=float, default=0.5, help="(default 0.5)")
    predict.set_defaults(run=_predict)
    plan = commands.add_parser(
        "plan",
        help="does it fit on my card? told in a minute, without a GPU, weights or data",
        epilog="KEY VALUE pairs at the end override the config's settings.",
    )
    what = plan.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="YAML", help="of Detectron2, or a run")
    what.add_argument("--model", help="a trunk, or a detector and a trunk: retinanet_swin_b")
    plan.add_argument(
        "--engine", choices=ENGINES, help="of --model (default detectron2, where it is)"
    )
    plan.add_argument("--method", choices=METHODS, help="(default: the config's)")
    plan.add_argument(
        "--size",
        nargs=2,
        type=_positive,
        metavar=("H", "W"),
        help="(default: the config's largest)",
    )
    plan.add_argument(
        "--batch",
        type=_positive,
        metavar="N",
        help="images at once (default 1; of torchvision's runs: their batch_size)",
    )
    plan.add_argument("--instances", type=_positive, default=8, help="of an image (default 8)")
    plan.add_argument("--card", help='"RTX 3060", or its memory: 8GB (default: that found here)')
    plan.add_argument("--compare", type=Path, metavar="PNG", help="draw all methods as bars")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan to this file")
    plan.set_defaults(run=_plan)
    export = commands.add_parser("export", help="a model and its frozen trunk as one file")
    export.add_argument("folder", type=Path, metavar="RUN", help="the training's output")
    export.add_argument("target", type=Path, help="a .safetensors or .pth file to write")
    export.set_defaults(run=_export)


def _add_data(parser: Any, optional: bool = False) -> None:
    parser.add_argument(
        "data", nargs="?" if optional else None, metavar="DATA", help="a folder or a file"
    )
    parser.add_argument("--val", metavar="DATA", help="validate on this (default: its own split)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="of COCO files (default: found)")
    parser.add_argument("--task", choices=TASKS, help="(default: what the data are for)")
    parser.add_argument(
        "--classes",
        metavar="NAMES|FILE",
        help="those to keep, NAME,NAME,…, or a YAML file of lines 'old: new'",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")


def _open(options: argparse.Namespace, *, hold_out: bool = True) -> Any:
    from e3va.data.folder import open_data, read_classes

    classes = read_classes(options.classes) if options.classes else None
    given = {"val": options.val, "images": options.images, "task": options.task}
    return open_data(options.data, **given, classes=classes, seed=options.seed, hold_out=hold_out)


def _name_of(data: str) -> str:
    """What folders of results call data: files of many are named data.yaml."""
    path = Path(os.path.abspath(Path(data).expanduser()))
    return f"{path.parent.name}-{path.stem}" if path.is_file() else path.name


def _data(options: argparse.Namespace) -> None:
    from e3va.runs import commands

    output = options.output or Path("output/data", _name_of(options.data))
    if output.suffix.lower() != ".png":
        output = output.with_name(f"{output.name}.png")
    commands.show(_open(options), output, options.json)


def _train(options: argparse.Namespace) -> None:
    from e3va.runs import commands
    from e3va.runs.folder import CONFIG, PREDICTIONS, engine_of, is_run
    from e3va.runs.plan import make_plan, model_of

    folder = Path(options.data)
    if is_run(folder):
        told = [n for n in _OF_DATA if getattr(options, n) != options.default(n)]
        if told:
            raise ValueError(
                f"{folder} is a run, whose config.yaml tells what is trained: change it there, or "
                f"by KEY VALUE, and not by --{told[0].replace('_', '-')}"
            )
        config = commands.read(folder, options.overrides)
        print(f"trained by {engine_of(folder)}, as {folder / CONFIG} says")
        _print_given(options.overrides)
    else:
        if options.model:
            model_of(options.model, options.task)  # before the data, which take longer
        data = _open(options)
        print(commands.describe(data))
        plan = make_plan(
            data,
            model=options.model,
            weights=options.weights,
            method=options.method,
            iterations=options.iterations,
            seed=options.seed,
        )
        name, folder = options.engine or commands.default_engine(), options.output
        config = commands.prepare(
            data, plan, name, folder, resume=options.resume, overrides=options.overrides
        )
        print(f"trained by {name}, into {folder}:\n{plan.describe()}")
        _print_given(options.overrides)
        if options.dry_run:
            begin = commands.command("train", folder)
            print(f"settings: {folder / CONFIG}; train by: {begin}")
            return
    _print_metrics(commands.train(folder, config, resume=options.resume))
    again = commands.command("predict", folder)
    print(f"predictions on some images: {folder / PREDICTIONS}; on others: {again} IMAGES")


_OF_DATA = (
    *("val", "images", "task", "classes", "seed", "model", "weights", "method", "engine"),
    *("iterations", "output", "dry_run"),
)
"""Options of ``e3va train`` on data, which a run has settled."""


def _evaluate(options: argparse.Namespace) -> None:
    from e3va.runs import commands

    data, name = None, ""
    if options.data:
        name = _name_of(options.val or options.data)
        data = _open(options, hold_out=False)
        print(commands.describe(data))
    elif options.val or options.images or options.task or options.classes:
        raise ValueError("--val, --images, --task and --classes are of DATA, and there is none")
    _print_metrics(commands.evaluate(options.folder, data, name))


def _print_given(overrides: Sequence[str]) -> None:
    if overrides:
        print("but for these settings, which were given:")
    for name, value in zip(overrides[::2], overrides[1::2], strict=True):
        print(f"  {name}  {value}")


def _print_metrics(metrics: dict[str, float]) -> None:
    print("  ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


def _predict(options: argparse.Namespace) -> None:
    from e3va.runs import commands

    print(commands.predict(options.folder, options.images, options.output, options.min_score))


def _export(options: argparse.Namespace) -> None:
    from e3va.runs import commands

    commands.engine(commands.engine_of(options.folder)).export(options.folder, options.target)
    print(f"{options.target}: {options.target.stat().st_size / 2**20:.1f} MiB")


def _plan(options: argparse.Namespace) -> None:
    from e3va.budget import budget, card
    from e3va.budget.cards import own_card
    from e3va.budget.report import compare
    from e3va.figures import check_picture
    from e3va.runs import commands

    for path in (options.json, options.compare):
        if path and path.is_dir():
            raise ValueError(f"{path} is a folder: name a file")
    if options.compare:
        check_picture(options.compare)
    own = card(options.card) if options.card else own_card()
    name = options.engine or commands.default_engine()
    if options.config:
        options.config, name = commands.config_of_plan(Path(options.config), options.engine)
    given = options.config, options.model, options.method, options.overrides
    setup = commands.engine(name).open_setup(*given, options.instances)
    images = options.batch or setup.images
    size = tuple(options.size or setup.training_size())
    try:
        found = budget(setup, images, size, own)
    except RuntimeError as error:
        raise ValueError(f"such a step cannot be taken, or not traced here: {error}") from error
    print(found.describe())
    if options.json:
        write_json(options.json, found.content())
    if options.compare:
        for missing in compare(setup, images, size, own, options.compare):
            print(f"left out: {missing}")
        print(f"all methods: {options.compare}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text}")
    return int(text)


def _selftest(options: argparse.Namespace) -> int:
    print(describe(), end="\n\n")
    device, wrong, tried = torch.device(options.device), 0, 0
    for op, backend, dtype, variant, verdict in trial.selftest(device):
        word = "ok" if verdict.right else "WRONG"
        line = f"{word:6}{op:20}{backend:8}{dtype:9}{verdict.describe()}"
        print(f"{line} ({trial.fields(variant)})", flush=True)
        wrong, tried = wrong + (not verdict.right), tried + 1
    print(f"{tried - wrong} of {tried} kernels are right on {device.type}")
    broken = native.build_info().built and native.load_error()
    return 1 if wrong or broken else 0


def _convert(options: argparse.Namespace) -> None:
    trunk = e3va.open_trunk(resolve(options.source))
    e3va.save_trunk(trunk, options.target, getattr(torch, options.dtype or "", None))
    print(f"{options.target}: {trunk.config}")


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
            lines += [f"  {op:<24}{_choice(op, device, dtype)}" for op in PREFERENCE]
        tried = verdicts.known(torch.device(device)) if device in dispatch.TRIED_ON else {}
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
