"""Score the detector that a folder holds: ``python -m e3va.torchvision.score FOLDER``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from e3va.data.coco import CocoInstances
from e3va.torchvision.evaluation import evaluate
from e3va.torchvision.run import Run, load_run


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m e3va.torchvision.score",
        description="Score the detector that python -m e3va.torchvision.train has trained.",
    )
    parser.add_argument("folder", type=Path, help="the training's output")
    parser.add_argument("--json", type=Path, help="COCO annotations; default: the validation data")
    parser.add_argument("--images", type=Path, help="their images")
    parser.add_argument("--device", help="default: that of the training")
    args = parser.parse_args(argv)
    if (args.json is None) != (args.images is None):
        parser.error("--json and --images go together")
    run = Run.read(args.folder)
    val = run.data["val"]
    if args.json is None and val is None:
        parser.error("the training had no validation data: give --json and --images")
    device = args.device or run.config.resolved_device()
    model, _ = load_run(args.folder, device)
    data = CocoInstances(
        args.json or val["annotations"],
        args.images or val["images"],
        masks=run.data["train"]["masks"],
    )
    if data.classes != run.classes:
        parser.error(f"{data.path} has the classes {data.classes}, not {run.classes}")
    print(json.dumps(evaluate(model, data, device, amp_dtype=run.config.amp_dtype), indent=2))


if __name__ == "__main__":
    main()
