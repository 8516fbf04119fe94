#!/usr/bin/env python3
"""Train and evaluate with Detectron2.

    python train_net.py --config-file detectron2_configs/coco/mask_rcnn_e3va_swin_b_1x.yaml \\
        --num-gpus 1 OUTPUT_DIR output/swin_b

--resume continues, --eval-only evaluates MODEL.WEIGHTS (with --resume: the last checkpoint), and
KEY VALUE pairs at the end override the config.
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import torch

# First, as it says how to get Detectron2 where it is missing.
from e3va.detectron2 import (  # isort: split
    CompleteCheckpointer,
    Trainer,
    WeightAverage,
    load_config,
    register_datasets,
)

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

logger = logging.getLogger("e3va.train_net")


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a run, with its data sets registered and logging set up.

    Evaluation alone writes its log and its config.yaml to "inference", for OUTPUT_DIR/config.yaml
    is what the model was trained with."""
    cfg = load_config(args.config_file, args.opts)
    written = cfg.OUTPUT_DIR
    if args.eval_only:
        written = os.path.join(written, "inference")
    setup_logger(written, comm.get_rank(), name="e3va")
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logger.info("No CUDA device: MODEL.DEVICE is cpu")
    register_datasets(cfg)
    as_written = cfg.clone()
    as_written.OUTPUT_DIR = written
    default_setup(as_written, args)
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, or evaluate alone; returns the metrics by task ("bbox", "segm", "sem_seg")."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = CompleteCheckpointer(model, cfg.OUTPUT_DIR)
        if not (cfg.MODEL.WEIGHTS or (args.resume and checkpointer.has_checkpoint())):
            raise ValueError(
                "--eval-only needs MODEL.WEIGHTS, or --resume and a checkpoint in "
                f"{cfg.OUTPUT_DIR}: the heads are random"
            )
        rest = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        average = WeightAverage(model, cfg.SOLVER.EMA.DECAY)
        if cfg.SOLVER.EMA.DECAY:
            if "ema" not in rest:
                logger.warning("The checkpoint holds no averaged weights: its own are evaluated")
            average.load_state_dict(rest.get("ema", {}))
        with average.applied():
            return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
