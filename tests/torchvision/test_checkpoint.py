"""Checkpoints of detectors."""

import pytest
import torch

from e3va.methods import METHODS
from tests.torchvision.conftest import SMALL_HEADS, detector

pytest.importorskip("torchvision")

from e3va.torchvision.checkpoint import load_checkpoint, save_checkpoint


@pytest.mark.parametrize("kind", SMALL_HEADS)
def test_checkpoint_leaves_out_the_frozen_trunk_and_refuses_another(kind, tmp_path):
    model, path = detector(kind=kind), tmp_path / "checkpoint.pt"
    save_checkpoint(path, model, iteration=3)
    content = torch.load(path, weights_only=True)
    assert not any("trunk" in name for name in content["model"])
    assert any("highway" in name for name in content["model"])
    other = detector(kind=kind, seed=5)
    assert load_checkpoint(path, other) == {"iteration": 3}
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="frozen trunk"):
        load_checkpoint(path, detector(kind=kind, trunk_seed=1))
    with pytest.raises(ValueError, match="frozen trunk"):
        load_checkpoint(path, detector("full", kind))
    with pytest.raises(ValueError, match="another model"):
        load_checkpoint(path, detector(kind=kind, out_channels=32))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_checkpoint(tmp_path / "nowhere.pt", model)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_every_methods_checkpoint_holds_what_it_trains_and_knows_its_trunk(method, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    model, path = detector(method), tmp_path / "checkpoint.pt"
    save_checkpoint(path, model)
    saved = set(torch.load(path, weights_only=True)["model"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= saved
    assert {name for name in saved if ".body.trunk." in name} <= trained
    other = detector(method, seed=5)
    load_checkpoint(path, other)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="was trained over the frozen trunk"):
        load_checkpoint(path, detector(method, trunk_seed=1))


def test_full_checkpoint_holds_the_trunk(tmp_path):
    model = detector("full")
    save_checkpoint(tmp_path / "checkpoint.pt", model)
    other = detector("full", trunk_seed=1)
    load_checkpoint(tmp_path / "checkpoint.pt", other)
    trunks = (m.backbone.body.trunk.parameters() for m in (model, other))
    for a, b in zip(*trunks, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("content", ["empty", "garbage", "foreign", "cut"])
def test_foreign_checkpoints_are_named(tmp_path, content):
    path, model = tmp_path / "checkpoint.pt", detector()
    if content == "foreign":
        torch.save({"weights": torch.zeros(2)}, path)
    else:
        save_checkpoint(path, model)
        cut = path.read_bytes()[:20_000]
        path.write_bytes({"empty": b"", "garbage": b"garbage", "cut": cut}[content])
    what = "no checkpoint" if content == "foreign" else "damaged"
    with pytest.raises(ValueError, match=rf"checkpoint\.pt is {what}"):
        load_checkpoint(path, model)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path, model = tmp_path / "checkpoint.pt", detector()
    save_checkpoint(path, model)
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["model"] if name.endswith(".P"))
    content["model"][name][0] = torch.nan
    torch.save(content, path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{path} holds numbers that are not finite: {name}"):
        load_checkpoint(path, model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
