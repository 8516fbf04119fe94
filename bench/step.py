"""What real training steps of a detector cost through Detectron2: live bytes, and time.

    python -m bench.step [--config-file YAML] [--methods stock full frozen e3va] [--float32]
        [--json FILE]

Images of noise, by default one of 800×1344, with eight polygon-mask instances each, or with a
semantic map; random weights, bf16 autocast, on the CPU or on a GPU (``--float32``: without, for
CPUs that have no bf16). The peak counts every tensor storage made by the step and still alive
(e3va.measure); gradients of parameters exist before the step, as from the second step on, and are
not activations. ``total_bytes`` is the peak of a whole step as the trainer takes it, everything
included: there gradients are made and freed along the backward (e3va.optim.stepping).
``METHOD/own`` is a method under Detectron2's own FPN and heads; ``stock`` is Detectron2's own Swin,
frozen, its weights in fp32, under those, the optimizer stepping after the backward.
Times are medians of interleaved forwards and backwards, as a ratio to the first method.
``python -m bench.train_step`` runs all methods on the detectors of the tracks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.environment import environment, result_file
from e3va.budget import ShapesOnly
from e3va.files import write_json
from e3va.measure import (
    bottom_up,
    peak_live_bytes,
    saved_bytes,
    step_seconds,
    step_split,
    trainable_parameters,
)
from e3va.optim import take_step

MIB = 2**20
DEFAULT_CONFIG = "detectron2_configs/coco/mask_rcnn_e3va_swin_b_1x.yaml"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN_HEADS = "/own"
"""Ends the name of a method that is taken under Detectron2's own FPN and heads."""

STOCK = {
    "LeanCascadeROIHeads": "CascadeROIHeads",
    "LeanConvFCHead": "FastRCNNConvFCHead",
    "LeanROIHeads": "StandardROIHeads",
    "LeanRetinaNet": "RetinaNet",
    "SampledRPN": "RPN",
}
"""What Detectron2 has of its own for each of our parts."""


def config_of(config_file: str, method: str, overrides: Sequence[Any]) -> Any:
    from e3va.detectron2.config import load_config

    ours = "frozen" if method == "stock" else method.removesuffix(OWN_HEADS)
    cfg = load_config(config_file, ["MODEL.TUNING.METHOD", ours, *overrides])
    cfg.MODEL.DEVICE = DEVICE
    return with_stock_heads(cfg) if has_own_heads(method) else cfg


def has_own_heads(method: str) -> bool:
    return method == "stock" or method.endswith(OWN_HEADS)


def with_stock_heads(cfg: Any) -> Any:
    """``cfg``, changed to what Detectron2 has of its own for our heads."""
    model = cfg.MODEL
    model.META_ARCHITECTURE = STOCK.get(model.META_ARCHITECTURE, model.META_ARCHITECTURE)
    for part in (model.PROPOSAL_GENERATOR, model.ROI_HEADS, model.ROI_BOX_HEAD):
        part.NAME = STOCK.get(part.NAME, part.NAME)
    return cfg


def build(
    config_file: str, method: str, overrides: Sequence[Any], shapes: ShapesOnly | None = None
) -> Any:
    """The detector, in training; for steps within ``shapes`` where that is given."""
    from detectron2.layers import Conv2d
    from detectron2.modeling import build_model

    from e3va.detectron2 import LeanConv2d

    if shapes is not None:
        with shapes, shapes.unseen():
            model = build(config_file, method, overrides)
            shapes.forget(*model.parameters())
        shapes.never_look_in(bottom_up(model))
        return model
    cfg = config_of(config_file, method, overrides)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    if has_own_heads(method):
        for conv in (m for m in model.backbone.modules() if isinstance(m, LeanConv2d)):
            conv.__class__ = Conv2d
    if method == "stock":
        stock = stock_swin(bottom_up(model)).to(DEVICE)
        if bottom_up(model) is model.backbone:
            model.backbone = stock
        else:
            model.backbone.bottom_up = stock
    return model


def stock_swin(ours: Any) -> Any:
    """Detectron2's Swin of the same architecture, frozen."""
    from detectron2.modeling.backbone.swin import SwinTransformer

    config = ours.net.trunk.config
    theirs = SwinTransformer(
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=config.window_size,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=0.0,
        out_indices=tuple(range(config.num_stages)),
    )
    theirs._size_divisibility = 0  # as ours; theirs misspells it, and has none without an FPN
    return theirs.requires_grad_(False).eval()


