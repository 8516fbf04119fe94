import functools
import hashlib
import http.server
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from e3va import load_trunk, open_trunk, save_trunk, trunk_config
from e3va.trunks import FrozenSwin
from e3va.weights import convert_weights, read_weights, reading, resolve, trunk_hash
from tests import libraries
from tests.weights.files import CONFIG, SIZE, WRITERS, assert_loads, official, prefixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("writer", WRITERS)
def test_loads_pth(writer, dtype, source, tmp_path):
    torch.save(WRITERS[writer](source), tmp_path / "swin.pth")
    assert_loads(tmp_path / "swin.pth", source, dtype)


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
    # That these are the right weights, tests/trunks/test_swin.py shows by what they compute.
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


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "cut", "empty", "text", "noise"])
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
            "cut": whole[:20_000],
            "empty": b"",
            "text": b"404: not found",
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


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_ema": state, "epoch": 3},
        lambda state: {"state_dict_ema": state},
        lambda state: {"teacher": prefixed("module.backbone.", state), "epoch": 1},
        lambda state: {"params": state},
        lambda state: {"state_dict": {"model": state}, "optimizer": {"state": {0: torch.ones(2)}}},
        lambda state: {"optimizer": {"state": {0: {"a": torch.ones(2)}}}, "whatever": {"x": state}},
        lambda state: {"model": {"head.weight": torch.ones(2)}, "ema": state},
    ],
)
def test_unwraps_dictionaries_of_any_name_and_depth(wrap, source, tmp_path):
    torch.save(wrap(official(source)), tmp_path / "swin.pth")
    assert_loads(tmp_path / "swin.pth", source)


def test_of_several_weights_the_models_own_are_read(source, tmp_path):
    others = {name: value + 1 for name, value in official(source).items()}
    torch.save({"model_ema": others, "model": official(source)}, tmp_path / "swin.pth")
    assert_loads(tmp_path / "swin.pth", source)


def test_says_which_keys_a_file_without_weights_has(tmp_path):
    torch.save({"epoch": 3, "meta": {"a": 1, "b": 2}}, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match=r"keys are epoch \(int\), meta \(2 entries\)$"):
        load_trunk(FrozenSwin(CONFIG), tmp_path / "swin.pth")


def test_a_dictionary_without_end_ends(tmp_path):
    content = inner = {}
    for _ in range(40):
        inner["model"] = inner = {}
    torch.save(content, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match="holds no dictionary of weights"):
        read_weights(tmp_path / "swin.pth")


def test_never_recommends_to_load_unsafely(tmp_path):
    path = tmp_path / "swin.pth"
    path.write_bytes(bytes(2**20))  # what PyTorch takes for one of its oldest files
    with pytest.raises(ValueError, match="no plain PyTorch checkpoint") as error:
        read_weights(path)
    assert "weights_only" not in str(error.value)


def test_names_a_file_that_does_not_fit_into_the_memory(source, tmp_path, monkeypatch):
    def read(path):
        raise MemoryError("Cannot allocate")

    save_trunk(source, tmp_path / "swin.safetensors")
    monkeypatch.setitem(reading._READERS, ".safetensors", read)
    with pytest.raises(ValueError, match=r"swin\.safetensors does not fit into the memory: Cannot"):
        read_weights(tmp_path / "swin.safetensors")


@pytest.mark.parametrize(
    "start, what",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "a pointer of Git LFS"),
        (b"\n <!DOCTYPE html><html>", "an HTML page"),
        (b"<html lang=en>", "an HTML page"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_tells_what_stands_where_weights_should_be(start, what, suffix, tmp_path):
    path = tmp_path / f"swin{suffix}"
    path.write_bytes(start)
    with pytest.raises(ValueError, match=f"{path} is no weights but {what}"):
        read_weights(path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server on this machine, and the folder that it shows."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "shown"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()


def test_two_urls_of_one_name_are_two_files(server, tmp_path):
    address, folder = server
    for place in ("a", "b"):
        (folder / place).mkdir()
        (folder / place / "swin.pth").write_text(place)
    found = [resolve(f"{address}/{place}/swin.pth?download=true") for place in ("a", "b")]
    assert [path.read_text() for path in found] == ["a", "b"]
    assert all(path.suffix == ".pth" for path in found)
    (folder / "a/swin.pth").unlink()  # it was downloaded once, for good
    assert resolve(f"{address}/a/swin.pth?download=true") == found[0]


def test_a_download_is_compared_with_the_hash_in_its_name(server, tmp_path):
    address, folder = server
    content = b"weights"
    right = f"swin-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    for name in (right, "swin-b.pth", "swin-00000000.pth"):
        (folder / name).write_bytes(content)
    for name in (right, "swin-b.pth"):
        assert resolve(f"{address}/{name}").read_bytes() == content
    with pytest.raises(ValueError, match=r"swin-00000000\.pth.*invalid hash"):
        resolve(f"{address}/swin-00000000.pth")
    with pytest.raises(ValueError, match=r"cannot download .*gone\.pth"):
        resolve(f"{address}/gone.pth")
    assert len(list((tmp_path / "hub").rglob("*.pth"))) == 2
