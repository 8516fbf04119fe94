"""Arguments of one form are checked once."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from e3va import ops
from e3va.ops import checks


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(checks, "_passed", set())
    made = []

    def check(*arguments):
        made.append(arguments)
        if arguments[-1] == "wrong":
            raise ValueError("wrong")

    return check, made


def test_once_for_each_form(calls):
    check, made = calls
    x = torch.zeros(2, 3)
    for arguments in (
        (x, "a"),
        (x + 1, "a"),  # the same
        (x.half(), "a"),
        (x[:1], "a"),
        (x, "b"),
        ([x, x], "a"),
        ([x, x[:1]], "a"),
        (None, "a"),
        ([x, x.clone()], "a"),  # the same
    ):
        checks.check_once(check, *arguments)
    assert len(made) == 7


def test_what_failed_is_checked_again(calls):
    check, made = calls
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            checks.check_once(check, torch.zeros(2), "wrong")
    assert len(made) == 2


def test_few_are_remembered(calls, monkeypatch):
    check, _ = calls
    monkeypatch.setattr(checks, "REMEMBERED", 10)
    for n in range(100):
        checks.check_once(check, torch.zeros(n), "a")
        assert len(checks._passed) <= 10


def test_what_cannot_be_remembered_is_checked():
    x = torch.zeros(1, 3, 96)
    with pytest.raises(ValueError, match="storage must be one of"):
        ops.sublayer_epilogue(x, x, None, None, 1e-5, None, "output", {"int4"})


def test_sizes_that_are_symbols():
    def attention(qkv):
        return ops.window_attention(qkv, torch.zeros(96), torch.zeros(25, 1), 3, 0)

    traced = make_fx(attention, tracing_mode="symbolic")(torch.randn(1, 4, 5, 96))
    x = torch.randn(2, 6, 7, 96)
    torch.testing.assert_close(traced(x), attention(x))
