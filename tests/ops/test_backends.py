"""The table of backends, and what attaches to it."""

import pytest
import torch

import e3va
from e3va.ops import dispatch
from e3va.ops.backends.registry import IMPLEMENTATIONS, PREFERENCE, register
from e3va.ops.variants import VARIANTS

CPU = torch.device("cpu")


def test_the_table_names_what_there_is():
    assert {op: set(names) for op, names in PREFERENCE.items()} == {
        op: set(found) for op, found in IMPLEMENTATIONS.items()
    }
    assert PREFERENCE.keys() == VARIANTS.keys()
    for names in PREFERENCE.values():  # whatever has no other can be computed
        assert names[-1] == "reference" and set(names) <= set(dispatch.BACKENDS)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_table_alone_decides_what_is_preferred(monkeypatch, first):
    """Not the order of registration."""
    op, names = "adapters", PREFERENCE["adapters"]
    order = (*names[first:], *names[:first])
    found = {name: IMPLEMENTATIONS[op][name]._replace(why_not=lambda *_: None) for name in order}
    monkeypatch.setitem(IMPLEMENTATIONS, op, found)
    with e3va.backend("auto"):
        assert dispatch.explain(op, CPU, torch.float32).backend == "triton"
        monkeypatch.setitem(PREFERENCE, op, names[::-1])
        assert dispatch.explain(op, CPU, torch.float32).backend == "reference"


@pytest.mark.parametrize(
    "op, backend", [("window_attention", "triton"), ("adapters", "cuda"), ("adapter", "native")]
)
def test_what_the_table_does_not_name_is_refused(op, backend):
    with pytest.raises(LookupError, match=f"no backend '{backend}' of '{op}'"):
        register(op, backend)
