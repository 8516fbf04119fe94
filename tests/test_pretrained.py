"""The trunk that ships with the package knows digits that it was not trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

pytest.importorskip("sklearn", reason="the demo needs scikit-learn: pip install 'e3va[demo]'")

from e3va import E3VABackbone, HighwayConfig, load_trunk, trunk_config
from e3va.demo import pretrain
from e3va.demo.digits import digit_pool
from e3va.demo.engines import WEIGHTS
from e3va.trunks import FrozenSwin


def test_packaged_trunk():
    assert WEIGHTS.stat().st_size <= 6 * 2**20
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["command"].startswith("python -m e3va.demo.pretrain")
    trunk = FrozenSwin(trunk_config("swin_digits"))
    load_trunk(trunk, WEIGHTS)
    assert trunk.weight_hash.any()


@torch.no_grad()
def test_its_features_tell_digits_apart():
    """A nearest-mean classifier on its last map, fitted on the training scenes' digits and tried on
    the validation scenes', neither of which it has seen; chance is 10 %."""
    trunk = FrozenSwin(trunk_config("swin_digits"))
    load_trunk(trunk, WEIGHTS)

    def features(pool, seed):
        image, label, _ = pretrain.sample(*digit_pool(pool), 400, 24, np.random.default_rng(seed))
        last = trunk(image)[-1].mean((1, 2))
        return (last - last.mean(0)) / last.std(0), label

    x, label = features("train", 0)
    means = torch.stack([x[label == digit].mean(0) for digit in range(10)])
    x, label = features("val", 1)
    accuracy = (torch.cdist(x, means).argmin(1) == label).float().mean()
    assert accuracy > 0.5


def test_pretraining_runs(tmp_path: Path, capsys):
    output = tmp_path / "trunk.safetensors"
    pretrain.main(["--output", str(output), "--iterations", "2", "--batch-size", "2"])
    trunk = FrozenSwin(trunk_config("swin_digits"))
    load_trunk(trunk, output)
    assert "held-out digits" in capsys.readouterr().out


def gradients_of_P(taps, runs):
    """P's gradients of all stages, flat, for each of the runs: the loss is a fixed random
    projection of the features, on digits."""
    trunk = FrozenSwin(trunk_config("swin_digits"))
    load_trunk(trunk, WEIGHTS)
    torch.manual_seed(0)
    config = HighwayConfig(kernel_dim=16, hidden_ratio=1.0, storage=taps)
    backbone = E3VABackbone(trunk, config)
    for stage in backbone.highway.stages:
        torch.nn.init.normal_(stage.V, std=0.1)
    image = pretrain.sample(*digit_pool("train"), 4, 24, np.random.default_rng(0))[0]
    features = backbone(image)
    torch.manual_seed(0)  # int4 has drawn a seed
    weights = {name: torch.randn_like(p) for name, p in features.items()}
    parameters = [stage.P for stage in backbone.highway.stages]
    found = []
    for seed in range(runs):
        torch.manual_seed(seed)
        loss = sum((p * weights[name]).sum() for name, p in backbone(image).items())
        gradients = torch.autograd.grad(loss, parameters)
        found.append(torch.cat([g.flatten() for g in gradients]).double())
    return torch.stack(found)


def test_int4_taps_leave_the_gradient_unbiased():
    """On the trunk's real activations: the gradient of P deviates from the exact one by an eighth
    of its norm from step to step (12 % measured), and on average by the rounding of u to eight bits
    alone."""
    runs = 32
    (exact,), found = gradients_of_P("full", 1), gradients_of_P("int4", runs)
    deviation = (found - exact).norm(dim=1).mean() / exact.norm()
    assert 0.05 < deviation < 0.3
    bias = (found.mean(0) - exact).norm() / exact.norm()
    assert bias < 1.2 * deviation / runs**0.5 + 0.005


@pytest.mark.parametrize("taps, limit", [("fp8", 0.03), ("int8", 0.01)])
def test_eight_bit_taps_hardly_change_the_gradient(taps, limit):
    (exact,), (found,) = gradients_of_P("full", 1), gradients_of_P(taps, 1)
    assert 1e-5 < (found - exact).norm() / exact.norm() < limit
