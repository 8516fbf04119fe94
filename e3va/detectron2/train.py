"""A Detectron2 trainer: optimizer groups, mixed precision on any device, COCO evaluation."""

from __future__ import annotations

import logging
import os
import time
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import (
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from e3va.detectron2.checkpoint import SafeCheckpointer
from e3va.detectron2.config import dtype_of
from e3va.highway import BIASES, OUTPUTS, PARAMETERS
from e3va.measure import trainable_parameters

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's default training, with the optimizers, the mixed precision and the evaluation
    that :func:`~e3va.detectron2.config.add_e3va_config` describes.

    Args:
        cfg: the config.

    Raises:
        ValueError: a float16 trunk is to be trained beside without mixed precision.
    """

    def __init__(self, cfg: CfgNode) -> None:
        if cfg.MODEL.E3VA.TRUNK_DTYPE == "float16" and not cfg.SOLVER.AMP.ENABLED:
            raise ValueError(
                "MODEL.E3VA.TRUNK_DTYPE float16 without SOLVER.AMP.ENABLED computes the highway's "
                "gradients in float16 and scales no loss: enable it, or store bfloat16"
            )
        TrainerBase.__init__(self)  # DefaultTrainer's own would build Detectron2's AMP trainer
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        logger.info(
            "%d of %d parameters are trained",
            trainable_parameters(model),
            sum(p.numel() for p in model.parameters()),
        )
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        model = create_ddp_model(model, broadcast_buffers=False)
        if cfg.SOLVER.AMP.ENABLED:
            dtype = dtype_of("SOLVER.AMP.DTYPE", cfg.SOLVER.AMP.DTYPE, ("bfloat16", "float16"))
            self._trainer = AutocastTrainer(model, loader, optimizer, dtype)
        else:
            self._trainer = SimpleTrainer(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def train(self) -> dict[str, Any]:
        """Train, and return the metrics of the last evaluation by task ("bbox", "segm"); {} where
        there was none, or another process has them."""
        super().train()
        return getattr(self, "_last_eval_results", {})

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        evaluator = COCOEvaluator(
            dataset_name, tasks, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference")
        )
        truth = evaluator._coco_api
        for annotation in truth.dataset["annotations"]:  # which pycocotools must have
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        if 0 in truth.anns:
            # To pycocotools a match with annotation 0 is no match.
            for i, annotation in enumerate(truth.dataset["annotations"]):
                annotation["id"] = i + 1
            truth.createIndex()
        return evaluator


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that cfg.SOLVER describes, over the parameters that require a gradient.

    Raises:
        ValueError: SOLVER.OPTIMIZER is unknown.
    """
    solver = cfg.SOLVER
    overrides: dict[str, dict[str, float]] = {"relative_position_bias_table": {"weight_decay": 0.0}}
    for name in PARAMETERS:
        ratio = solver.HIGHWAY_LR_RATIO if name in OUTPUTS else 1.0
        overrides[name] = {"lr": solver.BASE_LR * solver.HIGHWAY_LR_FACTOR * ratio}
        if name in BIASES and solver.WEIGHT_DECAY_BIAS is not None:
            overrides[name]["weight_decay"] = solver.WEIGHT_DECAY_BIAS
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides=overrides,
    )
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


class AutocastTrainer(SimpleTrainer):
    """Trains in mixed precision, on CPU too, where Detectron2's own AMP trainer cannot.

    Args:
        model, data_loader, optimizer: as for ``SimpleTrainer``.
        dtype: what autocast computes in; under float16 the loss is scaled.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self._device = next(model.parameters()).device.type
        self._dtype = dtype
        self._scaler = torch.amp.GradScaler(self._device, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast(self._device, self._dtype):
            losses = self.model(data)
        self.optimizer.zero_grad()
        self._scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"grad_scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state.get("grad_scaler"):  # there is none after training in another precision
            self._scaler.load_state_dict(state["grad_scaler"])
