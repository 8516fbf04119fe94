import pytest
import torch

from e3va import Highway, HighwayConfig, trunk_config
from e3va.highway import HighwayStage, StageRide
from e3va.measure import trainable_parameters
from e3va.ops.functional import fold
from e3va.trunks import SwinConfig
from tests import oracles


@pytest.mark.parametrize("variant, count", [("swin_b", 1_181_312), ("swin_l", 1_765_824)])
def test_parameter_counts_of_the_paper(variant, count):
    """The paper's 1.20 M and 1.79 M, less one output bias per adapter, plus one per stage."""
    swin = trunk_config(variant)
    highway = Highway(swin, HighwayConfig().published())
    assert trainable_parameters(highway) == count
    biases = sum(taps * dim for taps, dim in zip(swin.num_taps, swin.dims, strict=True))
    published = {"swin_b": 1.203e6, "swin_l": 1.799e6}[variant]
    assert count + biases - sum(swin.dims) == pytest.approx(published, abs=500)


def test_mixing_and_state_add_a_few_parameters():
    """48 adapters of rank 16: a 3×3 kernel and a gain for each of their channels."""
    count = trainable_parameters(Highway(trunk_config("swin_b")))
    assert count == 1_181_312 + 48 * 16 * (3 * 3 + 1)


def test_the_state_of_a_deep_stage_begins_as_small_as_that_of_a_shallow_one():
    """36 adapters, each of which would make it grow by a fifth."""
    torch.manual_seed(0)
    for adapters in (4, 12, 36):
        stage = HighwayStage(adapters, 128, HighwayConfig())
        taps = [torch.randn(1, 4, 5, 128) for _ in range(adapters)]
        _, state = oracles.adapters(
            taps,
            *(stage.P, stage.g, stage.Q, stage.b, stage.U, stage.g_up),
            *(stage.D, stage.gamma),
        )
        assert 0.5 < state.square().mean().sqrt() < 10


def test_parameters_of_a_stage_are_stacked():
    highway = Highway(trunk_config("swin_b"))
    assert len(list(highway.parameters())) == 4 * 10
    assert highway.stages[2].P.shape == (36, 512, 16)
    published = Highway(trunk_config("swin_b"), HighwayConfig().published())
    assert len(list(published.parameters())) == 4 * 8


@pytest.mark.parametrize(
    "theirs, ours, message",
    [
        (
            {},
            dict(tap="output"),
            "with tap='norm', mixing=3, state=True, this one has tap='output'",
        ),
        (dict(state=False), {}, "state=False, this one has tap='norm', mixing=3, state=True"),
        (dict(mixing=5), {}, "mixing=5, state=True, this one"),
    ],
)
def test_weights_of_another_form_are_refused(theirs, ours, message):
    swin = trunk_config("swin_digits")
    theirs, ours = (Highway(swin, HighwayConfig(2, 8, 1.0, **c)) for c in (theirs, ours))
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(theirs.state_dict(), strict=False)


def test_weights_with_d_and_gamma_need_not_tell_their_form():
    swin, config = trunk_config("swin_digits"), HighwayConfig(2, 8, 1.0)
    state = dict(Highway(swin, config).named_parameters())
    Highway(swin, config).load_state_dict(state, strict=False)


def test_weights_that_tell_no_form_are_of_the_published_one():
    config = HighwayConfig(2, 8, 1.0)
    swin = trunk_config("swin_digits")
    published = Highway(swin, config.published())
    state = {name: v for name, v in published.state_dict().items() if name != "form"}
    published.load_state_dict(dict(state))
    with pytest.raises(ValueError, match="tap='output', mixing=0, state=False, this one has"):
        Highway(swin, config).load_state_dict(dict(state), strict=False)


def test_fold_is_the_lorand_form():
    stage = Highway(SwinConfig(24, (1,), (1,)), HighwayConfig(3, 4, 0.5)).stages[0].double()
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter)
    Q, U = fold(stage.g, stage.Q, stage.U, stage.g_up)
    for k in range(2):
        down = oracles.lorand_projection(stage.P[k], stage.g[k], stage.Q[k])
        up = oracles.lorand_projection(stage.U[k], stage.g_up[k], stage.V[k])
        torch.testing.assert_close(stage.P[k] @ Q[k], down)
        torch.testing.assert_close(U[k] @ stage.V[k], up)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(branches=0), ValueError, "branches must be at least 1, got 0"),
        (dict(kernel_dim=-8), ValueError, "kernel_dim must be at least 1, got -8"),
        (dict(kernel_dim=2.0), TypeError, "kernel_dim must be an integer"),
        (dict(branches=True), TypeError, "branches must be an integer"),
        (dict(hidden_ratio=0), ValueError, r"hidden_ratio must be in \(0, 1\]"),
        (dict(hidden_ratio=1.5), ValueError, r"hidden_ratio must be in \(0, 1\]"),
        (dict(tap="input"), ValueError, "tap must be one of output, norm, got 'input'"),
        (dict(mixing=4), ValueError, "mixing must be one of 0, 3, 5, 7, got 4"),
        (dict(mixing=3.0), ValueError, "mixing must be one of 0, 3, 5, 7, got 3.0"),
        (dict(mixing=False), ValueError, "mixing must be one of 0, 3, 5, 7, got False"),
        (dict(state=1), TypeError, "state must be True or False, got 1"),
        (dict(hidden_ratio=float("nan")), ValueError, r"hidden_ratio must be in \(0, 1\]"),
    ],
)
def test_config_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        HighwayConfig(**arguments)


def test_config_that_does_not_fit_the_trunk():
    odd = SwinConfig(33, (1,), (3,))
    with pytest.raises(ValueError, match=r"hidden_ratio 0\.5 of 33 channels is 16\.5"):
        Highway(odd)
    Highway(odd, HighwayConfig(hidden_ratio=1.0))  # odd channel counts are fine in themselves
    with pytest.raises(ValueError, match="exceeds the stage's 32 channels"):
        Highway(trunk_config("swin_digits"), HighwayConfig(branches=5))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(embed_dim=0), ValueError, "embed_dim must be at least 1"),
        (dict(window_size=7.0), TypeError, "window_size must be an integer"),
        (dict(num_heads=(5, 6, 12, 24)), ValueError, "5 does not divide 96"),
        (dict(depths=(2, 2)), ValueError, "of one length"),
        (dict(depths=()), ValueError, "non-empty"),
        (dict(depths=(2, 0, 2, 2)), ValueError, "depths must be at least 1"),
        (dict(mlp_ratio=0), ValueError, "mlp_ratio must be positive"),
    ],
)
def test_trunk_config_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        SwinConfig(**arguments)


def test_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match="unknown trunk variant 'swin_xl'; known: swin_t, swin_s"):
        trunk_config("swin_xl")


def test_every_tap_is_rounded_by_noise_of_its_own():
    stage = Highway(trunk_config("swin_digits"), HighwayConfig(hidden_ratio=1.0)).stages[0]
    x, codes, ride = torch.randn(1, 5, 7, 32), [], None
    for _ in range(2):
        ride = StageRide(stage, ride)
        for _ in stage.P:
            ride(x, x, None)
        codes += ride._room[1]
    for i, one in enumerate(codes):
        assert not any(torch.equal(one, other) for other in codes[:i])


def test_noise_is_repeated_by_pytorch_s_seed():
    stage = Highway(trunk_config("swin_digits"), HighwayConfig(hidden_ratio=1.0)).stages[0]
    x, kept = torch.randn(1, 5, 7, 32), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ride = StageRide(stage)
        ride(x, x, None)
        kept.append(ride._room[1][0])
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
