"""torchvision as an engine of ``e3va train`` and its like, see :mod:`e3va.runs.commands`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e3va import weights as weight_files
from e3va.budget import warn
from e3va.checkpoint import check_target, write_state
from e3va.data.coco import CocoInstances
from e3va.data.folder import Data
from e3va.data.geometry import encode_mask
from e3va.methods import HIGHWAYS, METHODS
from e3va.runs.folder import CONFIG, Found, check_iterations, check_settings
from e3va.runs.plan import SMALL_TRUNKS, Plan, model_of
from e3va.torchvision.budget import CLASSES, Setup
from e3va.torchvision.config import ModelConfig, TrainConfig, fixed_settings, set_fields
from e3va.torchvision.evaluation import evaluate as score
from e3va.torchvision.model import DETECTORS
from e3va.torchvision.run import CHECKPOINT, Run, build_model, load_run
from e3va.torchvision.train import train as train_model
from e3va.trunks import trunk_config

SMALL_HEADS = {
    "representation_size": 256,
    "rpn_batch_size_per_image": 128,
    "rpn_pre_nms_top_n_train": 500,
    "rpn_post_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 300,
    "rpn_post_nms_top_n_test": 200,
    "box_batch_size_per_image": 64,
}
"""Of two-stage detectors over a trunk so small that wider ones would outweigh it."""


def open_setup(
    config: str | None,
    model: str | None,
    method: str | None,
    overrides: Sequence[str],
    instances: int,
) -> Setup:
    """What ``e3va plan`` is asked about.

    Args:
        config: the config.yaml of a run; or model: a trunk, or a detector and a trunk, as
            ``e3va train`` makes it on a GPU, for :data:`CLASSES` classes.
        method: how the backbone is tuned (default: the config's).
        overrides: as :func:`config_of`. instances: of an image.

    Raises:
        FileNotFoundError, ValueError: no such config, model or setting.
    """
    if config is None:
        assert model is not None
        settings = _model_config(*model_of(model), method or "e3va", weights="")
        own = TrainConfig(iterations=1, batch_size=1, amp="bfloat16", model=settings)
        return Setup(_overridden(own, overrides, new=True), CLASSES, instances)
    run = Run.read(config)
    if run.config.model is None:
        raise ValueError(f"{config} does not tell what the model was built from")
    words = ["method", method] if method else []
    return Setup(_overridden(run.config, [*words, *overrides]), len(run.classes), instances)


def _overridden(config: TrainConfig, overrides: Sequence[str], new: bool = False) -> TrainConfig:
    """``config`` with some settings set otherwise; of a ``new`` one, and where these change it, the
    frozen weights are stored in what autocast computes in, unless they say otherwise."""
    config = set_fields(config, overrides)
    assert config.model is not None
    names = set(overrides[::2])
    if "trunk_dtype" in names or not (new or names & {"amp", "method"}):
        return config
    trains_trunk = METHODS[config.model.method].trains_trunk
    stored = "float32" if trains_trunk or not config.amp else config.amp
    return set_fields(config, ["trunk_dtype", stored])


def _model_config(detector: str, variant: str, method: str, **more: Any) -> ModelConfig:
    """A detector over a trunk as ``e3va train`` makes it; ``more``: further settings.

    Raises:
        ValueError: the detector is of semantic segmentation.
    """
    if detector not in DETECTORS:
        raise ValueError(
            "semantic segmentation is trained by Detectron2 alone: install it, and give "
            "--engine detectron2"
        )
    small = variant in SMALL_TRUNKS
    heads: dict[str, Any] = {}
    if small and detector != "retinanet":
        heads = dict(SMALL_HEADS)
        if detector == "mask_rcnn":
            heads["mask_channels"] = (64, 64)
    return ModelConfig(
        detector=detector,
        method=method,
        # A trunk this narrow needs relatively wider adapters than the paper's.
        options={"kernel_dim": 16, "hidden_ratio": 1.0} if small and method in HIGHWAYS else {},
        variant=variant,
        out_channels=64 if small else 256,
        detector_options=heads,
        **more,
    )


def config_of(data: Data, plan: Plan, folder: Path, overrides: Sequence[str]) -> TrainConfig:
    """The settings of a plan on data that lie in ``folder``.

    Args:
        overrides: of :class:`TrainConfig` and :class:`ModelConfig`: NAME, VALUE, ….

    Raises:
        ValueError: the task is semantic segmentation, or a setting is unknown or out of range.
    """
    model = _model_config(
        *(plan.detector, plan.variant, plan.method),
        weights=plan.weights,
        anchor_sizes=plan.anchor_sizes,
        min_size=(plan.min_size,),
        max_size=plan.max_size,
    )
    config = TrainConfig(
        iterations=plan.iterations,
        batch_size=plan.batch_size,
        lr=plan.lr,
        warmup=plan.warmup,
        horizontal_flip=plan.flip,
        eval_period=plan.eval_period,
        checkpoint_period=plan.checkpoint_period,
        seed=plan.seed,
        amp="bfloat16" if torch.cuda.is_available() else None,
        model=model,
    )
    config = _overridden(config, overrides, new=True)
    if (folder / CONFIG).is_file() and "trunk_dtype" not in overrides[::2]:  # to be resumed
        begun = Run.read(folder).config.model
        config = set_fields(config, ["trunk_dtype", begun.trunk_dtype]) if begun else config
    return config


def check(config: TrainConfig) -> None:
    """That model and optimizer can be made, and that the trunk's weights, which are downloaded if
    need be, fit it.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: they do not, or cannot.
    """
    assert config.model is not None
    Setup(config).build()
    trunk = trunk_config(config.model.variant, **config.model.trunk_options)
    weight_files.check_weights(config.model.weights, trunk)


def read_config(folder: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings of the run that lies in ``folder``, with ``overrides`` as :func:`config_of`.

    Raises:
        ValueError: config.yaml is damaged, or a setting is unknown or out of range.
    """
    return _overridden(Run.read(folder).config, overrides)


def iterations_of(config: TrainConfig) -> int:
    """How long a run is."""
    return config.iterations


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one to go on from."""
    return (folder / CHECKPOINT).is_file()


def write_config(config: TrainConfig, data: Data, folder: Path) -> None:
    """Write config.yaml, with the classes of the data."""
    Run(config, data.classes, _sources(config, folder)).write(folder)


def check_same(config: TrainConfig, folder: Path) -> None:
    """That ``config`` goes on with the run that lies in ``folder``, if there is one.

    Raises:
        ValueError: it is of another run, or a shorter one.
    """
    if not (folder / CONFIG).is_file():
        return
    was = Run.read(folder).config
    check_settings(fixed_settings(config), fixed_settings(was), folder)
    check_iterations(config.iterations, was.iterations, folder)


def train(config: TrainConfig, folder: Path, *, resume: bool) -> dict[str, float]:
    """Train what ``config`` says into ``folder``, and write it there as config.yaml when it begins.

    Returns:
        The last evaluation's metrics.

    Raises:
        ValueError: a setting does not fit the data.
    """
    train_data, val_data = _data(config, folder)
    torch.manual_seed(config.seed)
    assert config.model is not None
    model = build_model(config.model, len(train_data.classes) + 1, config.resolved_device())
    warn(partial(Setup.of_data, config, train_data), config.resolved_device())
    result = train_model(model, train_data, val_data, folder, config, resume=resume)
    return {name: value for name, value in result.items() if "_ap" in name}


def _data(config: TrainConfig, folder: Path) -> tuple[CocoInstances, CocoInstances]:
    """What a run in ``folder`` trains and validates on."""
    own = _sources(config, folder)
    return CocoInstances(**own["train"], keep_empty=config.keep_empty), CocoInstances(**own["val"])


def _sources(config: TrainConfig, folder: Path) -> dict[str, dict[str, Any]]:
    """The same as files, as :class:`CocoInstances` takes them."""
    assert config.model is not None
    place = (folder / "data").absolute()
    more = {"images": str(place), "masks": DETECTORS[config.model.detector].masks}
    return {split: {"annotations": str(place / f"{split}.json"), **more} for split in _SPLITS}


_SPLITS = ("train", "val")


def classes_of(folder: Path) -> list[str]:
    """Names of the classes that the run has trained."""
    return Run.read(folder).classes


def evaluate(folder: Path, other: Path | None) -> dict[str, float]:
    """Score the run's model on its own validation split, or on that of the data which
    :func:`e3va.runs.folder.write_data` has written into ``other``.

    Raises:
        ValueError: the run has nothing to be evaluated on.
    """
    model, run = load_run(folder, _device())
    own, place = run.data["val"], other or folder / "data"
    if (place / "val.json").is_file():  # wherever the folder has been moved
        own = {"annotations": place / "val.json", "images": place}
    if own is None:
        raise ValueError(f"{folder} was trained without validation data: name some")
    masks = bool(run.data["train"]["masks"])
    val_data = CocoInstances(own["annotations"], own["images"], masks=masks)
    return score(model, val_data, _device(), amp_dtype=run.config.amp_dtype)


def predictor(folder: Path) -> Callable[[np.ndarray], Found]:
    """What finds objects on an image [H, W, 3], uint8, RGB."""
    model, run = load_run(folder, _device())
    device = _device()

    @torch.no_grad()
    def find(pixels: np.ndarray) -> Found:
        image = torch.from_numpy(pixels).permute(2, 0, 1).to(device).float().div(255)
        dtype = run.config.amp_dtype
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            found = {name: value.cpu() for name, value in model([image])[0].items()}
        boxes = found["boxes"].tolist()
        instances: list[dict[str, Any]] = [
            {"label": label - 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            for label, score, (x1, y1, x2, y2) in zip(
                found["labels"].tolist(), found["scores"].tolist(), boxes, strict=True
            )
        ]
        if "masks" in found:
            for instance, mask in zip(instances, found["masks"], strict=True):
                instance["segmentation"] = encode_mask(mask[0].numpy() > 0.5)
        return Found(instances)

    return find


def export(folder: Path, target: Path) -> None:
    """Write the whole model, trunk included, as .safetensors or .pth."""
    check_target(target)
    model, _ = load_run(folder)
    write_state(model.state_dict(), target)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
