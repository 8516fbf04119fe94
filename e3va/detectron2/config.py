"""The config keys that E³VA adds to Detectron2's."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

import e3va
from e3va.config import HighwayConfig
from e3va.detectron2.data import FORMATS
from e3va.detectron2.data.loader import AUTO
from e3va.methods import HIGHWAYS, METHODS, Method, options_of
from e3va.precision import DTYPES
from e3va.words import did_you_mean

logger = logging.getLogger(__name__)

_PACKAGE = Path(e3va.__file__).parent
CONFIGS = (
    _PACKAGE / "configs"
    if (_PACKAGE / "configs").is_dir()
    else _PACKAGE.parent / "detectron2_configs"
)
"""The folder of the configs that ship with the package; in a checkout: of the checkout's."""


_FORMER = {
    "VARIANT": "MODEL.TRUNK.VARIANT",
    "WINDOW_SIZE": "MODEL.TRUNK.WINDOW_SIZE",
    "WEIGHTS": "MODEL.TRUNK.WEIGHTS",
    "TRUNK_DTYPE": "MODEL.TRUNK.DTYPE",
    "TRUNK_PRECISION": "MODEL.TRUNK.PRECISION",
    "COMPILE": "MODEL.TRUNK.COMPILE",
    "BRANCHES": "MODEL.HIGHWAY.BRANCHES",
    "KERNEL_DIM": "MODEL.HIGHWAY.KERNEL_DIM",
    "HIDDEN_RATIO": "MODEL.HIGHWAY.HIDDEN_RATIO",
    "TAP": "MODEL.HIGHWAY.TAP",
    "MIXING": "MODEL.HIGHWAY.MIXING",
    "STATE": "MODEL.HIGHWAY.STATE",
    "TAPS": "MODEL.HIGHWAY.STORAGE",
    "DROP_PATH_RATE": "MODEL.TUNING.FULL.DROP_PATH",
}
"""What the keys of the former section MODEL.E3VA are called now."""


