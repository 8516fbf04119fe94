"""Which of a detector's parameters decay, and which learn faster."""

import sys
from functools import partial

import pytest
import torch

import e3va
from e3va import optim
from e3va.measure import LiveBytes
from e3va.optim import Rates, parameter_groups, stepping
from tests.ops.backends import DEVICES
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["default", "fused", "eight bits"])
@pytest.mark.parametrize("ready", [0, 1000, 2**24])
def test_stepping_within_the_backward_is_a_step_after_it(ready, kind, device, monkeypatch):
    """To the last bit, over steps, a weight used twice and one not at all among them; and most of
    the gradients are never there at once."""
    monkeypatch.setattr(optim, "READY", ready)
    if kind == "eight bits":
        pytest.importorskip("bitsandbytes", reason=EIGHT)
        make = partial(optim.adamw8bit(), min_8bit_size=256)
    else:
        make = partial(torch.optim.AdamW, fused=kind == "fused")
    results = []
    for early in (True, False):
        torch.manual_seed(0)
        layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(9)).to(device)
        adamw = make(layers.parameters(), lr=0.1)
        for _ in range(3):
            x = torch.randn(4, 16, device=device)
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
        state = [adamw.state.get(p, {}) for p in layers.parameters()]
        results.append((layers.state_dict(), state, memory.peak))
    (ours, state, peak), (theirs, their_state, their_peak) = results
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    for values, their_values in zip(state, their_state, strict=True):
        assert values.keys() == their_values.keys()
        for name, value in their_values.items():
            assert torch.equal(torch.as_tensor(values[name]), torch.as_tensor(value)), name
    assert peak < their_peak / 2 or ready > 1000


EIGHT = "bitsandbytes is missing: an optimizer in eight bits is left untested"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 64), (3, 4097), (5, 7, 11), (1,), (0,)])
def test_adamw_in_eight_bits_moves_as_adamw(shape, device):
    """Beside torch's, in float64: to the noise of its codes, or to float32's where a parameter is
    too small for them; and in as many bytes as are said."""
    pytest.importorskip("bitsandbytes", reason=EIGHT)
    torch.manual_seed(0)
    start = torch.randn(shape, device=device)
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.double())
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizers = optim.adamw8bit()([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(30):
        ours.grad = torch.randn(shape, device=device)
        theirs.grad = ours.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    coded = start.numel() >= optim.IN_EIGHT_BITS
    assert (ours - theirs).norm() <= (0.03 if coded else 1e-5) * moved
    assert ((ours - theirs).norm() > 1e-4 * moved) == coded
    state = optimizers[0].state[ours]
    kept = sum(state[name].nbytes for name in ("state1", "state2"))
    assert kept == optim.state_bytes(optimizers[0], ours)
    assert kept == (2 if coded else 8) * start.numel()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_bytes_of_the_state(kind):
    parameter = torch.nn.Parameter(torch.zeros(100, 50))
    optimizer = kind([parameter], lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    parameter.grad = torch.ones(100, 50)
    optimizer.step()
    state = [v for v in optimizer.state[parameter].values() if v.numel() > 1]
    assert optim.state_bytes(optimizer, parameter) == sum(v.nbytes for v in state)


def test_without_bitsandbytes_a_line_says_so(monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ImportError, match="pip install bitsandbytes"):
            optim.adamw8bit()
        assert not optim.has_adamw8bit()
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes/__init__.py").write_text("raise RuntimeError('no CUDA of theirs')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="cannot be loaded: no CUDA of theirs"):
        optim.adamw8bit()
    assert not optim.has_adamw8bit()


def test_stepping_ends_with_a_backward_that_fails():
    parameter = torch.nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([parameter], lr=1.0)
    with pytest.raises(RuntimeError, match="halfway"), stepping(sgd):
        raise RuntimeError("halfway")
    parameter.sum().backward()  # no hook is left
    assert torch.equal(parameter, torch.ones(2)) and torch.equal(parameter.grad, torch.ones(2))
