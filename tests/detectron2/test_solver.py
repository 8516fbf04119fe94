"""Optimizers, their groups, and schedules."""

import math

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.modeling import build_model
from torch import nn

from e3va.backbone import OutputNorm
from e3va.detectron2 import Trainer
from e3va.detectron2.solver import build_optimizer
from e3va.methods import METHODS


def test_bad_solver_values(tiny):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="ADAMW, ADAMW8BIT or SGD, got 'LION'"):
        build_optimizer(tiny("SOLVER.OPTIMIZER", "LION"), model)
    cfg = tiny("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float64")
    with pytest.raises(ValueError, match=r"SOLVER.AMP.DTYPE must be one of bfloat16, float16"):
        Trainer(cfg)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["ADAMW", "ADAMW8BIT", "SGD"])
def test_optimizer_groups(tiny, method, kind):
    if kind == "ADAMW8BIT":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing")
    options = ["SOLVER.OPTIMIZER", kind, "SOLVER.HIGHWAY_LR_FACTOR", 1.0]
    options += ["SOLVER.HIGHWAY_LR_RATIO", 1.0]
    cfg = tiny("MODEL.TUNING.METHOD", method, *options)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    grouped = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(trained)
    assert {id(p) for p, _ in grouped} == {id(p) for p in trained}

    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert any(isinstance(m, OutputNorm) for m in norms)
    undecayed = {id(p) for m in norms for p in m.parameters() if p.requires_grad} | {
        id(p)
        for n, p in model.named_parameters()
        if "position_bias" in n or n.endswith((".bias", ".b", ".c", ".gamma"))
    }
    for p, group in grouped:
        assert group["weight_decay"] == (0.0 if id(p) in undecayed else 0.05)
        assert group["lr"] == cfg.SOLVER.BASE_LR


def test_the_highway_may_learn_faster(tiny):
    cfg = tiny("SOLVER.HIGHWAY_LR_FACTOR", 3.0, "SOLVER.HIGHWAY_LR_RATIO", 4.0)
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = (12 if name.endswith((".V", ".c")) else 3) if ".highway." in name else 1
            assert rates[id(parameter)] == pytest.approx(factor * cfg.SOLVER.BASE_LR)


def test_bias_decay_covers_the_highway(tiny):
    cfg = tiny("SOLVER.WEIGHT_DECAY_BIAS", 0.01)
    model = build_model(cfg)
    decay = {
        id(p): g["weight_decay"]
        for g in build_optimizer(cfg, model).param_groups
        for p in g["params"]
    }
    for stage in model.backbone.bottom_up.net.highway.stages:
        assert decay[id(stage.b)] == decay[id(stage.c)] == 0.01
        assert decay[id(stage.P)] == decay[id(stage.V)] == 0.05


def test_gradient_clipping(tiny):
    """SGD moves by learning rate times clipped gradient."""
    cfg = tiny("SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0)
    cfg.SOLVER.BASE_LR = 1.0
    moves = {}
    for kind in ("full_model", "norm", "value"):
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
        model = nn.Linear(2, 1)
        before = model.weight.detach().clone(), model.bias.detach().clone()
        model.weight.grad, model.bias.grad = torch.tensor([[30.0, 0.0]]), torch.tensor([40.0])
        build_optimizer(cfg, model).step()
        moves[kind] = [
            (b - p).abs().sum().item() for b, p in zip(before, model.parameters(), strict=True)
        ]
    assert moves["full_model"] == pytest.approx([0.6, 0.8], rel=1e-4)
    assert moves["norm"] == pytest.approx([1.0, 1.0], rel=1e-4)
    assert moves["value"] == pytest.approx([1.0, 1.0], rel=1e-4)


@pytest.mark.parametrize("name", ["WarmupCosineLR", "WarmupMultiStepLR"])
def test_schedules(packaged, name):
    more = ["SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.MAX_ITER", 10, "SOLVER.WARMUP_ITERS", 2]
    more += ["SOLVER.STEPS", (5, 8), "SOLVER.BASE_LR", 1.0, "SOLVER.WARMUP_FACTOR", 0.0]
    cfg = packaged(*more, "SOLVER.OPTIMIZER", "SGD")
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    if name == "WarmupCosineLR":
        wanted = [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
        warm = wanted[2] / 2  # to the cosine at the end of the warm-up
    else:
        wanted = [1.0] * 5 + [0.1] * 3 + [0.01] * 2
        warm = 0.5
    assert rates == pytest.approx([0.0, warm, *wanted[2:]])