def add_e3va_config(cfg: CfgNode) -> None:
    """Add E³VA's keys, with their defaults, to a Detectron2 config."""
    cfg.MODEL.TRUNK = CfgNode()
    # Which trunk: "swin_t", "swin_s", "swin_b", "swin_l" or "swin_digits", and the family that it
    # must be of, "swin"; empty: any.
    cfg.MODEL.TRUNK.VARIANT = "swin_b"
    cfg.MODEL.TRUNK.FAMILY = ""
    # Side of its attention windows, such as 12 for weights pretrained at 384 pixels; 0: the
    # variant's own.
    cfg.MODEL.TRUNK.WINDOW_SIZE = 0
    # The trunk's pretrained weights: a file of Microsoft's, MMDetection, timm, torchvision, Hugging
    # Face or Detectron2, as a path, a URL, timm:NAME, which timm downloads, or
    # e3va://swin_digits.safetensors, which ships with the package. Empty: random weights, or those
    # that MODEL.WEIGHTS brings. Checkpoints leave out what stays as this file has it, and name it
    # by its hash: they are loaded over the same file alone.
    cfg.MODEL.TRUNK.WEIGHTS = ""
    # What a trunk stores its frozen weights in, and, without SOLVER.AMP, computes in, as does the
    # highway beside it: "float32", "bfloat16" or "float16" (to train, with SOLVER.AMP alone). Under
    # METHOD "full" nothing is frozen, and it is "float32".
    cfg.MODEL.TRUNK.DTYPE = "float32"
    # "int8" or "fp8": quantise the linear layers of a frozen trunk, through torchao. Empty: do not.
    # WEIGHTS must then bring the trunk's weights.
    cfg.MODEL.TRUNK.PRECISION = ""
    # Whether trunk and highway go through torch.compile, when they first run. A new image size then
    # takes long at first; after the eighth, PyTorch runs others as without.
    cfg.MODEL.TRUNK.COMPILE = False

    # Form and shape of the highway, and how it keeps the trunk's taps: see e3va.HighwayConfig.
    cfg.MODEL.HIGHWAY = _section("e3va")

    # How the backbone is tuned: "full" (everything is trained), "frozen" (nothing is), "e3va"
    # (nothing but the highway beside the frozen trunk, and the output norms), "e3va_paper" (the
    # highway in its published form), or one of the peers: "bitfit", "norm", "partial1", "adapter",
    # "adaptformer", "lora", "lorand", "mona".
    cfg.MODEL.TUNING = CfgNode()
    cfg.MODEL.TUNING.METHOD = "e3va"
    # The options of all but the highway, such as FULL.DROP_PATH and LORA.RANK: see e3va.methods.
    for method in METHODS:
        if options_of(method) and method not in HIGHWAYS:
            cfg.MODEL.TUNING[method.upper()] = _section(method)

    # Names of the classes of one's own data: written when they are registered, kept by config.yaml.
    cfg.DATASETS.CLASSES = []
    for dataset_format in FORMATS:  # whose files say what the keys mean
        cfg.DATASETS[dataset_format.section] = CfgNode(dict(dataset_format.defaults))

    # UPerNet (MODEL.SEM_SEG_HEAD.NAME UPerNetHead; CONVS_DIM, NORM, LOSS_WEIGHT are those of
    # SEM_SEG_HEAD): grids of the pyramid pooling, and the auxiliary FCN head.
    cfg.MODEL.UPERNET = CfgNode()
    cfg.MODEL.UPERNET.POOL_SCALES = (1, 2, 3, 6)
    cfg.MODEL.UPERNET.DROPOUT = 0.1
    cfg.MODEL.UPERNET.AUX_FEATURE = "p2"
    cfg.MODEL.UPERNET.AUX_DIM = 256
    cfg.MODEL.UPERNET.AUX_LOSS_WEIGHT = 0.4

    # With INPUT.CROP.ENABLED. Instances: where RESIZE is not empty, half of the images are first
    # resized to one of these shortest edges and cropped, as DETR's are. Semantic maps: crops that
    # one class fills to more than SINGLE_CATEGORY_MAX_AREA are tried anew, ten times.
    cfg.INPUT.CROP.RESIZE = ()
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Semantic maps: each of brightness, contrast and saturation is multiplied, in half of the
    # training images, by a factor from 1 - COLOR_JITTER to 1 + COLOR_JITTER; 0: in none.
    cfg.INPUT.COLOR_JITTER = 0.0

    # Semantic segmentation is tested on overlapping windows of WINDOW pixels, STRIDE pixels apart
    # (0: on whole images), and, with TEST.AUG.ENABLED, at several sizes and mirrored.
    cfg.TEST.SLIDE = CfgNode()
    cfg.TEST.SLIDE.WINDOW = 0
    cfg.TEST.SLIDE.STRIDE = 0

    # LR_SCHEDULER_NAME may also be "WarmupPolyLR": (1 - progress) ** POLY_LR_POWER.
    cfg.SOLVER.POLY_LR_POWER = 1.0

    # "ADAMW"; "ADAMW8BIT", the same with its state in eight bits, through bitsandbytes; or "SGD"
    # with Detectron2's own MOMENTUM and NESTEROV. Norms follow WEIGHT_DECAY_NORM, biases
    # WEIGHT_DECAY_BIAS; relative-position tables are never decayed.
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BETAS = (0.9, 0.999)
    # The highway's learning rate as a multiple of BASE_LR, and that of its V and c, which begin at
    # zero, as a multiple of that (LoRA+, arXiv 2402.12354).
    cfg.SOLVER.HIGHWAY_LR_FACTOR = 1.0
    cfg.SOLVER.HIGHWAY_LR_RATIO = 1.0
    # CLIP_GRADIENTS.CLIP_TYPE may also be "full_model": one norm over all parameters. Detectron2's
    # own "norm" clips each parameter for itself.

    # Into how many parts the batch of a step, IMS_PER_BATCH, is divided on each process, to be
    # computed one after the other in less memory. Gradients and losses are averaged over the parts
    # as they are over processes. "auto", which is -1: the fewest parts whose largest fits in the
    # memory, found by trying before the first step.
    cfg.SOLVER.ACCUMULATE = 1
    # Decay of an exponential moving average of what is trained, such as 0.999; 0: none. Where there
    # is one it is what is evaluated. Checkpoints keep both.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.DECAY = 0.0

    # What SOLVER.AMP.ENABLED computes in: "bfloat16" (GPUs from sm_80 on, CPUs) or "float16", whose
    # loss is scaled.
    cfg.SOLVER.AMP.DTYPE = "bfloat16"


