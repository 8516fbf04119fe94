"""Which of a detector's parameters decay, and which learn faster."""

import pytest
import torch

import e3va
from e3va import optim
from e3va.measure import LiveBytes
from e3va.optim import Rates, parameter_groups, stepping
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
        parameter_groups(e3va.trunks.FrozenSwin(TINY), Rates(1e-3, 0.1))


def test_the_highway_may_learn_faster():
    model = detector("e3va")
    groups = parameter_groups(model, Rates(1e-3, 0.1, highway_lr_factor=2, highway_lr_ratio=5))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = (10 if name.endswith((".V", ".c")) else 2) if ".highway." in name else 1
            assert rates[id(parameter)] == pytest.approx(factor * 1e-3)


@pytest.mark.parametrize("ready", [0, 1000, 2**24])
def test_stepping_within_the_backward_is_a_step_after_it(ready, monkeypatch):
    """To the last bit, over steps, a weight used twice and one not at all among them; and most of
    the gradients are never there at once."""
    monkeypatch.setattr(optim, "READY", ready)
    results = []
    for early in (True, False):
        torch.manual_seed(0)
        layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(9))
        adamw = torch.optim.AdamW(layers.parameters(), lr=0.1)
        for _ in range(3):
            x = torch.randn(4, 16)
            for layer in (*layers[:-1], layers[2]):
                x = layer(x).tanh()
            with LiveBytes() as memory:
                if early:
                    with stepping(adamw):
                        x.square().sum().backward()
                else:
                    x.square().sum().backward()
                    adamw.step()
                    adamw.zero_grad()
            assert all(p.grad is None for p in layers.parameters())
        results.append((layers.state_dict(), adamw.state_dict()["state"], memory.peak))
    (ours, state, peak), (theirs, their_state, their_peak) = results
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert state.keys() == their_state.keys()
    for key, values in their_state.items():
        assert all(torch.equal(state[key][name], value) for name, value in values.items())
    assert peak < their_peak / 2 or ready > 1000


def test_stepping_ends_with_a_backward_that_fails():
    parameter = torch.nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([parameter], lr=1.0)
    with pytest.raises(RuntimeError, match="halfway"), stepping(sgd):
        raise RuntimeError("halfway")
    parameter.sum().backward()  # no hook is left
    assert torch.equal(parameter, torch.ones(2)) and torch.equal(parameter.grad, torch.ones(2))
