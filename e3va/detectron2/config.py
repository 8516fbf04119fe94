"""The config keys that E³VA adds to Detectron2's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from e3va.ops.taps import DEFAULT_TAPS

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def add_e3va_config(cfg: CfgNode) -> None:
    """Add E³VA's keys, with their defaults, to a Detectron2 config."""
    # How the backbone is tuned: "full" (everything is trained), "frozen" (nothing is), "e3va"
    # (nothing but the highway beside the frozen trunk, and the output norms), "e3va_paper" (the
    # highway in its published form), or one of the peers: "bitfit", "norm", "partial1", "adapter",
    # "adaptformer", "lora", "lorand", "mona".
    cfg.MODEL.TUNING = CfgNode()
    cfg.MODEL.TUNING.METHOD = "e3va"

    cfg.MODEL.E3VA = CfgNode()
    # The trunk: "swin_t", "swin_s", "swin_b", "swin_l" or "swin_digits".
    cfg.MODEL.E3VA.VARIANT = "swin_b"
    # Side of its attention windows: 7, or 12 for weights pretrained at 384 pixels.
    cfg.MODEL.E3VA.WINDOW_SIZE = 7
    # The trunk's pretrained weights: a file of Microsoft's, MMDetection, timm, torchvision, Hugging
    # Face or Detectron2, as a path, a URL, timm:NAME, which timm downloads, or
    # e3va://swin_digits.safetensors, which ships with the package. Empty: random weights, or those
    # that MODEL.WEIGHTS brings. Checkpoints leave out what stays as this file has it, and name it
    # by its hash: they are loaded over the same file alone.
    cfg.MODEL.E3VA.WEIGHTS = ""
    # What a trunk stores its frozen weights in, and, without SOLVER.AMP, computes in, as does the
    # highway beside it: "float32", "bfloat16" or "float16" (to train, with SOLVER.AMP alone).
    cfg.MODEL.E3VA.TRUNK_DTYPE = "float32"
    # "int8" or "fp8": quantise the linear layers of a frozen trunk, through torchao. Empty: do not.
    # WEIGHTS must then bring the trunk's weights.
    cfg.MODEL.E3VA.TRUNK_PRECISION = ""
    # Shape of the highway's adapters: rank BRANCHES * KERNEL_DIM, hidden width HIDDEN_RATIO * C.
    cfg.MODEL.E3VA.BRANCHES = 2
    cfg.MODEL.E3VA.KERNEL_DIM = 8
    cfg.MODEL.E3VA.HIDDEN_RATIO = 0.5
    # Their form under METHOD "e3va": whether an adapter reads a sub-layer's "output" or the "norm"
    # after it, the side of its convolution over the map (0, 3, 5 or 7), and whether it hears what
    # those before it said.
    cfg.MODEL.E3VA.TAP = "norm"
    cfg.MODEL.E3VA.MIXING = 3
    cfg.MODEL.E3VA.STATE = True
    # How the highway keeps the trunk's taps for backward: "full", "fp8", "int8" or "int4".
    cfg.MODEL.E3VA.TAPS = DEFAULT_TAPS
    # Stochastic depth of the last block, under METHOD "full" alone: a frozen trunk has none.
    cfg.MODEL.E3VA.DROP_PATH_RATE = 0.0
    # Whether trunk and highway go through torch.compile, when they first run. New image sizes then
    # take long at first.
    cfg.MODEL.E3VA.COMPILE = False

    # Names of the classes of one's own data: written when they are registered, kept by config.yaml.
    cfg.DATASETS.CLASSES = []
    # One's own data in COCO format. A given JSON replaces DATASETS.TRAIN or DATASETS.TEST, and the
    # number of classes is then taken from it. IMAGES is the folder that the JSON's file names are
    # relative to; empty: the folder of the JSON. "~" and "$VARIABLE" are expanded.
    cfg.DATASETS.COCO_JSON = CfgNode()
    cfg.DATASETS.COCO_JSON.TRAIN_JSON = ""
    cfg.DATASETS.COCO_JSON.TRAIN_IMAGES = ""
    cfg.DATASETS.COCO_JSON.TEST_JSON = ""
    cfg.DATASETS.COCO_JSON.TEST_IMAGES = ""

    # One's own boxes in a Pascal VOC tree: ROOT holds Annotations, ImageSets/Main and JPEGImages.
    # A given ROOT replaces DATASETS.TRAIN and DATASETS.TEST by its splits, those of
    # ImageSets/Main; an empty TEST_SPLIT: nothing is evaluated. CLASSES: empty, those that the
    # XML files name, in alphabetical order.
    cfg.DATASETS.VOC_TREE = CfgNode()
    cfg.DATASETS.VOC_TREE.ROOT = ""
    cfg.DATASETS.VOC_TREE.TRAIN_SPLIT = "train"
    cfg.DATASETS.VOC_TREE.TEST_SPLIT = "val"
    cfg.DATASETS.VOC_TREE.CLASSES = []

    # One's own semantic maps in ADE20K's layout: ROOT holds images/SPLIT and annotations/SPLIT,
    # whose maps of the same names say 0 where a pixel is unlabelled and k where it is of the k-th
    # class. CLASSES: empty, those of ROOT/classes.csv (lines "value, name").
    cfg.DATASETS.SEMANTIC_MAPS = CfgNode()
    cfg.DATASETS.SEMANTIC_MAPS.ROOT = ""
    cfg.DATASETS.SEMANTIC_MAPS.TRAIN_SPLIT = "training"
    cfg.DATASETS.SEMANTIC_MAPS.TEST_SPLIT = "validation"
    cfg.DATASETS.SEMANTIC_MAPS.CLASSES = []

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

    # "ADAMW", or "SGD" with Detectron2's own MOMENTUM and NESTEROV. Norms follow
    # WEIGHT_DECAY_NORM, biases WEIGHT_DECAY_BIAS; relative-position tables are never decayed.
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
    # as they are over processes.
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

    Raises:
        FileNotFoundError: there is no such file.
        KeyError: a key is unknown.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"no config file {config_file!r}: give one with --config-file")
    cfg = get_cfg()
    add_e3va_config(cfg)
    cfg.merge_from_file(config_file, allow_unsafe=False)
    cfg.merge_from_list(list(overrides))
    return cfg


def expand_path(cfg: CfgNode, section: str, key: str) -> str:
    """The path that ``cfg.DATASETS[section][key]`` names, with "~" and "$VARIABLE" expanded.

    Raises:
        ValueError: such a variable is not set.
    """
    path = os.path.expanduser(os.path.expandvars(cfg.DATASETS[section][key]))
    if "$" in path:
        raise ValueError(
            f"DATASETS.{section}.{key} is {path!r}, but that environment variable is not set: "
            f"set it, or give the path as DATASETS.{section}.{key}"
        )
    return path


def dtype_of(key: str, name: str, choices: Sequence[str] = tuple(_DTYPES)) -> torch.dtype:
    """The torch dtype that the config key ``key`` calls ``name``.

    Raises:
        ValueError: it is none of ``choices``.
    """
    if name not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {name!r}")
    return _DTYPES[name]
