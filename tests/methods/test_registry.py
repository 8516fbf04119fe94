"""The registry: names, options, and what is refused."""

import dataclasses
import inspect

import pytest
import torch

from e3va import build_backbone
from e3va.measure import trainable_parameters
from e3va.methods import METHODS, options_of
from e3va.trunks import SwinConfig

TINY = SwinConfig(16, (1, 1), (1, 2), window_size=3)


@pytest.mark.parametrize("method", METHODS)
def test_every_option_is_documented_and_has_a_default(method):
    kind = METHODS[method]
    documented = "".join(inspect.getdoc(base) or "" for base in kind.__mro__[:-1])
    for field in dataclasses.fields(kind):
        assert field.name in documented, field.name
        assert field.default is not dataclasses.MISSING
    assert options_of(method) == dataclasses.asdict(kind())


@pytest.mark.parametrize("method", METHODS)
def test_options_that_a_method_does_not_have_are_refused(method):
    known = ", ".join(options_of(method)) or "none"
    with pytest.raises(TypeError, match=f"'{method}' has no option taps; it has {known}$"):
        build_backbone(method, TINY, taps="int4")


def test_a_trunk_that_is_trained_is_stored_in_float32():
    with pytest.raises(ValueError, match="'full' trains the trunk, which is stored in float32"):
        build_backbone("full", TINY, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "method, option, count",
    [
        ("adapter", {"hidden": 5}, 2 * sum(2 * C * 5 + 5 + C for C in (16, 32))),
        ("adaptformer", {"hidden": 5}, sum(2 * C * 5 + 5 + C for C in (16, 32))),
        ("lorand", {"branches": 3, "kernel_dim": 2}, None),
        ("mona", {"hidden": 5}, None),
        ("e3va", {"branches": 1, "kernel_dim": 4}, None),
        ("e3va_paper", {"kernel_dim": 4}, None),
    ],
)
def test_options_take_effect(method, option, count):
    trained = trainable_parameters(build_backbone(method, TINY, **option))
    assert trained < trainable_parameters(build_backbone(method, TINY))
    assert count in (None, trained)


def test_rank_and_scale_of_lora():
    pytest.importorskip("peft")
    backbone = build_backbone("lora", TINY, rank=3, scale=2.0)
    assert trainable_parameters(backbone) == sum(2 * 2 * C * 3 for C in (16, 32))
    assert {s.blocks[0].q.scaling["default"] for s in backbone.adapters} == {2.0}


def test_the_scale_of_adaptformer():
    one, two = (build_backbone("adaptformer", TINY, scale=scale).eval() for scale in (0.0, 0.5))
    two.load_state_dict(one.state_dict())
    image = torch.randn(1, 3, 20, 20)
    assert torch.equal(one(image)["p1"], two(image)["p1"])
    for backbone in (one, two):
        torch.nn.init.ones_(backbone.adapters[0][1].up.bias)
    assert not torch.allclose(one(image)["p1"], two(image)["p1"])


@pytest.mark.parametrize(
    "method, option",
    [
        ("adapter", {"hidden": 0}),
        ("mona", {"hidden": -1}),
        ("adaptformer", {"hidden": 0}),
        ("lorand", {"branches": 0}),
        ("lora", {"rank": 0}),
    ],
)
def test_options_out_of_range(method, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        build_backbone(method, TINY, **option)