def load_config(config_file: str, overrides: Sequence[Any] = ()) -> CfgNode:
    """A config from a YAML file and overrides [KEY, VALUE, …]; YAML that would run code is refused.

    Former names of keys are understood, with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        KeyError: a key is unknown.
        ValueError: an override has no value, or one of another type; or they give e3va_paper
            another form.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"no config file {config_file!r}: give one with --config-file")
    cfg = get_cfg()
    add_e3va_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(_Files.load_yaml_with_base(config_file)))
    words = list(overrides)
    if len(words) % 2:
        raise ValueError(f"overrides come as KEY VALUE, got {' '.join(map(str, words))}")
    words[::2] = translated(words[::2])
    pairs = zip(words[::2], words[1::2], strict=True)
    words[1::2] = [AUTO if (k, v) == (_ACCUMULATE, "auto") else v for k, v in pairs]
    try:
        cfg.merge_from_list(words)
    except AssertionError as error:  # yacs tells of an unknown key by it
        _, unknown, key = str(error).partition("Non-existent key: ")
        if not unknown:
            raise KeyError(str(error)) from None
        raise KeyError(f"unknown key {key}{did_you_mean(key, _keys(cfg))}") from None
    if cfg.MODEL.TUNING.METHOD == "e3va_paper":
        _check_published(cfg, words[::2])
    return cfg


def _check_published(cfg: CfgNode, given: Collection[str]) -> None:
    """That none of the ``given`` keys asks e3va_paper for a form that is not its own."""
    for name in ("tap", "mixing", "state"):
        key, its = f"MODEL.HIGHWAY.{name.upper()}", getattr(HighwayConfig().published(), name)
        if key in given and (asked := cfg.MODEL.HIGHWAY[name.upper()]) != its:
            raise ValueError(
                f"{key} is {its} in e3va_paper, not {asked}, which MODEL.TUNING.METHOD e3va takes"
            )


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


_ACCUMULATE = "SOLVER.ACCUMULATE"


class _Files(CfgNode):
    """Reads a YAML file and those that it is based on, each with the new names of its keys."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        loaded = super().load_yaml_with_base(filename, allow_unsafe=allow_unsafe)
        solver = loaded.get("SOLVER", {})
        if solver.get("ACCUMULATE") == "auto":
            solver["ACCUMULATE"] = AUTO
        values = loaded.get("MODEL", {}).pop("E3VA", {})
        names = translated([f"MODEL.E3VA.{key}" for key in values])
        for name, value in zip(names, values.values(), strict=True):
            *sections, key = name.split(".")
            node = loaded
            for section in sections:
                node = node.setdefault(section, {})
            node[key] = value
        return loaded


def translated(names: list[str]) -> list[str]:
    """``names`` of keys with what is called otherwise now in its new name; a warning says so."""
    known = {f"MODEL.E3VA.{key}": new for key, new in _FORMER.items()}
    if former := [name for name in names if name in known]:
        changes = ", ".join(f"{name} is {known[name]} now" for name in former)
        logger.warning("Config keys have got new names: %s", changes)
    return [known.get(name, name) for name in names]


def method_options(cfg: CfgNode) -> dict[str, Any]:
    """The options that ``cfg`` gives its tuning method.

    Raises:
        ValueError: there is no such method.
    """
    method = cfg.MODEL.TUNING.METHOD
    names = options_of(method)
    section = cfg.MODEL.HIGHWAY if method in HIGHWAYS else cfg.MODEL.TUNING.get(method.upper())
    return {name: section[name.upper()] for name in names}


def method_of(cfg: CfgNode) -> type[Method]:
    """The tuning method of ``cfg``.

    Raises:
        ValueError: there is no such method.
    """
    options_of(cfg.MODEL.TUNING.METHOD)
    return METHODS[cfg.MODEL.TUNING.METHOD]


def _section(method: str) -> CfgNode:
    """The options of a method, with their defaults."""
    return CfgNode({name.upper(): default for name, default in options_of(method).items()})


def dtype_of(key: str, name: str, choices: Sequence[str] = DTYPES) -> torch.dtype:
    """The torch dtype that the config key ``key`` calls ``name``.

    Raises:
        ValueError: it is none of ``choices``.
    """
    if name not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {name!r}")
    return getattr(torch, name)
