import collections
import copy
import functools
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from e3va import (
    E3VABackbone,
    FrozenSwin,
    Swin,
    SwinConfig,
    load_trunk,
    open_trunk,
    save_trunk,
    trunk_config,
)
from e3va.trunks.base import WEIGHT_HASH
from e3va.weights import convert_weights, read_weights, trunk_hash
from tests import libraries

CONFIG = SwinConfig(16, (2, 2, 4), (1, 2, 4), window_size=4)
SIZE = (128, 192)


@pytest.fixture(scope="module")
def source():
    """A trunk with random weights, to be found again in every file."""
    torch.manual_seed(1)
    trunk = FrozenSwin(CONFIG)
    libraries.randomise(trunk)
    return trunk


@pytest.fixture(scope="module")
def model_of():
    """Another library's Swin, built once."""
    return functools.cache(lambda library: libraries.build(library, CONFIG, SIZE))


def official(trunk):
    """What a checkpoint of the official implementation holds: classifier and buffers too."""
    state = {name: value for name, value in trunk.state_dict().items() if name != WEIGHT_HASH}
    state |= {"norm.weight": torch.ones(64), "head.weight": torch.ones(10, 64)}
    for stage, depth in enumerate(CONFIG.depths):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            state[f"{name}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
            if block % 2:
                state[f"{name}.attn_mask"] = torch.zeros(4, 16, 16)
    return state


def mmdetection(trunk):
    """The same under the names and in the channel order of MMDetection."""
    state = {"bbox_head.fc.weight": torch.ones(3, 3), "backbone.norm0.weight": torch.ones(16)}
    for name, value in trunk.state_dict().items():
        name = name.replace("layers.", "stages.").replace(".attn.", ".attn.w_msa.")
        name = name.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        name = name.replace("patch_embed.proj.", "patch_embed.projection.")
        if "downsample" in name:
            theirs = torch.empty_like(value)
            channels = value.shape[-1] // 4
            for c in range(channels):
                for row in range(2):
                    for column in range(2):
                        ours = (2 * column + row) * channels + c
                        theirs[..., 4 * c + 2 * row + column] = value[..., ours]
            value = theirs
        if name != WEIGHT_HASH:
            state[f"backbone.{name}"] = value
    return state


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def assert_loads(path, source, dtype=torch.float32):
    trunk = FrozenSwin(CONFIG, dtype)
    load_trunk(trunk, path)
    expected = dict(source.named_parameters())
    for name, value in trunk.named_parameters():
        assert value.dtype == dtype and torch.equal(value, expected[name].to(dtype)), name
    assert trunk_hash(trunk) == trunk_hash(source)


WRITERS = {
    "microsoft": lambda t: {"model": official(t), "epoch": 3},
    "microsoft without model": official,
    "microsoft in a detector": lambda t: {"state_dict": prefixed("backbone.", official(t))},
    "mmdetection": lambda t: {"meta": {"epoch": 1}, "state_dict": mmdetection(t)},
    "detectron2": lambda t: {"model": prefixed("backbone.bottom_up.", official(t)), "iteration": 9},
    "data parallel": lambda t: {"model": prefixed("module.", official(t))},
    "ours": lambda t: prefixed("backbone.bottom_up.swin.", E3VABackbone(t).state_dict()),
    "our trunk": lambda t: prefixed("trunk.", t.state_dict()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("writer", WRITERS)
def test_loads_pth(writer, dtype, source, tmp_path):
    torch.save(WRITERS[writer](source), tmp_path / "swin.pth")
    assert_loads(tmp_path / "swin.pth", source, dtype)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_loads_detectron2_pkl(protocol, source, tmp_path):
    state = collections.OrderedDict(
        (name, value.numpy()) for name, value in WRITERS["detectron2"](source)["model"].items()
    )
    content = {"model": state, "__author__": "somebody", "matching_heuristics": True}
    (tmp_path / "swin.pkl").write_bytes(pickle.dumps(content, protocol))
    assert_loads(tmp_path / "swin.pkl", source)


@pytest.mark.parametrize("protocol", range(6))
def test_reads_arrays_as_numpy_does(protocol, tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        "rows": random.standard_normal((3, 4)).astype("f4"),
        "columns": np.asfortranarray(random.standard_normal((3, 5))),
        "permuted": random.standard_normal((2, 3, 4, 5)).transpose(2, 0, 3, 1),
        "strided": random.standard_normal((6, 6))[::2, ::3],
        "big-endian": np.arange(6, dtype=">i4").reshape(2, 3),
        "half": np.ones((2, 2), "f2"),
        "bool": np.array([True, False]),
        "zero-dimensional": np.array(3, "u1"),
        "scalar": np.float32(2.5),
    }
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(arrays, protocol))
    state = read_weights(tmp_path / "arrays.pkl")
    assert state.keys() == arrays.keys()
    for name, value in arrays.items():
        assert state[name].numpy().dtype == np.asarray(value).dtype.newbyteorder("="), name
        assert np.array_equal(state[name].numpy(), value), name


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("library", libraries.LIBRARIES)
def test_loads_what_other_libraries_save(library, suffix, model_of, tmp_path):
    model = model_of(library)
    path = tmp_path / f"swin{suffix}"
    if suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    else:
        torch.save(model.state_dict(), path)
    trunk = FrozenSwin(CONFIG)
    load_trunk(trunk, path)
    # That these are the right weights, tests/test_trunk.py shows by what is computed with them.
    expected = convert_weights(model.state_dict())
    assert expected.keys() == dict(trunk.named_parameters()).keys()
    assert all(torch.equal(value, expected[name]) for name, value in trunk.named_parameters())


NAME = "timm:swin_tiny_patch4_window7_224.ms_in22k"


@pytest.fixture
def timm_hub(model_of, monkeypatch, tmp_path):
    """What timm would download for NAME is our small model, in a file; returns the model."""
    timm = pytest.importorskip("timm")
    model = model_of("timm")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    small = {
        "img_size": SIZE,
        "embed_dim": CONFIG.embed_dim,
        "depths": CONFIG.depths,
        "num_heads": CONFIG.num_heads,
        "window_size": CONFIG.window_size,
        "num_classes": 0,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "model.safetensors")},
    }
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **small))
    return model


