"""Checkpoints never run code, leave the frozen trunk out, and are loaded over no other."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.modeling import build_model
from torch import nn

from e3va import trunk_config
from e3va.detectron2 import SafeCheckpointer, Trainer
from e3va.trunks import FrozenSwin
from e3va.weights import save_trunk, trunk_hash
from tests import libraries
from tests.detectron2.factories import PACKAGED, assert_same, read, state, train


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["bomb.pth", "bomb.pkl"])
def test_checkpoints_never_run_code(tmp_path, name):
    data = {"model": {"weight": Bomb(tmp_path / "ran")}}
    if name.endswith(".pth"):
        torch.save(data, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(data))
    with pytest.raises(Exception, match=r"mkdir"):
        SafeCheckpointer(nn.Linear(1, 1)).load(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 7, 20_000, 500_000])
def test_a_damaged_checkpoint_is_named(tmp_path, size):
    path = tmp_path / "model_final.pth"
    torch.save({"model": {"weight": torch.zeros(500, 500)}}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model_final\.pth is damaged"):
        SafeCheckpointer(nn.Linear(1, 1)).load(str(path))


def test_checkpoint_of_safetensors(tmp_path):
    model = nn.Linear(3, 2)
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "w.safetensors")
    SafeCheckpointer(model).load(str(tmp_path / "w.safetensors"))
    assert torch.equal(model.weight, torch.ones(2, 3))


TRUNK = "backbone.bottom_up.net.trunk."


def as_before(state):
    """With the names of before, however deep."""
    if isinstance(state, str):
        return state.replace("bottom_up.net.", "bottom_up.swin.")
    if isinstance(state, dict):
        return type(state)((as_before(name), as_before(value)) for name, value in state.items())
    return list(map(as_before, state)) if isinstance(state, list) else state


def test_names_of_before_are_understood(tmp_path, packaged, caplog):
    """In the weights, in their average and of the optimizer, so that a training goes on."""
    cfg = packaged("SOLVER.MAX_ITER", 2, "SOLVER.EMA.DECAY", 0.9)
    trainer = train(cfg)
    path = tmp_path / "out/model_final.pth"
    saved = read(path)
    before = as_before(saved)
    assert all(before[key].keys() != saved[key].keys() for key in ("model", "ema"))
    assert before["trainer"]["trained"] != saved["trainer"]["trained"]
    torch.save(before, path)
    other = Trainer(cfg)
    other.resume_or_load(resume=True)
    assert_same(state(other.model), state(trainer.model))
    assert_same(other.average.state_dict(), trainer.average.state_dict())
    assert_same(other.optimizer.state_dict(), trainer.optimizer.state_dict())
    assert "starts afresh" not in caplog.text


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_of_a_bare_backbone_before(tmp_path, suffix):
    """As a segmentor has it, without an FPN."""
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"net": nn.Linear(3, 2, bias=False)})})
    path, state = tmp_path / f"weights{suffix}", {"backbone.swin.weight": torch.ones(2, 3)}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    SafeCheckpointer(model).load(str(path))
    assert torch.equal(model["backbone"]["net"].weight, torch.ones(2, 3))


@pytest.mark.parametrize("method", ["e3va", "frozen"])
def test_checkpoints_leave_the_frozen_trunk_out(tmp_path, packaged, method):
    trainer = train(packaged("MODEL.TUNING.METHOD", method, "SOLVER.MAX_ITER", 1))
    saved = read(tmp_path / "out/model_final.pth")
    model = trainer.model.state_dict()
    assert saved["model"].keys() == {name for name in model if not name.startswith(TRUNK)}
    trunk = trainer.model.backbone.bottom_up.net.trunk
    assert saved["trunk"] == {"hash": trunk_hash(trunk), "source": PACKAGED}

    other = Trainer(packaged("MODEL.TUNING.METHOD", method))
    other.checkpointer.load(str(tmp_path / "out/model_final.pth"), checkpointables=[])
    assert_same(dict(other.model.state_dict()), dict(model))


def test_full_tuning_keeps_everything(tmp_path, packaged):
    trainer = train(packaged("MODEL.TUNING.METHOD", "full", "SOLVER.MAX_ITER", 1))
    saved = read(tmp_path / "out/model_final.pth")
    assert_same(dict(saved["model"]), dict(trainer.model.state_dict()))
    assert "trunk" not in saved


def test_a_trunk_that_no_file_brings_is_kept(tmp_path, packaged):
    """Random weights, and those of a full checkpoint that are not those of MODEL.TRUNK.WEIGHTS."""
    random = Trainer(packaged("MODEL.TRUNK.WEIGHTS", ""))
    random.checkpointer.save("random")
    saved = read(tmp_path / "out/random.pth")
    assert_same(dict(saved["model"]), dict(random.model.state_dict()))
    assert "trunk" not in saved

    trainer = Trainer(packaged())
    trainer.checkpointer.load(str(tmp_path / "out/random.pth"), checkpointables=[])
    assert_same(dict(trainer.model.state_dict()), dict(random.model.state_dict()))
    trainer.checkpointer.save("again")
    assert_same(dict(read(tmp_path / "out/again.pth")["model"]), dict(saved["model"]))


def test_a_trunk_that_timm_brings(tmp_path, packaged, monkeypatch):
    """Its checkpoints name it as the config does, and know its weights in whatever file."""
    timm = pytest.importorskip("timm")
    swin = libraries.build("timm", trunk_config("swin_digits"), (224, 224))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: swin)
    trainer = Trainer(packaged("MODEL.TRUNK.WEIGHTS", "timm:swin_mine"))
    trainer.checkpointer.save("mine")
    trunk = trainer.model.backbone.bottom_up.net.trunk
    path = tmp_path / "out/mine.pth"
    assert read(path)["trunk"] == {"hash": trunk_hash(trunk), "source": "timm:swin_mine"}

    save_file(swin.state_dict(), tmp_path / "mine.safetensors")
    for weights in ("timm:swin_mine", tmp_path / "mine.safetensors"):
        other = Trainer(packaged("MODEL.TRUNK.WEIGHTS", weights))
        other.checkpointer.load(str(path), checkpointables=[])
        assert_same(state(other.model), state(trainer.model))
    with pytest.raises(ValueError, match=r"set MODEL.TRUNK.WEIGHTS to .* timm:swin_mine"):
        Trainer(packaged()).checkpointer.load(str(path))


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path, packaged, monkeypatch):
    trainer = Trainer(packaged())
    trainer.checkpointer.save("mine")
    before = (tmp_path / "out/mine.pth").read_bytes()

    def crash(data, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(torch, "save", crash)
        trainer.checkpointer.save("mine")
    assert (tmp_path / "out/mine.pth").read_bytes() == before
    assert trainer.checkpointer.get_checkpoint_file() == str(tmp_path / "out/mine.pth")
    trainer.checkpointer.save("mine")
    assert {f.name for f in (tmp_path / "out").glob("*mine*")} == {"mine.pth"}


def test_a_checkpoint_over_another_trunk(tmp_path, packaged):
    trainer = Trainer(packaged())
    trainer.checkpointer.save("mine")
    config = trainer.model.backbone.bottom_up.net.trunk.config
    save_trunk(FrozenSwin(config), tmp_path / "other.safetensors")
    for method in ("e3va", "full"):
        for weights in ("", tmp_path / "other.safetensors"):
            other = Trainer(packaged("MODEL.TRUNK.WEIGHTS", weights, "MODEL.TUNING.METHOD", method))
            before = state(other.model)
            with pytest.raises(
                ValueError, match=r"frozen trunk .*: set MODEL.TRUNK.WEIGHTS to .*e3va://"
            ):
                other.checkpointer.load(str(tmp_path / "out/mine.pth"))
            assert_same(before, state(other.model))
    SafeCheckpointer(Trainer(packaged("MODEL.TUNING.METHOD", "full")).model).load(
        str(tmp_path / "out/mine.pth")
    )


def test_a_trunk_trained_in_part(tmp_path, packaged):
    """Its trained weights are saved, and what is frozen stays where it came from."""

    def biases_alone():
        model = build_model(packaged("MODEL.TUNING.METHOD", "full"))
        trunk = model.backbone.bottom_up.net.trunk
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        (tmp_path / "out").mkdir(exist_ok=True)
        return model, SafeCheckpointer(model, str(tmp_path / "out"), trunk_source=PACKAGED)

    model, checkpointer = biases_alone()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    checkpointer.save("biases")
    trunk = [n for n in read(tmp_path / "out/biases.pth")["model"] if n.startswith(TRUNK)]
    assert trunk
    assert all(name.endswith("bias") for name in trunk)

    other, checkpointer = biases_alone()
    checkpointer.load(str(tmp_path / "out/biases.pth"))
    assert_same(state(other), state(model))
    frozen = Trainer(packaged())
    frozen.checkpointer.load(str(tmp_path / "out/biases.pth"), checkpointables=[])
    frozen.checkpointer.save("with its own trunk")
    assert [n for n in read(tmp_path / "out/with its own trunk.pth")["model"] if TRUNK in n]
