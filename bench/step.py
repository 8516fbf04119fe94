"""One real training step of Mask R-CNN through Detectron2: live activation bytes, time.

    python -m bench.step [--config-file YAML] [--methods stock full frozen e3va] [--json FILE]

One 800×1344 image with eight polygon-mask instances, random weights, bf16 autocast, on the CPU or
on a GPU. The peak counts every tensor storage made by the step and still alive (e3va.measure);
gradients of parameters exist before the step, as from the second step on, and are not activations.
``stock`` is Detectron2's own Swin, frozen, its weights in fp32. Times are medians of interleaved
steps, as a ratio to the first method.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from e3va.files import write_json
from e3va.measure import peak_live_bytes, saved_bytes, step_seconds, trainable_parameters

MIB = 2**20
DEFAULT_CONFIG = "detectron2_configs/coco/mask_rcnn_e3va_swin_b_1x.yaml"


def build(config_file: str, method: str, overrides: list[str]) -> Any:
    from detectron2.modeling import build_model

    from e3va.detectron2.config import load_config

    ours = "frozen" if method == "stock" else method
    cfg = load_config(config_file, ["MODEL.TUNING.METHOD", ours, *overrides])
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = build_model(cfg).train()
    if method == "stock":
        model.backbone.bottom_up = stock_swin(model.backbone.bottom_up).to(cfg.MODEL.DEVICE)
    return model


def stock_swin(ours: Any) -> Any:
    """Detectron2's Swin of the same architecture, frozen."""
    from detectron2.modeling.backbone.swin import SwinTransformer

    config = ours.swin.trunk.config
    theirs = SwinTransformer(
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=config.window_size,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=0.0,
        out_indices=tuple(range(config.num_stages)),
    )
    return theirs.requires_grad_(False).eval()


def measure(model: Any, batch: list[dict[str, object]], device: str) -> dict[str, int]:
    """Bytes: peak of live activations in a step, saved for backward in the backbone, and the peak
    with weights, gradients and AdamW state."""
    images = model.preprocess_image(batch).tensor

    def backbone() -> object:
        with torch.autocast(device, torch.bfloat16):
            return model.backbone.bottom_up(images)

    saved = saved_bytes(model, backbone)
    torch.manual_seed(0)
    peak = peak_live_bytes(model, lambda: loss(model, batch, device))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {
        "backbone_trainable_params": trainable_parameters(model.backbone.bottom_up),
        "saved_bytes": saved,
        "peak_live_bytes": peak,
        "total_bytes": peak + sum(p.nbytes for p in model.parameters()) + 3 * trained,
    }


def loss(model: Any, batch: list[dict[str, object]], device: str) -> torch.Tensor:
    from detectron2.utils.events import EventStorage

    with EventStorage(), torch.autocast(device, torch.bfloat16):
        return sum(model(batch).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default=DEFAULT_CONFIG)
    parser.add_argument("--methods", nargs="+", default=["stock", "full", "frozen", "e3va"])
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1344), metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps (default 3)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("overrides", nargs="*", help="KEY VALUE pairs for the config")
    arguments = parser.parse_args()

    from e3va.detectron2.budget import sample_batch
    from e3va.detectron2.config import load_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = sample_batch(load_config(arguments.config_file, arguments.overrides), *arguments.size)
    models = {m: build(arguments.config_file, m, arguments.overrides) for m in arguments.methods}
    results: dict[str, dict[str, Any]] = {}
    for method, model in models.items():
        results[method] = measure(model, batch, device)
        print(
            f"{method:8} peak live {results[method]['peak_live_bytes'] / MIB:7.1f} MiB   "
            f"with weights, gradients, AdamW {results[method]['total_bytes'] / MIB:7.1f} MiB   "
            f"saved in the backbone {results[method]['saved_bytes'] / MIB:7.1f} MiB",
            flush=True,
        )
    losses = {method: partial(loss, model, batch, device) for method, model in models.items()}
    for method, seconds in step_seconds(losses, arguments.repeats).items():
        results[method]["seconds_per_step"] = seconds
    first = arguments.methods[0]
    for method, result in results.items():
        ratio = result["seconds_per_step"] / results[first]["seconds_per_step"]
        print(f"{method:8} time {ratio:.2f} × {first}")
    if arguments.json:
        report = {
            "environment": environment(),
            "config": arguments.config_file,
            "overrides": arguments.overrides,
            "size": list(arguments.size),
            "methods": results,
        }
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