def test_loads_what_timm_knows_by_name(timm_hub):
    image = torch.randn(1, 3, *SIZE)
    expected = libraries.stage_outputs("timm", timm_hub, image)[-1]
    trunk = FrozenSwin(CONFIG)
    load_trunk(trunk, NAME)
    opened = open_trunk(Path(NAME))  # as the commands have it
    assert trunk_hash(opened) == trunk_hash(trunk)
    for found in (trunk, opened):
        torch.testing.assert_close(found(image)[-1].flatten(1, 2), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=rf"{NAME} does not fit the trunk: .* and windows of 4"):
        load_trunk(FrozenSwin(trunk_config("swin_t")), NAME)


@pytest.mark.parametrize(
    "error", [None, OSError("no route to host")], ids=["unknown name", "no network"]
)
def test_says_what_timm_cannot_bring(error, monkeypatch):
    timm = pytest.importorskip("timm")

    def fail(name, pretrained):
        raise error

    if error:
        monkeypatch.setattr(timm, "create_model", fail)
    reason = "no route to host" if error else "Unknown model"
    with pytest.raises(ValueError, match=rf"for timm:swin_x, .* path of a file .*: {reason}"):
        open_trunk("timm:swin_x")


def test_says_that_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=f"{NAME} needs timm: pip install timm"):
        open_trunk(NAME)


def test_loads_the_files_of_the_hugging_face_hub(tmp_path):
    """Whose names are older than those of the modules in memory."""
    transformers = pytest.importorskip("transformers")
    model = libraries.build("transformers", CONFIG)
    classifier = transformers.SwinForImageClassification(model.config)
    classifier.swin.load_state_dict(model.state_dict(), strict=False)
    classifier.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert "swin.encoder.layers.0.blocks.0.attention.self.query.weight" in load_file(path)
    trunk = FrozenSwin(CONFIG)
    load_trunk(trunk, path)
    image = torch.randn(1, 3, *SIZE)
    expected = libraries.stage_outputs("transformers", model, image)[-1]
    torch.testing.assert_close(trunk(image)[-1].flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_loads_into_a_trainable_swin(source, tmp_path):
    save_trunk(source, tmp_path / "swin.safetensors")
    swin = Swin(CONFIG)
    load_trunk(swin, tmp_path / "swin.safetensors")
    assert all(parameter.requires_grad for parameter in swin.parameters())
    assert trunk_hash(swin) == trunk_hash(source)


# --- Bad files ---------------------------------------------------------------------------------


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt", ".bin"])
def test_never_runs_code_of_a_file(suffix, tmp_path):
    path, victim = tmp_path / f"swin{suffix}", tmp_path / "victim"
    content = {"model": {"patch_embed.proj.weight": Malicious(victim)}}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"{path}.*refused the global (posix|nt)\.mkdir"):
        load_trunk(FrozenSwin(CONFIG), path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(content))  # it would have
    assert victim.exists()


