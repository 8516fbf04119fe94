"""A Detectron2 trainer: optimizer groups, mixed precision on any device, accumulated gradients,
averaged weights, exact resume, evaluation by task."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook, HookBase
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_default_lr_scheduler
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from e3va.checkpoint import frozen_hash, frozen_names
from e3va.detectron2.checkpoint import SafeCheckpointer
from e3va.detectron2.config import dtype_of
from e3va.detectron2.data import build_mapper
from e3va.detectron2.loader import TrainLoader, batch_share, reseed
from e3va.detectron2.semantic import build_semantic_evaluator, semantic_inference
from e3va.detectron2.voc import VOCTreeEvaluator
from e3va.measure import trainable_parameters
from e3va.optim import Rates, parameter_groups

logger = logging.getLogger(__name__)

_NORMALIZER = "loss_normalizer"


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
        if cfg.MODEL.E3VA.TRUNK_DTYPE == "float16" and not cfg.SOLVER.AMP.ENABLED:
            raise ValueError(
                "MODEL.E3VA.TRUNK_DTYPE float16 without SOLVER.AMP.ENABLED computes the highway's "
                "gradients in float16 and scales no loss: enable it, or store bfloat16"
            )
        TrainerBase.__init__(self)  # DefaultTrainer's own would build Detectron2's AMP trainer
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        batch_share(cfg)
        model = self.build_model(cfg)
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
        self._trainer = StepTrainer(model, loader, optimizer, dtype, cfg.SOLVER.ACCUMULATE)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        more = {"ema": self.average} if self.average else {}
        self.checkpointer = SafeCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            trunk_source=cfg.MODEL.E3VA.WEIGHTS,
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
        self.data_loader.start = self.start_iter
        super().train()
        return getattr(self, "_last_eval_results", {})

    def run_step(self) -> None:
        super().run_step()
        if self.average:
            self.average.update(self.iter)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, evaluating the averaged weights where there are any."""

        def evaluate() -> dict[str, Any]:
            with self.average.applied() if self.average else contextlib.nullcontext():
                self._last_eval_results = self.test(self.cfg, self.model)
            return self._last_eval_results

        return [
            EvalHook(self.cfg.TEST.EVAL_PERIOD, evaluate) if isinstance(hook, EvalHook) else hook
            for hook in super().build_hooks()
        ]

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"seed": self.seed, "trained": self._trained}
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
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind == "voc_tree":
            return VOCTreeEvaluator(dataset_name)
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        if kind in ("sem_seg", "semantic_maps"):
            return build_semantic_evaluator(cfg, dataset_name)
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        evaluator = COCOEvaluator(
            dataset_name, tasks, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference")
        )
        _complete(evaluator._coco_api, dataset_name, cfg.MODEL.MASK_ON)
        return evaluator


