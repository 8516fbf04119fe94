import copy
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from e3va import E3VABackbone, load_trunk, open_trunk, save_trunk, trunk_config
from e3va.trunks import FrozenSwin, Swin, SwinConfig
from e3va.trunks.base import WEIGHT_HASH
from e3va.weights import check_weights, convert_weights, trunk_hash
from tests import libraries
from tests.weights.files import CONFIG, official, prefixed


def test_loads_into_a_trainable_swin(source, tmp_path):
    save_trunk(source, tmp_path / "swin.safetensors")
    swin = Swin(CONFIG)
    load_trunk(swin, tmp_path / "swin.safetensors")
    assert all(parameter.requires_grad for parameter in swin.parameters())
    assert trunk_hash(swin) == trunk_hash(source)


def test_says_which_variant_a_wrong_file_looks_like(tmp_path):
    digits = FrozenSwin(trunk_config("swin_digits", window_size=12))
    save_trunk(digits, tmp_path / "swin.safetensors")
    trunk = FrozenSwin(trunk_config("swin_t"))
    before = copy.deepcopy(trunk.state_dict())
    with pytest.raises(ValueError) as error:
        load_trunk(trunk, tmp_path / "swin.safetensors")
    message = str(error.value)
    with pytest.raises(ValueError) as early:
        check_weights(tmp_path / "swin.safetensors", trunk.config)
    assert str(early.value) == message
    check_weights(tmp_path / "swin.safetensors", digits.config)
    assert "looks like swin_digits with windows of 12" in message
    assert "the trunk is swin_t with windows of 7" in message
    assert "52 missing: layers.2.blocks.2.norm1.weight, " in message
    assert "patch_embed.proj.weight ([32, 3, 4, 4] instead of [96, 3, 4, 4])" in message
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())


def test_says_that_only_the_window_differs(source, tmp_path):
    save_trunk(source, tmp_path / "swin.safetensors")
    other = FrozenSwin(SwinConfig(16, (2, 2, 4), (1, 2, 4), window_size=5))
    with pytest.raises(ValueError) as error:
        load_trunk(other, tmp_path / "swin.safetensors")
    message = str(error.value)
    assert "and windows of 4, the trunk is a Swin of 16 channels" in message
    assert "8 of another shape: " in message and "([49, 1] instead of [81, 1])" in message
    assert "missing" not in message and "unexpected" not in message


def test_refuses_a_hash_of_another_shape(source, tmp_path):
    state = source.state_dict() | {WEIGHT_HASH: torch.ones(5, dtype=torch.uint8)}
    torch.save(state, tmp_path / "swin.pth")
    with pytest.raises(
        ValueError, match=r"1 of another shape: weight_hash \(\[5\] instead of \[32\]"
    ):
        load_trunk(FrozenSwin(CONFIG), tmp_path / "swin.pth")


def test_counts_missing_and_unexpected_keys(source, tmp_path):
    state = official(source)
    del state["layers.0.downsample.norm.weight"], state["layers.1.blocks.1.mlp.fc1.bias"]
    state["layers.0.blocks.0.attn.scale"] = torch.ones(1)
    torch.save(state, tmp_path / "swin.pth")
    with pytest.raises(ValueError) as error:
        load_trunk(FrozenSwin(CONFIG), tmp_path / "swin.pth")
    message = str(error.value)
    assert (
        "2 missing: layers.0.downsample.norm.weight, layers.1.blocks.1.mlp.fc1.bias; "
        "1 unexpected: layers.0.blocks.0.attn.scale" in message
    )


def test_incomplete_attention_of_hugging_face_is_reported():
    state = libraries.build("transformers", CONFIG).state_dict()
    del state["encoder.layers.0.blocks.0.attention.k_proj.weight"]
    name = "layers.0.blocks.0.attn.qkv."
    converted = convert_weights(state)
    assert name + "weight" not in converted and name + "bias" in converted


