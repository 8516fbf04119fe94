"""Which of a detector's parameters decay, and which learn faster."""

import pytest

import e3va
from e3va.optim import Rates, parameter_groups
from tests.torchvision.conftest import TINY, detector

pytest.importorskip("torchvision")


def test_norms_biases_and_tables_do_not_decay():
    model = detector("full")
    model.highway = e3va.Highway(TINY, e3va.HighwayConfig(1, 4))
    frozen = next(model.backbone.body.norms[0].parameters()).requires_grad_(False)
    decay, rest = parameter_groups(model, Rates(1e-3, 0.1))
    if rest["weight_decay"]:
        decay, rest = rest, decay
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decaying = {names[id(p)].rpartition(".")[2] for p in decay["params"]}
    assert decaying == {"weight", "P", "D", "g", "Q", "U", "g_up", "V"}
    assert {names[id(p)].rpartition(".")[2] for p in rest["params"]} == {
        "weight", "bias", "gamma", "b", "c", "relative_position_bias_table"
    }  # fmt: skip
    grouped = [id(p) for p in (*decay["params"], *rest["params"])]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p is not frozen)
    with pytest.raises(ValueError, match="no trainable"):
        parameter_groups(e3va.FrozenSwin(TINY), Rates(1e-3, 0.1))


def test_the_highway_may_learn_faster():
    model = detector("e3va")
    groups = parameter_groups(model, Rates(1e-3, 0.1, highway_lr_factor=2, highway_lr_ratio=5))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = (10 if name.endswith((".V", ".c")) else 2) if ".highway." in name else 1
            assert rates[id(parameter)] == pytest.approx(factor * 1e-3)
