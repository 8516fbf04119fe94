"""Detectron2 as an engine of ``e3va train`` and its like, see :mod:`e3va.runs.commands`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from e3va import weights as weight_files
from e3va.budget import warn
from e3va.data.folder import Data
from e3va.detectron2.backbone import local_weights, trunk_of
from e3va.detectron2.budget import Setup, largest
from e3va.detectron2.config import CONFIGS, load_config, method_of, translated
from e3va.detectron2.data import FORMATS, register_datasets
from e3va.detectron2.data.catalog import set_classes
from e3va.detectron2.inference import class_names, load_model
from e3va.detectron2.inference import export as export_model
from e3va.detectron2.inference import predictor as predictor_of
from e3va.detectron2.run import RunTrainer, scores
from e3va.detectron2.train import Trainer
from e3va.files import atomic_path
from e3va.runs.folder import CONFIG, LOG, MAPS, Found, check_iterations, check_settings
from e3va.runs.plan import SMALL_TRUNKS, Plan, model_of

BASES = {
    "mask_rcnn": "MaskRCNN-E3VA-Swin-FPN",
    "faster_rcnn": "MaskRCNN-E3VA-Swin-FPN",
    "retinanet": "RetinaNet-E3VA-Swin-FPN",
    "upernet": "UPerNet-E3VA-Swin",
}
SMALL_BASES = {
    "mask_rcnn": "Small",
    "faster_rcnn": "Small",
    "retinanet": "Small-RetinaNet",
    "upernet": "Small-UPerNet",
}
"""The configs that the detectors begin with, over trunks and over small ones."""


def open_setup(
    config: str | None,
    model: str | None,
    method: str | None,
    overrides: Sequence[str],
    instances: int,
) -> Setup:
    """What ``e3va plan`` is asked about.

    Args:
        config: a YAML file; or model: a trunk, or a detector and a trunk, as ``e3va train`` makes
            it on a GPU.
        method: how the backbone is tuned (default: the config's).
        overrides: of the config: KEY, VALUE, …. instances: of an image.

    Raises:
        FileNotFoundError, KeyError, ValueError: no such config, key, model or value.
    """
    words: list[Any] = ["MODEL.TUNING.METHOD", method] if method else []
    if config is None:
        assert model is not None
        detector, variant = model_of(model)
        bases = SMALL_BASES if variant in SMALL_TRUNKS else BASES
        config = str(CONFIGS / f"Base-{bases[detector]}.yaml")
        words += ["MODEL.TRUNK.VARIANT", variant, "SOLVER.AMP.ENABLED", True]
        words += ["MODEL.MASK_ON", detector == "mask_rcnn"]
        return Setup(_new_config(Path(config), [*words, *overrides]), instances)
    return Setup(load_config(config, [*words, *overrides]), instances)


def _new_config(base: Path, settings: Sequence[Any]) -> CfgNode:
    """``base`` with the settings; a frozen trunk is stored in what autocast computes in, unless
    they say otherwise."""
    cfg = load_config(str(base), settings)
    told = "MODEL.TRUNK.DTYPE" in translated(list(settings[::2]))
    if cfg.SOLVER.AMP.ENABLED and not told and not method_of(cfg).trains_trunk:
        cfg.MODEL.TRUNK.DTYPE = cfg.SOLVER.AMP.DTYPE
    return cfg


def config_of(data: Data, plan: Plan, folder: Path, overrides: Sequence[str]) -> CfgNode:
    """The config of a plan on data that lie in ``folder``."""
    bases = SMALL_BASES if plan.is_small else BASES
    settings: dict[str, Any] = {
        "MODEL.TUNING.METHOD": plan.method,
        "MODEL.TRUNK.VARIANT": plan.variant,
        "MODEL.TRUNK.WEIGHTS": plan.weights,
        "MODEL.DEVICE": "cuda" if torch.cuda.is_available() else "cpu",
        "SOLVER.IMS_PER_BATCH": plan.batch_size,
        "SOLVER.BASE_LR": plan.lr,
        "SOLVER.MAX_ITER": plan.iterations,
        "SOLVER.STEPS": (),
        "SOLVER.WARMUP_ITERS": plan.warmup,
        "SOLVER.CHECKPOINT_PERIOD": plan.checkpoint_period,
        "SOLVER.AMP.ENABLED": torch.cuda.is_available(),
        "TEST.EVAL_PERIOD": plan.eval_period,
        "INPUT.MIN_SIZE_TRAIN": (plan.min_size,),
        "INPUT.MAX_SIZE_TRAIN": plan.max_size,
        "INPUT.MIN_SIZE_TEST": plan.min_size,
        "INPUT.MAX_SIZE_TEST": plan.max_size,
        "INPUT.RANDOM_FLIP": "horizontal" if plan.flip else "none",
        "SEED": plan.seed,
        "OUTPUT_DIR": str(folder.absolute()),
        **_data_keys(data.task, folder / "data"),
    }
    if plan.task == "semantic":
        settings["MODEL.SEM_SEG_HEAD.NORM"] = "BN" if plan.batch_size > 1 else "GN"
    else:
        settings["SOLVER.LR_SCHEDULER_NAME"] = "WarmupCosineLR"
        sizes: Any = [[size] for size in plan.anchor_sizes]
        if plan.detector == "retinanet":
            sizes = [[size * 2 ** (i / 3) for i in range(3)] for size in plan.anchor_sizes]
        settings["MODEL.ANCHOR_GENERATOR.SIZES"] = sizes
        settings["MODEL.MASK_ON"] = plan.task == "masks"
        settings["INPUT.MASK_FORMAT"] = "bitmask" if _has_encodings(data) else "polygon"
    if not torch.cuda.is_available():
        settings["DATALOADER.NUM_WORKERS"] = 0  # they would take the cores that compute
    pairs = [word for pair in settings.items() for word in pair]
    if torch.cuda.is_available() and (folder / CONFIG).is_file():  # to be resumed
        trunk = load_config(str(folder / CONFIG)).MODEL.TRUNK
        pairs += ["MODEL.TRUNK.DTYPE", trunk.DTYPE]
    return _new_config(CONFIGS / f"Base-{bases[plan.detector]}.yaml", [*pairs, *overrides])


def check(cfg: CfgNode) -> None:
    """That model and optimizer can be made, and that the trunk's weights, which are downloaded if
    need be, fit it.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: they do not, or cannot.
    """
    Setup(cfg).build()
    if weights := cfg.MODEL.TRUNK.WEIGHTS:
        weight_files.check_weights(local_weights(weights), trunk_of(cfg))


def read_config(folder: Path, overrides: Sequence[str] = ()) -> CfgNode:
    """The config of the run that lies in ``folder``, wherever that has been moved, and its data
    with it.

    Args:
        overrides: KEY, VALUE, ….

    Raises:
        KeyError, ValueError: a key or a value of the config is wrong.
    """
    cfg = load_config(str(folder / CONFIG), overrides)
    cfg.OUTPUT_DIR = str(folder.absolute())
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if (folder / "data").is_dir():
        task = "semantic" if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor" else "boxes"
        cfg.merge_from_list([w for pair in _data_keys(task, folder / "data").items() for w in pair])
    return cfg


def iterations_of(cfg: CfgNode) -> int:
    """How long a run is."""
    return cfg.SOLVER.MAX_ITER


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one to go on from."""
    return (folder / _LAST).is_file()


def write_config(cfg: CfgNode, data: Data, folder: Path) -> None:
    """Write config.yaml, with the classes of the data."""
    model = cfg.MODEL
    heads = [model.SEM_SEG_HEAD] if data.task == "semantic" else [model.ROI_HEADS, model.RETINANET]
    set_classes(cfg, data.classes, folder, *heads)
    _write(cfg, folder)


def _write(cfg: CfgNode, folder: Path) -> None:
    with atomic_path(folder / CONFIG) as temporary:
        temporary.write_text(cfg.dump(), encoding="utf-8")


def train(cfg: CfgNode, folder: Path, *, resume: bool) -> dict[str, float]:
    """Train what ``cfg`` says into ``folder``, and write it there as config.yaml when it begins.

    Returns:
        The last evaluation's metrics.

    Raises:
        KeyError, ValueError: a value of the config is wrong.
    """
    with _log(folder):
        register_datasets(cfg)
        seed_all_rng(cfg.SEED)
        trainer = RunTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        _write(cfg, folder)
        cfg.freeze()
        warn(functools.partial(_largest_step, trainer), torch.device(cfg.MODEL.DEVICE))
        trainer.train()
    return trainer.metrics


def classes_of(folder: Path) -> list[str]:
    """Names of the classes that the run has trained."""
    return class_names(load_config(str(folder / CONFIG)))


def evaluate(folder: Path, other: Path | None) -> dict[str, float]:
    """Score the run's model on its own validation split, or on that of the data which
    :func:`e3va.runs.folder.write_data` has written into ``other``.

    Raises:
        ValueError: the run has nothing to be evaluated on.
    """
    cfg = _trained(folder)
    if other is not None:
        cfg.OUTPUT_DIR = str(other)
        keys = {f"DATASETS.{f.section}.{key}": "" for f in FORMATS for key in f.given_by}
        keys |= _data_keys("semantic" if (other / MAPS).is_file() else "boxes", other)
        cfg.merge_from_list([word for pair in keys.items() for word in pair])
    with _log(folder):
        register_datasets(cfg)
        if not cfg.DATASETS.TEST:
            raise ValueError(f"{folder} was trained without validation data: name some")
        return scores(Trainer.test(cfg, load_model(cfg)))


def predictor(folder: Path) -> Callable[[np.ndarray], Found]:
    """What finds things on an image [H, W, 3], uint8, RGB."""
    with _log(folder):
        return predictor_of(_trained(folder))


def export(folder: Path, target: Path) -> None:
    """Write the whole model, trunk included, as .safetensors or .pth."""
    with _log(folder):
        export_model(_trained(folder), target)


def _largest_step(trainer: Trainer) -> tuple[Setup, int, tuple[int, int]]:
    size, instances = largest(trainer.cfg, trainer.data_loader.records)
    return Setup(trainer.cfg, instances), trainer.images_at_once, size


def _data_keys(task: str, folder: Path) -> dict[str, str]:
    """The config keys of data for a task that :func:`write_data` has written into ``folder``."""
    if task == "semantic":
        return {"DATASETS.SEMANTIC_MAPS.INDEX": str((folder / MAPS).absolute())}
    keys = {}
    for split, name in (("TRAIN", "train"), ("TEST", "val")):
        keys[f"DATASETS.COCO_JSON.{split}_JSON"] = str((folder / f"{name}.json").absolute())
        keys[f"DATASETS.COCO_JSON.{split}_IMAGES"] = str(folder.absolute())
    return keys


def _has_encodings(data: Data) -> bool:
    return any(
        isinstance(annotation.get("segmentation"), dict)
        for split in data.splits.values()
        for annotation in split.annotations
    )


_LAST = "last_checkpoint"
"""The file in which Detectron2 names its last checkpoint."""


def _trained(folder: Path) -> CfgNode:
    """The run's config, naming its weights: the final ones, else the last checkpoint's."""
    weights = folder / "model_final.pth"
    last = folder / _LAST  # newer, where a run that was made longer has been stopped
    if last.is_file():
        weights = folder / last.read_text().strip()
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has no trained weights: there is no {weights}")
    cfg = read_config(folder, ["MODEL.WEIGHTS", str(weights)])
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return cfg


def _warnings() -> logging.Handler:
    """What a user must see, beside the bar."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: record.levelno == logging.WARNING)  # errors are raised
    # A score that no run has, at each evaluation.
    handler.addFilter(lambda record: not record.getMessage().startswith("Boundary IoU"))
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    return handler


_FIXED = (
    *("MODEL.META_ARCHITECTURE", "MODEL.TRUNK.VARIANT", "MODEL.TUNING.METHOD", "MODEL.MASK_ON"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SEED"),
)
"""Keys in which a run must not differ when it is resumed."""


def check_same(cfg: CfgNode, folder: Path) -> None:
    """That ``cfg`` goes on with the run that lies in ``folder``, if there is one.

    Raises:
        ValueError: it is of another run, or a shorter one.
    """
    if not (folder / CONFIG).is_file():
        return
    was = load_config(str(folder / CONFIG))
    now, before = (
        {key: functools.reduce(CfgNode.__getitem__, key.split("."), one) for key in _FIXED}
        for one in (cfg, was)
    )
    check_settings(now, before, folder)
    check_iterations(cfg.SOLVER.MAX_ITER, was.SOLVER.MAX_ITER, folder)


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[None]:
    """Within the block, log lines, and what libraries print, go to log.txt in ``folder`` alone."""
    names = ("detectron2", "fvcore", "e3va")
    loggers = [logging.getLogger(name) for name in names]
    before = [(one.handlers[:], one.propagate, one.level) for one in loggers]
    for name, one in zip(names, loggers, strict=True):
        one.handlers = []
        setup_logger.cache_clear()
        setup_logger(os.fspath(folder), name=name, configure_stdout=False)
        one.addHandler(_warnings())
    try:
        with (folder / LOG).open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            yield
    finally:
        for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)
