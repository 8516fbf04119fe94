"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_default_lr_scheduler
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch import nn

from e3va.optim import Rates, adamw8bit, parameter_groups


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that cfg.SOLVER describes, over the parameters that require a gradient.

    Raises:
        ValueError: SOLVER.OPTIMIZER is unknown.
        ImportError: it needs a package that is missing.
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
        # Fused it makes nothing of a weight's size; but it would clip before it unscales.
        options = {"betas": tuple(solver.BETAS), "fused": not _is_scaled(cfg)}
        kind = torch.optim.AdamW
    elif solver.OPTIMIZER == "ADAMW8BIT":
        options = {"betas": tuple(solver.BETAS)}
        kind = adamw8bit()
    elif solver.OPTIMIZER == "SGD":
        kind = torch.optim.SGD
        options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    else:
        raise ValueError(
            f"SOLVER.OPTIMIZER must be ADAMW, ADAMW8BIT or SGD, got {solver.OPTIMIZER!r}"
        )
    clip = solver.CLIP_GRADIENTS
    if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, kind)(groups, **options)

    optimizer = kind(groups, **options)

    def clip_gradients(*_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    optimizer.register_step_pre_hook(clip_gradients)
    return optimizer


def steps_early(cfg: CfgNode) -> bool:
    """Whether gradients need not wait for each other, see :func:`e3va.optim.stepping`: one process,
    no scaled loss, and no norm over the full model."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    together = clip.ENABLED and clip.CLIP_TYPE == "full_model"
    return comm.get_world_size() == 1 and not _is_scaled(cfg) and not together


def _is_scaled(cfg: CfgNode) -> bool:
    return cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16"


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
