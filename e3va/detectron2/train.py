"""A Detectron2 trainer: mixed precision on any device, accumulated gradients, averaged weights,
exact resume, evaluation by task."""

from __future__ import annotations

import argparse
import logging
import os
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    TrainerBase,
    default_setup,
)
from detectron2.engine.hooks import EvalHook, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from e3va.budget import advice
from e3va.checkpoint import find_trunk
from e3va.detectron2.average import WeightAverage
from e3va.detectron2.budget import Setup, largest, sample_batch
from e3va.detectron2.checkpoint import CompleteCheckpointer, SafeCheckpointer
from e3va.detectron2.config import dtype_of, load_config
from e3va.detectron2.data import build_evaluator, register_datasets
from e3va.detectron2.data.loader import AUTO, TrainLoader, batch_share
from e3va.detectron2.data.mapper import build_mapper
from e3va.detectron2.inference import semantic_inference
from e3va.detectron2.solver import build_lr_scheduler, build_optimizer, steps_early
from e3va.detectron2.step import StepTrainer, distribute
from e3va.measure import trainable_parameters

logger = logging.getLogger(__name__)

_NORMALIZER = "loss_normalizer"


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, or evaluate alone; returns the metrics by task ("bbox", "segm", "sem_seg").

    Args:
        args: as Detectron2's ``default_argument_parser`` parses them.

    Raises:
        ValueError: nothing that was trained is given to be evaluated.
    """
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


class Trainer(DefaultTrainer):
    """Detectron2's default training, with the optimizers, the mixed precision, the accumulation,
    the averaging and the evaluation that :func:`~e3va.detectron2.config.add_e3va_config` describes.

    What is random in an iteration follows from the seed and its number, so that a resumed run
    repeats the uninterrupted one, to the last bit on a CPU.

    Args:
        cfg: the config.

    Raises:
        ValueError: a float16 trunk is to be trained beside without mixed precision, a batch does
            not divide, or a setting is out of range.
    """

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)  # DefaultTrainer's own would build Detectron2's AMP trainer
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        batch_share(cfg)
        model = self.build_model(cfg)
        trunk = find_trunk(model)[1]
        if trunk and trunk.storage_dtype() == torch.float16 and not cfg.SOLVER.AMP.ENABLED:
            raise ValueError(
                "MODEL.TRUNK.DTYPE float16 without SOLVER.AMP.ENABLED computes the highway's "
                "gradients in float16 and scales no loss: enable it, or store bfloat16"
            )
        logger.info(
            "%d of %d parameters are trained",
            trainable_parameters(model),
            sum(p.numel() for p in model.parameters()),
        )
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        dtype = None
        if cfg.SOLVER.AMP.ENABLED:
            dtype = dtype_of("SOLVER.AMP.DTYPE", cfg.SOLVER.AMP.DTYPE, ("bfloat16", "float16"))
        self.average = WeightAverage(model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.DECAY else None
        self._trained = _layout(cfg, model, optimizer)
        model = distribute(model)
        self._trainer = StepTrainer(
            model,
            loader,
            optimizer,
            dtype,
            0 if cfg.SOLVER.ACCUMULATE == AUTO else cfg.SOLVER.ACCUMULATE,
            early=steps_early(cfg),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        more = {"ema": self.average} if self.average else {}
        self.checkpointer = SafeCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            trunk_source=cfg.MODEL.TRUNK.WEIGHTS,
            trainer=weakref.proxy(self),
            **more,
        )
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def train(self) -> dict[str, Any]:
        """Train, and return the metrics of the last evaluation by task ("bbox", "segm",
        "sem_seg"); {} where there was none, or another process has them."""
        self._trainer.seed = self.data_loader.seed = self.seed
        self._fit()
        self.data_loader.start = self.start_iter
        super().train()
        return getattr(self, "_last_eval_results", {})

    @property
    def images_at_once(self) -> int:
        """Of each process."""
        return batch_share(self.cfg) // (self._trainer.accumulate or 1)

    def _fit(self) -> None:
        """Take the largest step that the data can give once before the first, on a GPU or where its
        parts are to be found; see :func:`e3va.budget.probe`.

        Raises:
            torch.OutOfMemoryError: it does not fit; says what would.
        """
        fixed = self._trainer.accumulate
        device = next(self.model.parameters()).device
        if fixed and device.type != "cuda":
            return
        size, instances = largest(self.cfg, self.data_loader.records)
        share = batch_share(self.cfg)
        parts = [n for n in range(1, share + 1) if share % n == 0]
        for number in [fixed] if fixed else parts:
            images = share // number
            error = self._trainer.probe(sample_batch(self.cfg, *size, instances) * images)
            if not any(comm.all_gather(error is not None)):
                self._trainer.accumulate = number
                if not fixed:
                    logger.info("SOLVER.ACCUMULATE auto is %d: %d images at once", number, images)
                return
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        what = f"a step of {images} images of {size[0]}×{size[1]} with {instances} instances each"
        reason = "on another process" if error is None else " ".join(str(error).split())
        raise torch.OutOfMemoryError(
            f"{what} does not fit in the memory ({reason}): "
            f"{advice(Setup(self.cfg, instances), images, size, device)}"
        )

    def run_step(self) -> None:
        super().run_step()
        if self.average:
            self.average.update(self.iter)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, evaluating the averaged weights where there are any."""

        def evaluate() -> dict[str, Any]:
            with self.average.applied() if self.average else nullcontext():
                self._last_eval_results = self.test(self.cfg, self.model)
            return self._last_eval_results

        return [
            EvalHook(self.cfg.TEST.EVAL_PERIOD, evaluate) if isinstance(hook, EvalHook) else hook
            for hook in super().build_hooks()
        ]

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {
            "seed": self.seed,
            "trained": self._trained,
            "accumulate": self._trainer.accumulate,
        }
        # RetinaNet divides its losses by a running mean that is not in the model's state. Several
        # processes, each of which has its own, all go on from the first one's.
        if hasattr(self.checkpointer.model, _NORMALIZER):
            state[_NORMALIZER] = getattr(self.checkpointer.model, _NORMALIZER)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; with a new optimizer, and a warning, where something else was
        trained then."""
        if self.cfg.SEED < 0:
            self.seed = state.get("seed", self.seed)
        if not self._trainer.accumulate:  # as it was found then
            self._trainer.accumulate = state.get("accumulate", 0)
        if _NORMALIZER in state:
            setattr(self.checkpointer.model, _NORMALIZER, state[_NORMALIZER])
        # A checkpoint of Detectron2's own trainer does not tell.
        changes = _changes(state.get("trained", self._trained), self._trained)
        if not changes:
            super().load_state_dict(state)
            return
        logger.warning(
            "The optimizer starts afresh at iteration %d: %s", state["iteration"] + 1, changes
        )
        self.iter = state["iteration"]
        self.scheduler.last_epoch = self.iter + 1
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = lr

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return TrainLoader(cfg, build_mapper(cfg, True))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(cfg, dataset_name, mapper=build_mapper(cfg, False))

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        return super().test(cfg, semantic_inference(cfg, model), evaluators)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)


def _layout(cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer's state is of: it knows its parameters by their order alone."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        [[names[id(p)], list(p.shape)] for p in group["params"]] for group in optimizer.param_groups
    ]
    return {"optimizer": cfg.SOLVER.OPTIMIZER, "groups": groups}


def _changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two layouts, in words; empty if nothing does."""
    if then == now:
        return ""
    changes = []
    if then["optimizer"] != now["optimizer"]:
        changes.append(f"it was {then['optimizer']}, now it is {now['optimizer']}")
    old, new = (
        {name: shape for group in layout["groups"] for name, shape in group}
        for layout in (then, now)
    )
    for names, change in (
        (new.keys() - old.keys(), "trained now that were not then"),
        (old.keys() - new.keys(), "no longer trained"),
        ({n for n in old.keys() & new.keys() if old[n] != new[n]}, "of another shape"),
    ):
        if names:
            changes.append(f"{len(names)} tensors are {change} (such as {min(names)})")
    return "; ".join(changes) or "the learning rates or weight decays are grouped otherwise"
