import sys

import pytest
import torch
from torch import nn

from bench import precision as bench
from e3va import build_backbone, load_adapter, quantize_trunk, save_adapter, trunk_config
from e3va.measure import LiveBytes
from e3va.measure.live import bytes_of
from e3va.precision import PRECISIONS
from e3va.trunks import FrozenSwin, Swin, base
from tests.oracles import relative_error

pytest.importorskip("torchao", reason="torchao is missing: quantised trunks are left untested")

CONFIG = trunk_config("swin_digits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision, error", [("int8", 0.05), ("fp8", 0.08)])
def test_features_stay_near(precision, error, dtype):
    trunk, image = FrozenSwin(CONFIG, dtype), torch.randn(2, 3, 53, 70)
    exact = trunk(image)
    quantize_trunk(trunk, precision)
    for ours, theirs in zip(trunk(image), exact, strict=True):
        assert ours.dtype == dtype
        assert 1e-4 < relative_error(ours, theirs) < error


@pytest.mark.parametrize("precision", PRECISIONS)
def test_trains_beside_it_and_keeps_its_name(precision, tmp_path):
    torch.manual_seed(0)
    plain = build_backbone("e3va", CONFIG)
    torch.manual_seed(0)
    backbone = build_backbone("e3va", CONFIG)
    quantize_trunk(backbone.trunk, precision)
    torch.nn.init.normal_(backbone.highway.stages[0].V)
    maps = backbone(torch.randn(1, 3, 40, 64))
    sum(p.square().mean() for p in maps.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("trunk.")), name
    # An adapter goes between the two: they are of the same weights.
    save_adapter(backbone, tmp_path)
    load_adapter(plain, tmp_path)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_large_maps_are_computed_in_parts(precision, monkeypatch):
    """What they are at once, to the last bit where the products are of whole numbers, and in less
    memory where torchao's copies are in 32 bits."""
    trunk, image = FrozenSwin(CONFIG, torch.bfloat16), torch.randn(2, 3, 131, 203)
    quantize_trunk(trunk, precision)
    found = []
    for values in (2**40, 1000, 1):
        monkeypatch.setattr(base, "QUANTISED_VALUES", values)
        with LiveBytes() as memory:
            maps = trunk(image) if values > 1 else trunk(image[..., :9, :9])
        found.append((maps, memory.peak))
    (whole, peak), (parts, less), (one_by_one, _) = found
    slack = 0.0 if precision == "int8" else 1e-2
    assert all(relative_error(a, b) <= slack for a, b in zip(parts, whole, strict=True))
    assert less < (0.6 if precision == "int8" else 1.1) * peak
    monkeypatch.setattr(base, "QUANTISED_VALUES", 2**40)
    few = trunk(image[..., :9, :9])
    assert all(relative_error(a, b) <= slack for a, b in zip(one_by_one, few, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_of_quantised_weights(precision):
    """A byte for a value, and a scale of 32 bits for an output; int8 has a little beside them."""
    trunk = FrozenSwin(CONFIG)
    before = bytes_of(trunk.parameters())
    layers = [m for n, m in trunk.named_modules() if "blocks" in n and isinstance(m, nn.Linear)]
    values, outputs = sum(m.weight.numel() for m in layers), sum(m.out_features for m in layers)
    quantize_trunk(trunk, precision)
    assert bytes_of(trunk.parameters()) == pytest.approx(
        before - 3 * values + 4 * outputs, rel=5e-3
    )


def test_weights_come_before(tmp_path):
    trunk = FrozenSwin(CONFIG)
    weights = trunk.state_dict()
    quantize_trunk(trunk, "int8")
    with pytest.raises(RuntimeError, match="quantised to int8: load them before"):
        trunk.load_state_dict(weights)
    with pytest.raises(ValueError, match="quantised already, to int8"):
        quantize_trunk(trunk, "fp8")


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="precision must be one of int8, fp8, got 'int2'"):
        quantize_trunk(FrozenSwin(CONFIG), "int2")
    with pytest.raises(TypeError, match="only a frozen trunk can be quantised, got a Swin"):
        quantize_trunk(Swin(CONFIG), "int8")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        quantize_trunk(FrozenSwin(CONFIG), "int8")


def test_bench_on_real_images(real_data):
    report = bench.main(["--images", str(real_data / "nuclei/images"), "--limit", "2"])
    for name, errors in report["feature_error"].items():
        assert all(0 < error < 0.2 for error in errors), name
