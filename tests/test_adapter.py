import copy
import dataclasses
import importlib.util
import json
import os
import shutil
import warnings

import pytest
import safetensors.torch
import torch

from e3va import (
    Backbone,
    E3VABackbone,
    HighwayConfig,
    build_backbone,
    load_adapter,
    load_trunk,
    open_backbone,
    save_adapter,
    save_trunk,
    trunk_config,
)
from e3va.methods import METHODS
from e3va.trunks import FrozenSwin, SwinConfig
from tests import libraries

CONFIG = SwinConfig(16, (2, 2), (1, 2), window_size=4)
HIGHWAY = HighwayConfig(branches=1, kernel_dim=4)


@pytest.fixture
def trunk():
    trunk = FrozenSwin(CONFIG)
    libraries.randomise(trunk)
    return trunk


@pytest.fixture
def trained(trunk):
    """A backbone whose every trained tensor has moved."""
    backbone = E3VABackbone(trunk, HIGHWAY)
    libraries.randomise(backbone.highway)
    libraries.randomise(backbone.norms)
    return backbone


@pytest.fixture
def saved(trained, tmp_path):
    save_adapter(trained, tmp_path / "adapter")
    return tmp_path / "adapter"


def fresh(trunk, highway=HIGHWAY):
    return E3VABackbone(copy.deepcopy(trunk), highway)


