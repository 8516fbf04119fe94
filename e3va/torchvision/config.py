"""The settings of a run, each told once: Python, ``e3va train``, ``config.yaml`` and the check on
resume all read the fields of :class:`TrainConfig`."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar

import torch

from e3va.methods import METHODS
from e3va.precision import DTYPES, PRECISIONS
from e3va.torchvision.model import ANCHOR_SIZES, DETECTORS
from e3va.trunks import FAMILIES
from e3va.words import did_you_mean

Config = TypeVar("Config")

OPTIMIZERS = ("adamw", "adamw8bit")
VARIANTS = tuple(variant for family in FAMILIES.values() for variant in family.variants)


def _setting(
    help: str, default: Any = MISSING, choices: Sequence[str] | None = None, fixed: bool = True
) -> Any:
    """A field of a config; one that is not ``fixed`` may differ when a run is resumed."""
    metadata = {"help": help, "choices": choices, "fixed": fixed}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What :func:`e3va.torchvision.build_model` builds; the fields' ``help`` says what each is.

    Raises:
        ValueError: a setting is out of range.
    """

    # Their hash tells whether they are the same, wherever they lie.
    weights: str = _setting("the trunk's: a file or timm:NAME", fixed=False)
    detector: str = _setting("what is trained on top", "mask_rcnn", tuple(DETECTORS))
    method: str = _setting("how the backbone is tuned", "e3va", tuple(METHODS))
    options: Mapping[str, Any] = _setting("of the method: options.kernel_dim 4", {})
    variant: str = _setting("architecture of the trunk", "swin_b", VARIANTS)
    trunk_options: Mapping[str, Any] = _setting(
        "of it, set otherwise: trunk_options.window_size 12", {}
    )
    trunk_dtype: str = _setting("what frozen weights are stored in", "float32", DTYPES)
    trunk_precision: str | None = _setting("quantise the frozen trunk", None, PRECISIONS)
    out_channels: int = _setting("channels of the FPN", 256)
    anchor_sizes: tuple[int, ...] = _setting("of the smallest anchors on each level", ANCHOR_SIZES)
    min_size: tuple[int, ...] = _setting("shorter image side; several: one is drawn", (800,))
    max_size: int = _setting("limit of the longer image side", 1333)
    detector_options: Mapping[str, Any] = _setting(
        "of torchvision's: detector_options.box_score_thresh 0.2", {}
    )

    def __post_init__(self) -> None:
        if self.trunk_dtype not in DTYPES:
            raise ValueError(
                f"trunk_dtype must be one of {', '.join(DTYPES)}, got {self.trunk_dtype!r}"
            )
        for name in ("out_channels", "anchor_sizes", "min_size", "max_size"):
            value = getattr(self, name)
            sizes = value if isinstance(value, tuple) else (value,)
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How :func:`e3va.torchvision.train.train` trains; the fields' ``help`` says what each is.

    ``model`` is what the detector was built from: without it, ``config.yaml`` does not tell how to
    build it again.

    Raises:
        ValueError: a setting is out of range.
    """

    iterations: int = _setting("optimizer steps in all", fixed=False)
    batch_size: int = _setting("images of each step", 2)
    lr: float = _setting("the highest learning rate", 1e-4)
    highway_lr_factor: float = _setting("the highway's learning rate over lr", 1.0)
    highway_lr_ratio: float = _setting("that of its V and c over the highway's", 1.0)
    weight_decay: float = _setting("AdamW's, for weights alone", 0.05)
    optimizer: str = _setting(
        "adamw, or with its state in eight bits, through bitsandbytes", "adamw", OPTIMIZERS
    )
    warmup: int = _setting("iterations of linear warm-up", 0)
    clip_norm: float = _setting("the most that the norm of all gradients may be", 1.0)
    horizontal_flip: bool = _setting("mirror half of the training images", True)
    keep_empty: bool = _setting("train on images without an instance, too", True, fixed=False)
    amp: str | None = _setting("autocast to this dtype", None, ("bfloat16", "float16"))
    # There is one at the end in any case.
    eval_period: int | None = _setting("iterations between evaluations", None, fixed=False)
    checkpoint_period: int = _setting("iterations between checkpoints", 500, fixed=False)
    seed: int = _setting("of sampling, augmentation and the model's own randomness", 0)
    workers: int = _setting("processes that load images; 0: this one", 0, fixed=False)
    device: str | None = _setting("default: cuda where there is one, else cpu", None, fixed=False)
    model: ModelConfig | None = None

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "checkpoint_period", "eval_period"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.warmup < self.iterations:
            raise ValueError(
                f"warmup must be in [0, iterations = {self.iterations}), got {self.warmup}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        if self.amp not in (None, "bfloat16", "float16"):
            raise ValueError(f"amp must be bfloat16, float16 or None, got {self.amp!r}")

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return getattr(torch, self.amp) if self.amp else None

    def resolved_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def fixed_settings(config: Any) -> dict[str, Any]:
    """The settings that a resumed run must share with the checkpoint's, by name, as JSON has
    them."""
    settings: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            settings |= fixed_settings(value)
        elif f.metadata.get("fixed"):
            settings[f.name] = value
    return json.loads(json.dumps(settings))


def from_json(kind: type[Config], content: Mapping[str, Any]) -> Config:
    """The config that ``dataclasses.asdict`` and JSON made ``content`` of.

    Raises:
        TypeError: a setting is missing or unknown.
        ValueError: one is of another type, or out of range.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"settings are pairs of names and values, not {content!r}")
    values: dict[str, Any] = dict(content)
    hints = typing.get_type_hints(kind)
    for f in _described(kind):
        if f.name in values:
            values[f.name] = _typed(f, hints[f.name], values[f.name])
    if values.get("model") is not None:
        values["model"] = from_json(ModelConfig, values["model"])
    return kind(**values)