def test_refuses_objects_inside_arrays(tmp_path):
    victim = tmp_path / "victim"
    array = np.array([Malicious(victim)], dtype=object)
    (tmp_path / "swin.pkl").write_bytes(pickle.dumps({"model": {"a": array}}))
    with pytest.raises(ValueError, match=r"refused the global (posix|nt)\.mkdir"):
        read_weights(tmp_path / "swin.pkl")
    assert not victim.exists()


class CraftedDtype:
    """A dtype that holds object pointers and says that it does not: numpy crashes on its arrays."""

    def __reduce__(self):
        fields = {"a": (np.dtype("O"), 0)}
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), fields, 8, 1, 0)


class CraftedArray:
    def __init__(self, build, *state):
        self.build, self.state = build, state

    def __reduce__(self):
        return (*self.build, *self.state)


EMPTY = np.zeros(1).__reduce__()[:2]


@pytest.mark.parametrize(
    "crafted",
    [
        CraftedArray(EMPTY, (1, (1,), CraftedDtype(), False, b"AAAAAAAA")),
        CraftedArray(EMPTY, (1, (1,), np.dtype("O"), False, b"AAAAAAAA")),
        CraftedArray((np.ndarray, ((1,), np.dtype("O"), b"AAAAAAAA"))),
        CraftedArray((np.ndarray, ((1 << 50,), np.dtype("f4")))),
        CraftedArray(EMPTY, (1, (1 << 50,), np.dtype("f4"), False, b"AAAA")),
    ],
    ids=["lying dtype", "pointers", "pointers by constructor", "huge", "huger than its bytes"],
)
def test_does_not_trust_arrays(crafted, tmp_path):
    (tmp_path / "swin.pkl").write_bytes(pickle.dumps({"model": {"a": crafted}}, 2))
    with pytest.raises(ValueError, match=r"swin\.pkl is damaged"):
        read_weights(tmp_path / "swin.pkl")


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "noise"])
def test_names_a_damaged_file(suffix, damage, source, tmp_path):
    path = tmp_path / f"swin{suffix}"
    if suffix == ".pkl":
        arrays = {name: value.numpy() for name, value in source.state_dict().items()}
        path.write_bytes(pickle.dumps({"model": arrays}))
    elif suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_trunk(source, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"<!DOCTYPE html><html>404 not found</html>",
            "noise": np.random.default_rng(0).bytes(4096),
        }[damage]
    )
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        load_trunk(FrozenSwin(CONFIG), path)


def test_names_a_missing_file_and_an_unknown_suffix(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*missing\.pth"):
        load_trunk(FrozenSwin(CONFIG), tmp_path / "missing.pth")
    (tmp_path / "swin.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"files ending in \.safetensors, .*, not '\.onnx'"):
        load_trunk(FrozenSwin(CONFIG), tmp_path / "swin.onnx")
    with pytest.raises(ValueError, match=r"saved as \.safetensors"):
        save_trunk(FrozenSwin(CONFIG), tmp_path / "swin.pth")


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), {}, {"fc.weight": torch.ones(2)}])
def test_says_that_a_file_holds_no_swin(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds"):
        load_trunk(FrozenSwin(CONFIG), tmp_path / "other.pth")


def test_says_which_variant_a_wrong_file_looks_like(tmp_path):
    digits = FrozenSwin(trunk_config("swin_digits", window_size=12))
    save_trunk(digits, tmp_path / "swin.safetensors")
    trunk = FrozenSwin(trunk_config("swin_t"))
    before = copy.deepcopy(trunk.state_dict())
    with pytest.raises(ValueError) as error:
        load_trunk(trunk, tmp_path / "swin.safetensors")
    message = str(error.value)
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
    state["layers.0.blocks.0.attn.logit_scale"] = torch.ones(1)
    torch.save(state, tmp_path / "swin.pth")
    with pytest.raises(ValueError) as error:
        load_trunk(FrozenSwin(CONFIG), tmp_path / "swin.pth")
    message = str(error.value)
    assert (
        "2 missing: layers.0.downsample.norm.weight, layers.1.blocks.1.mlp.fc1.bias; "
        "1 unexpected: layers.0.blocks.0.attn.logit_scale" in message
    )


def test_incomplete_attention_of_hugging_face_is_reported():
    state = libraries.build("transformers", CONFIG).state_dict()
    del state["encoder.layers.0.blocks.0.attention.k_proj.weight"]
    name = "layers.0.blocks.0.attn.qkv."
    converted = convert_weights(state)
    assert name + "weight" not in converted and name + "bias" in converted


# --- Saving and the hash -----------------------------------------------------------------------


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
