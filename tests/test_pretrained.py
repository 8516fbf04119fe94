"""The trunk that ships with the package knows digits that it was not trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

pytest.importorskip("sklearn", reason="the demo needs scikit-learn: pip install 'e3va[demo]'")

from e3va import FrozenSwin, load_trunk, swin_config
from e3va.demo import pretrain
from e3va.demo.digits import digit_pool
from e3va.demo.engines import WEIGHTS


def test_packaged_trunk():
    assert WEIGHTS.stat().st_size <= 6 * 2**20
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["command"].startswith("python -m e3va.demo.pretrain")
    trunk = FrozenSwin(swin_config("swin_digits"))
    load_trunk(trunk, WEIGHTS)
    assert trunk.weight_hash.any()


@torch.no_grad()
def test_its_features_tell_digits_apart():
    """A nearest-mean classifier on its last map, fitted on the training scenes' digits and tried on
    the validation scenes', neither of which it has seen; chance is 10 %."""
    trunk = FrozenSwin(swin_config("swin_digits"))
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
    trunk = FrozenSwin(swin_config("swin_digits"))
    load_trunk(trunk, output)
    assert "held-out digits" in capsys.readouterr().out