def test_saves_in_a_dtype_with_metadata(source, tmp_path):
    path = tmp_path / "new" / "swin.safetensors"
    save_trunk(source, path, torch.bfloat16, {"command": "python pretrain.py"})
    state = load_file(path)
    assert state.keys() == source.state_dict().keys() - {WEIGHT_HASH}
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["command"] == "python pretrain.py"
    assert SwinConfig(**json.loads(metadata["config"])) == CONFIG
    assert os.listdir(path.parent) == ["swin.safetensors"]


def test_what_a_file_would_not_hold_is_not_saved(source, tmp_path):
    path = tmp_path / "swin.safetensors"
    with pytest.raises(TypeError, match=r"dtype must be floating, got torch\.int32"):
        save_trunk(source, path, torch.int32)
    with pytest.raises(ValueError, match="metadata must not have config, format"):
        save_trunk(source, path, metadata={"config": "x", "format": "y", "z": "z"})
    large = copy.deepcopy(source)
    large.patch_embed.proj.bias.data[0] = 1e5
    for dtype in (torch.float16, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=rf"{dtype} cannot hold .*patch_embed\.proj\.bias"):
            save_trunk(large, path, dtype)
    assert not os.listdir(tmp_path)


def test_a_failed_save_leaves_the_old_file(source, tmp_path):
    path = tmp_path / "swin.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        save_trunk(source, path, metadata={"epoch": 3})  # metadata must be strings
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["swin.safetensors"]


def test_the_hash_is_that_of_the_file_whatever_the_storage(source, tmp_path):
    save_trunk(source, tmp_path / "swin.safetensors")
    hashes = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        trunk = FrozenSwin(CONFIG, dtype)
        load_trunk(trunk, tmp_path / "swin.safetensors")
        hashes.add(trunk_hash(trunk))
        again = FrozenSwin(CONFIG)  # from our own files, which carry the hash
        save_trunk(trunk, tmp_path / "again.safetensors")
        load_trunk(again, tmp_path / "again.safetensors")
        hashes.add(trunk_hash(again))
    assert hashes == {trunk_hash(source)}


def test_the_hash_depends_on_every_weight(source):
    changed = copy.deepcopy(source)
    with torch.no_grad():
        changed.layers[2].blocks[3].mlp.fc2.bias[-1] += 1e-6
    assert trunk_hash(changed) != trunk_hash(source)
    assert len(trunk_hash(source)) == 64


def test_weights_without_a_hash_make_it_unknown(source, tmp_path):
    save_trunk(source, tmp_path / "swin.safetensors")
    trunk = FrozenSwin(CONFIG)
    load_trunk(trunk, tmp_path / "swin.safetensors")
    backbone = E3VABackbone(trunk)
    backbone.load_state_dict({"norms.0.weight": torch.ones(16)}, strict=False)
    assert trunk.weight_hash.any()  # the trunk's weights were not touched
    other = prefixed("trunk.", Swin(CONFIG).state_dict())
    rest = {k: v for k, v in backbone.state_dict().items() if not k.startswith("trunk.")}
    backbone.load_state_dict(other | rest)
    assert not trunk.weight_hash.any()
    assert trunk_hash(trunk) != trunk_hash(source)


@pytest.mark.parametrize(
    "name, what",
    [
        ("swinv2_tiny_window8_256", "a Swin V2"),
        ("vit_tiny_patch16_224", "a plain vision transformer"),
        ("convnext_atto", "a ConvNeXt"),
        ("resnet18", "a ResNet"),
    ],
)
def test_names_networks_that_are_no_trunk(name, what, tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model(name).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other\.pth holds {what}.* of the family swin"):
        open_trunk(tmp_path / "other.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(value, source, tmp_path):
    state = official(source)
    name = "layers.1.blocks.0.mlp.fc1.weight"
    state[name] = state[name].clone()
    state[name][3, 5] = value
    torch.save(state, tmp_path / "swin.pth")
    trunk = FrozenSwin(CONFIG)
    before = copy.deepcopy(trunk.state_dict())
    with pytest.raises(ValueError, match=rf"swin\.pth is broken: {name} holds values that are NaN"):
        load_trunk(trunk, tmp_path / "swin.pth")
    assert all(torch.equal(v, before[n]) for n, v in trunk.state_dict().items())
