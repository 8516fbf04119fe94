"""What storing and computing the frozen trunk in fewer bits does to its features and to AP.

    python -m bench.precision --images FOLDER [--train 400] [--json FILE]

For bf16 and each of e3va.precision.PRECISIONS: the relative error of each stage's output against
fp32, on the images of a folder through the trunk that ships with the package; with --train, also
the AP of the demo's E³VA through Detectron2, trained and evaluated on that trunk.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import e3va
from bench.environment import environment, result_file
from e3va.demo.digits import write_digits
from e3va.demo.engines import WEIGHTS, train_detectron2
from e3va.files import write_json
from e3va.precision import PRECISIONS

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def load_image(path: Path, device: str) -> Tensor:
    """[1, 3, H, W], normalised as ImageNet is."""
    with Image.open(path) as file:
        pixels = torch.from_numpy(np.array(file.convert("RGB"))).float()
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None].to(device)


def trunks(device: str) -> dict[str, e3va.trunks.FrozenSwin]:
    """The shipped trunk in fp32 and in each form that is compared with it."""
    exact = e3va.trunks.FrozenSwin(e3va.trunk_config("swin_digits"))
    e3va.load_trunk(exact, WEIGHTS)
    forms = {"fp32": exact.to(device), "bf16": copy.deepcopy(exact).to(torch.bfloat16)}
    for precision in PRECISIONS:
        forms[precision] = copy.deepcopy(exact)
        e3va.quantize_trunk(forms[precision], precision)
    return forms


def feature_errors(images: list[Path], device: str) -> dict[str, list[float]]:
    """‖difference‖ / ‖fp32‖ of each stage's output, over all images."""
    forms = trunks(device)
    squares = {name: torch.zeros(2, 4, dtype=torch.float64) for name in forms}
    for path in tqdm(images, unit="image"):
        image = load_image(path, device)
        exact = [y.double() for y in forms["fp32"](image)]
        for name, trunk in forms.items():
            for s, (y, e) in enumerate(zip(trunk(image), exact, strict=True)):
                squares[name][:, s] += torch.stack([(y - e).square().sum(), e.square().sum()]).cpu()
    return {
        name: (difference / whole).sqrt().tolist()
        for name, (difference, whole) in squares.items()
        if name != "fp32"
    }


def demo_ap(precision: str, iterations: int, output: Path) -> dict[str, float]:
    """Metrics of the demo's E³VA, trained over a trunk of ``precision``; "fp32": as it is."""
    data = write_digits(output / "digits", seed=0)
    form = {"fp32": [], "bf16": ["MODEL.TRUNK.DTYPE", "bfloat16", "SOLVER.AMP.ENABLED", True]}
    overrides = form.get(precision, ["MODEL.TRUNK.PRECISION", precision])
    folder = output / precision
    return train_detectron2("e3va", data / "coco", folder, iterations, 0, overrides).metrics


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of .jpg or .png files")
    parser.add_argument("--limit", type=int, default=50, help="images to use (default 50)")
    parser.add_argument("--train", type=int, default=0, help="iterations of the demo (default 0)")
    parser.add_argument("--output", type=Path, default=Path("output/precision"))
    parser.add_argument("--json", type=result_file, help="write the results to this file")
    options = parser.parse_args(arguments)
    images = sorted(p for p in options.images.rglob("*") if p.suffix in (".jpg", ".png"))
    if not images:
        parser.error(f"no .jpg or .png file in {options.images}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = feature_errors(images[: options.limit], device)
    report: dict[str, Any] = {"environment": environment(), "feature_error": errors}
    if options.train:
        names = ("fp32", *errors)
        report["demo"] = {n: demo_ap(n, options.train, options.output) for n in names}
    print(f"{'':6}{'relative error of stage 1 to 4':>36}   mask AP")
    for name in ("fp32", *errors):
        cells = "".join(f"{100 * e:8.2f}%" for e in errors.get(name, [0.0] * 4))
        ap = f"{report['demo'][name]['mask_ap']:10.1f}" if options.train else ""
        print(f"{name:6}{cells}{ap}")
    if options.json:
        write_json(options.json, report)
    return report


if __name__ == "__main__":
    main()