def _complete(truth: Any, dataset_name: str, masks: bool) -> None:
    """Give what predictions are scored against (a ``pycocotools.coco.COCO``) all that pycocotools
    must have; what it cannot score is left out, with a warning."""
    annotations = [
        annotation
        for annotation in truth.dataset["annotations"]
        if len(annotation["bbox"]) == 4 and (annotation.get("segmentation") or not masks)
    ]
    if dropped := len(truth.dataset["annotations"]) - len(annotations):
        logger.warning("%s: %d instances are not scored: no mask, or no box", dataset_name, dropped)
    for annotation in annotations:
        _, _, width, height = annotation["bbox"]
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", width * height)
    if 0 in truth.anns:
        # To pycocotools a match with annotation 0 is no match.
        for i, annotation in enumerate(annotations):
            annotation["id"] = i + 1
    truth.dataset["annotations"] = annotations
    truth.createIndex()


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that cfg.SOLVER describes, over the parameters that require a gradient.

    Raises:
        ValueError: SOLVER.OPTIMIZER is unknown.
    """
    solver = cfg.SOLVER
    bias_decay = solver.WEIGHT_DECAY_BIAS
    rates = Rates(
        solver.BASE_LR,
        solver.WEIGHT_DECAY,
        norm_decay=solver.WEIGHT_DECAY_NORM,
        bias_decay=solver.WEIGHT_DECAY if bias_decay is None else bias_decay,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        highway_lr_factor=solver.HIGHWAY_LR_FACTOR,
        highway_lr_ratio=solver.HIGHWAY_LR_RATIO,
    )
    groups = parameter_groups(model, rates)
    options: dict[str, Any]
    kind: type[torch.optim.Optimizer]
    if solver.OPTIMIZER == "ADAMW":
        kind, options = torch.optim.AdamW, {"betas": tuple(solver.BETAS)}
    elif solver.OPTIMIZER == "SGD":
        kind = torch.optim.SGD
        options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    else:
        raise ValueError(f"SOLVER.OPTIMIZER must be ADAMW or SGD, got {solver.OPTIMIZER!r}")
    clip = solver.CLIP_GRADIENTS
    if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, kind)(groups, **options)

    optimizer = kind(groups, **options)

    def clip_gradients(*_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    optimizer.register_step_pre_hook(clip_gradients)
    return optimizer


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule that cfg.SOLVER describes: one of Detectron2's, or "WarmupPolyLR"."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_default_lr_scheduler(cfg, optimizer)
    schedule = WarmupParamScheduler(
        PolynomialDecayParamScheduler(1.0, solver.POLY_LR_POWER),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)


class StepTrainer(SimpleTrainer):
    """One optimizer step per iteration, in mixed precision on any device, of a batch that may be
    computed in parts.

    Args:
        model, data_loader, optimizer: as for ``SimpleTrainer``.
        dtype: what autocast computes in; under float16 the loss is scaled (default: no autocast).
        accumulate: the parts, of equal size, whose gradients are averaged (default 1).
        seed: of what is random in the model, with the number of the process (default 0).
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None = None,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.seed = seed
        self._device = next(model.parameters()).device.type
        self._dtype = dtype
        self._accumulate = accumulate
        self._scaler = torch.amp.GradScaler(self._device, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        reseed(self.seed, 1 + comm.get_rank(), self.iter)
        self.optimizer.zero_grad()
        means: dict[str, Tensor] = {}
        for part in range(self._accumulate):
            size = len(data) // self._accumulate
            with self._sync(part == self._accumulate - 1):
                with torch.autocast(self._device, self._dtype, enabled=self._dtype is not None):
                    losses = self.model(data[part * size : (part + 1) * size])
                self._scaler.scale(sum(losses.values()) / self._accumulate).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / self._accumulate
        self.after_backward()
        self._write_metrics(means, data_time)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients once per step."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"grad_scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state.get("grad_scaler"):  # there is none after training in another precision
            self._scaler.load_state_dict(state["grad_scaler"])


class WeightAverage:
    """Exponential moving average of what is trained of a model.

    The decay grows to its final value, as min(decay, (1 + n) / (10 + n)) after n iterations, so
    that the first weights are soon forgotten.

    Args:
        model: the model.
        decay: the final decay, in [0, 1).

    Raises:
        ValueError: ``decay`` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"SOLVER.EMA.DECAY must be in [0, 1), got {decay}")
        self._decay = decay
        self._own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take the weights after ``iteration`` in."""
        own = list(self._own.values())
        if not self._average:
            self.load_state_dict({})
        decay = min(self._decay, (1 + iteration) / (10 + iteration))
        get_ema_multi_avg_fn(decay)(list(self._average.values()), own, 0)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights."""
        own = {name: p.detach().clone() for name, p in self._own.items()}
        self._set(self._average)
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._own[name].copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        return self._average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``; from the model's weights where they are not in it or of another
        shape."""
        fits = {n for n, p in self._own.items() if n in state and state[n].shape == p.shape}
        self._average = {
            n: (state[n].to(p) if n in fits else p.detach()).clone() for n, p in self._own.items()
        }


def distribute(model: nn.Module) -> nn.Module:
    """The model under DDP if there are several processes, which exchange what is trained alone: a
    frozen trunk that is the same everywhere is not sent around.

    Raises:
        ValueError: it has norms that only GPUs can synchronise, and is on a CPU.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    synchronised = [n for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if synchronised and not on_gpu:
        raise ValueError(
            f"SyncBN works on GPUs alone, and {synchronised[0]} is on a CPU: set the NORM of its "
            "config section, such as MODEL.SEM_SEG_HEAD.NORM, to naiveSyncBN"
        )
    if len(set(comm.all_gather(frozen_hash(model)))) == 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, frozen_names(model)
        )
    more = {} if on_gpu else {"device_ids": None}
    return create_ddp_model(model, broadcast_buffers=False, **more)


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