def edit(directory, change):
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def assert_refuses(backbone, directory, error, match):
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(error, match=match):
        load_adapter(backbone, directory)
    after = backbone.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_round_trip(trained, saved, trunk):
    assert sorted(os.listdir(saved)) == ["adapter_config.json", "adapter_model.safetensors"]
    backbone = fresh(trunk)
    image = torch.randn(1, 3, 37, 50)
    expected = trained(image)
    assert not torch.equal(backbone(image)["p1"], expected["p1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(backbone, saved)
    assert all(torch.equal(p, expected[name]) for name, p in backbone(image).items())
    assert all(parameter.requires_grad for parameter in backbone.highway.parameters())


def test_the_config_says_what_the_adapter_belongs_to(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["trunk"].pop("weight_hash")
    assert config.pop("e3va_version")
    assert config == {
        "method": "e3va",
        "trunk": {
            "family": "swin",
            "dtype": "float32",
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [1, 2],
            "window_size": 4,
            "mlp_ratio": 4.0,
        },
        "options": {
            "branches": 1,
            "kernel_dim": 4,
            "hidden_ratio": 0.5,
            "tap": "norm",
            "mixing": 3,
            "state": True,
            "storage": "int4",
        },
    }


def test_a_backbone_that_tells_no_method_is_refused(trunk, tmp_path):
    with pytest.raises(TypeError, match=r"build_backbone has built, .* got a Backbone"):
        save_adapter(Backbone(trunk), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


NEEDS_PEFT = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="PEFT is missing")
EACH = [pytest.param(m, marks=NEEDS_PEFT) if m == "lora" else m for m in METHODS]


@pytest.mark.parametrize("method", EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_method_is_rebuilt_from_its_adapter_alone(method, dtype, trunk, tmp_path):
    dtype = torch.float32 if method == "full" else dtype
    options = {"lora": {"rank": 3}, "adapter": {"hidden": 5}, "lorand": {"kernel_dim": 2}}
    options |= {"mona": {"hidden": 6}, "adaptformer": {"hidden": 7}}
    options |= {m: {"branches": 1, "kernel_dim": 4} for m in ("e3va", "e3va_paper")}
    save_trunk(trunk, tmp_path / "trunk.safetensors")
    backbone = build_backbone(method, CONFIG, dtype=dtype, **options.get(method, {}))
    load_trunk(backbone.trunk, tmp_path / "trunk.safetensors")
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(backbone, tmp_path / "adapter")
    saved = safetensors.torch.load_file(tmp_path / "adapter/adapter_model.safetensors")
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained <= saved.keys()
    untrained = {name for name in saved if name.startswith("trunk.")} - trained
    assert not untrained

    again = open_backbone(tmp_path / "adapter", tmp_path / "trunk.safetensors").eval()
    assert type(again) is type(backbone) and again.method == backbone.method
    state = again.state_dict()
    assert state.keys() == backbone.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    image = torch.randn(1, 3, 37, 50)
    ours, theirs = again(image), backbone.eval()(image)
    assert all(torch.equal(ours[name], p) for name, p in theirs.items())
    if method == "full":
        return
    libraries.randomise(trunk)
    save_trunk(trunk, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="trained over a trunk whose weights have the hash"):
        open_backbone(tmp_path / "adapter", tmp_path / "other.safetensors")


def test_an_adapter_of_another_method_is_refused(saved, trunk, tmp_path):
    save_trunk(trunk, tmp_path / "trunk.safetensors")
    backbone = build_backbone("mona", CONFIG)
    load_trunk(backbone.trunk, tmp_path / "trunk.safetensors")
    assert_refuses(backbone, saved, ValueError, "tuned by 'e3va', this one is tuned by 'mona'")


@pytest.mark.parametrize(
    "change",
    [{"method": "dtl"}, {"method": None}, {"options": {"branches": "two"}}],
    ids=str,
)
@pytest.mark.parametrize("trunk_change", [{}, {"family": "vit"}, {"dtype": "plain"}], ids=str)
def test_a_config_that_describes_no_backbone(change, trunk_change, saved, tmp_path):
    def spoil(config):
        config |= change
        config["trunk"] |= trunk_change

    edit(saved, spoil)
    with pytest.raises(ValueError, match=r"adapter_config\.json describes no backbone"):
        open_backbone(saved, tmp_path / "trunk.safetensors")


def test_swin_b_takes_a_few_megabytes(tmp_path):
    with torch.device("meta"):  # whose weights need no initialisation here
        trunk = FrozenSwin(trunk_config("swin_b"), torch.bfloat16)
    trunk.to_empty(device="cpu").weight_hash.fill_(1)
    backbone = E3VABackbone(trunk)
    save_adapter(backbone, tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert 4 * trained < size < 4 * trained + 10_000
    assert size < 5e6


def test_fits_a_trunk_stored_in_another_dtype(trained, trunk, tmp_path):
    save_trunk(trunk, tmp_path / "swin.safetensors")
    load_trunk(trained.trunk, tmp_path / "swin.safetensors")
    save_adapter(trained, tmp_path / "adapter")
    half = FrozenSwin(CONFIG, torch.bfloat16)
    load_trunk(half, tmp_path / "swin.safetensors")
    backbone = E3VABackbone(half, HIGHWAY)
    load_adapter(backbone, tmp_path / "adapter")
    assert torch.equal(backbone.highway.stages[1].V, trained.highway.stages[1].V)


def test_refuses_a_trunk_with_other_weights(saved, trunk):
    with torch.no_grad():
        trunk.patch_embed.proj.bias[0] += 1
    assert_refuses(fresh(trunk), saved, ValueError, "trained over a trunk whose weights have")


def test_refuses_a_trunk_of_another_architecture(saved):
    trunk = FrozenSwin(SwinConfig(16, (2, 2), (1, 2), window_size=5))
    assert_refuses(fresh(trunk), saved, ValueError, r"trunk\.window_size is 4, here 5")


def test_refuses_a_highway_of_another_shape(saved, trunk):
    other = HighwayConfig(branches=2, kernel_dim=4, hidden_ratio=0.25)
    match = r"options\.branches is 1, here 2; options\.hidden_ratio is 0\.5, here 0\.25"
    assert_refuses(fresh(trunk, other), saved, ValueError, match)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_names_a_missing_file(name, saved, trunk):
    (saved / name).unlink()
    assert_refuses(fresh(trunk), saved, FileNotFoundError, f"{saved / name} is missing")
    shutil.rmtree(saved)
    assert_refuses(fresh(trunk), saved, FileNotFoundError, f"no adapter at {saved}")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xff"])
def test_names_a_damaged_file(name, content, saved, trunk):
    (saved / name).write_bytes(content)
    assert_refuses(fresh(trunk), saved, ValueError, f"{saved / name} is damaged")


@pytest.mark.parametrize("content", ["[]", "{}", '{"trunk": {}}', '{"trunk": 1, "highway": {}}'])
def test_says_that_a_config_is_no_adapters(content, saved, trunk):
    (saved / "adapter_config.json").write_text(content)
    assert_refuses(fresh(trunk), saved, ValueError, "is no adapter's config")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tap="output"), "options.tap is norm, here output"),
        (dict(mixing=5), "options.mixing is 3, here 5"),
        (dict(state=False), "options.state is True, here False"),
    ],
)
def test_refuses_a_highway_of_another_form(change, message, saved, trunk):
    other = dataclasses.replace(HIGHWAY, **change)
    assert_refuses(fresh(trunk, other), saved, ValueError, message)


def test_an_adapter_that_tells_no_form_is_of_the_published_one(trunk, tmp_path):
    backbone = fresh(trunk, HIGHWAY.published())
    libraries.randomise(backbone.highway)
    save_adapter(backbone, tmp_path)

    def forget(config):
        """As the first adapters were written."""
        del config["method"]
        config["highway"] = config.pop("options")
        for key in ("tap", "mixing", "state", "storage"):
            del config["highway"][key]
        for key in ("family", "dtype"):
            del config["trunk"][key]

    edit(tmp_path, forget)
    path = tmp_path / "adapter_model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["highway.form"]
    safetensors.torch.save_file(state, path)
    again = fresh(trunk, HIGHWAY.published())
    load_adapter(again, tmp_path)
    assert torch.equal(again.highway.stages[0].P, backbone.highway.stages[0].P)
    assert_refuses(fresh(trunk), tmp_path, ValueError, "options.tap is output, here norm")


def test_refuses_weights_of_another_adapter(saved, trunk, tmp_path):
    other = E3VABackbone(trunk, HighwayConfig(branches=1, kernel_dim=2))
    save_adapter(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", saved)
    match = r"does not belong to its adapter_config\.json: \d+ tensors"
    assert_refuses(fresh(trunk), saved, ValueError, match)


def test_ignores_newer_keys_with_a_warning(saved, trained, trunk):
    def newer(config):
        config |= {"e3va_version": "9.0", "task": "detection"}
        config["options"]["taps"] = "int4"

    edit(saved, newer)
    backbone = fresh(trunk)
    with pytest.warns(UserWarning, match=r"e3va 9\.0; ignoring .*: task, options\.taps"):
        load_adapter(backbone, saved)
    assert torch.equal(backbone.highway.stages[0].V, trained.highway.stages[0].V)


def test_a_failed_save_leaves_the_old_files(saved, trained, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full_disk(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(trained, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_numbers_that_are_not_finite_are_refused(saved, trunk):
    file = saved / "adapter_model.safetensors"
    state = safetensors.torch.load_file(file)
    name = next(name for name in state if name.endswith(".P"))
    state[name][0] = torch.inf
    safetensors.torch.save_file(state, file)
    assert_refuses(fresh(trunk), saved, ValueError, f"{file} holds numbers that are not finite")
