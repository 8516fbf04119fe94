import collections
import os
import pickle

import numpy as np
import pytest
import torch

from e3va import load_trunk
from e3va.trunks import FrozenSwin
from e3va.weights import read_weights
from tests.weights.files import CONFIG, WRITERS, assert_loads


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