def set_fields(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """``config`` with some settings, its own or its model's, set otherwise: NAME, VALUE, …; of what
    has names of its own also one alone: options.NAME, VALUE.

    Raises:
        ValueError: there is no such setting, or it is out of range.
    """
    if len(overrides) % 2:
        raise ValueError(f"settings come as NAME VALUE, got {' '.join(overrides)}")
    assert config.model is not None
    changes: dict[type, dict[str, Any]] = {TrainConfig: {}, ModelConfig: {}}
    if "method" in overrides[::2]:  # another method has other options
        changes[ModelConfig]["options"] = {}
    fields = {f.name: (kind, f) for kind in changes for f in _described(kind)}
    for name, text in zip(overrides[::2], overrides[1::2], strict=True):
        name, dot, entry = name.partition(".")
        if name not in fields:
            hint = did_you_mean(name, fields)
            raise ValueError(f"no setting {name!r}{hint} (known: {', '.join(fields)})")
        kind, f = fields[name]
        hint = typing.get_type_hints(kind)[name]
        if not dot:
            changes[kind][name] = _typed(f, hint, _literal(text), text)
        elif typing.get_origin(hint) is Mapping:
            before = changes[kind].get(name, getattr(config.model, name))
            changes[kind][name] = {**before, entry: _literal(text)}
        else:
            raise ValueError(f"{name} has no settings of its own, got {name}.{entry}")
    model = dataclasses.replace(config.model, **changes[ModelConfig])
    own = dataclasses.replace(config, **changes[TrainConfig])
    return dataclasses.replace(own, model=model)


def _typed(f: dataclasses.Field[Any], hint: Any, value: Any, text: Any = None) -> Any:
    """``value``, or ``text`` that it was read from, as a field of type ``hint`` has it."""
    text = value if text is None else text
    kinds = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if origin is tuple:
            (of, *_) = typing.get_args(kind)
            items = tuple(value) if isinstance(value, list | tuple) else (value,)
            if all(type(item) is of for item in items):
                return items
        elif origin is Mapping:
            if isinstance(value, dict):
                return value
        elif kind is str:
            if isinstance(text, str) and text in (f.metadata["choices"] or [text]):
                return text
        elif type(value) is kind or (kind is float and type(value) is int):
            return kind(value) if kind is float else value
    wanted = f.metadata["choices"] or [getattr(k, "__name__", str(k)) for k in kinds]
    raise ValueError(f"{f.name} must be of {', '.join(wanted)}, got {text!r}")


def _literal(text: str) -> Any:
    """``text`` read as Python's, else as a string."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    return text


def _described(kind: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(kind) if "help" in f.metadata]