def measure(
    model: Any,
    batch: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    stock: bool = False,
    amp: bool = True,
) -> dict[str, Any]:
    """Bytes: saved for backward in the backbone, the peak of live activations in a step, and that
    of a whole step, also split by what it is of, see :func:`e3va.measure.step_split`. On a GPU
    also what its allocator has given and held."""
    from detectron2.structures import ImageList

    backbone = bottom_up(model)
    images = ImageList.from_tensors(
        [item["image"].float().to(DEVICE) for item in batch],
        model.backbone.size_divisibility,
        padding_constraints=model.backbone.padding_constraints,
    ).tensor

    def run_backbone() -> object:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
            return backbone(images)

    saved = saved_bytes(model, run_backbone)
    torch.manual_seed(0)
    activations = peak_live_bytes(model, partial(loss, model, batch, DEVICE, amp))
    optimizer.zero_grad()
    early = not stock
    split = step_split(model, partial(step, model, batch, optimizer, early, amp), optimizer)
    costs = {
        "trainable_params": trainable_parameters(model),
        "backbone_trainable_params": trainable_parameters(backbone),
        "saved_bytes": saved,
        "peak_live_bytes": activations,
        "total_bytes": sum(split.values()),
        "split": split,
    }
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loss(model, batch, DEVICE, amp).backward()
        costs["allocated_bytes"] = torch.cuda.max_memory_allocated()
        costs["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return costs


def step(
    model: Any,
    batch: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    early: bool,
    amp: bool = True,
) -> None:
    """A whole step: forward, backward, and that of the optimizer, along the backward or after."""
    torch.manual_seed(0)
    take_step(partial(loss, model, batch, DEVICE, amp), optimizer, early)


def loss(model: Any, batch: list[dict[str, object]], device: str, amp: bool = True) -> torch.Tensor:
    from detectron2.utils.events import EventStorage

    with EventStorage(), torch.autocast(device, torch.bfloat16, enabled=amp):
        return sum(model(batch).values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default=DEFAULT_CONFIG)
    parser.add_argument("--methods", nargs="+", default=["stock", "full", "frozen", "e3va"])
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1344), metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps (default 3)")
    parser.add_argument("--float32", action="store_true", help="no autocast to bf16")
    parser.add_argument("--json", type=result_file, help="write the results to this file")
    parser.add_argument("overrides", nargs="*", help="KEY VALUE pairs for the config")
    options = parser.parse_args(arguments)

    from e3va.detectron2.budget import sample_batch
    from e3va.detectron2.solver import build_optimizer

    file, overrides, amp = options.config_file, options.overrides, not options.float32
    if not amp:
        overrides = [*overrides, "MODEL.TRUNK.DTYPE", "float32"]
    batch = sample_batch(config_of(file, options.methods[0], overrides), *options.size)
    models = {method: build(file, method, overrides) for method in options.methods}
    results: dict[str, dict[str, Any]] = {}
    for method, model in models.items():
        optimizer = build_optimizer(config_of(file, method, overrides), model)
        results[method] = measure(model, batch, optimizer, method == "stock", amp)
        del optimizer
        print(
            f"{method:8} peak live {results[method]['peak_live_bytes'] / MIB:7.1f} MiB   "
            f"a whole step {results[method]['total_bytes'] / MIB:7.1f} MiB   "
            f"saved in the backbone {results[method]['saved_bytes'] / MIB:7.1f} MiB",
            flush=True,
        )
    losses = {method: partial(loss, model, batch, DEVICE, amp) for method, model in models.items()}
    for method, seconds in step_seconds(losses, options.repeats).items():
        results[method]["seconds_per_step"] = seconds.step
    first = options.methods[0]
    for method, result in results.items():
        ratio = result["seconds_per_step"] / results[first]["seconds_per_step"]
        print(f"{method:8} time {ratio:.2f} × {first}")
    if options.json:
        report = {
            "environment": environment(),
            "config": options.config_file,
            "dtype": "bfloat16" if amp else "float32",
            "overrides": overrides,
            "size": list(options.size),
            "methods": results,
        }
        write_json(options.json, report)


if __name__ == "__main__":
    main()
