import pytest
import torch
from torch import nn

from e3va import trunk_config
from e3va.trunks import FrozenSwin, Swin, SwinConfig
from e3va.trunks.base import WEIGHT_HASH
from e3va.weights import convert_weights
from tests import libraries, oracles

SMALL = SwinConfig(16, (2, 2, 2), (1, 2, 4), window_size=4)
WINDOW_7 = SwinConfig(16, (2, 4), (2, 4), window_size=7)
WINDOW_12 = SwinConfig(16, (2, 2), (1, 4), window_size=12, mlp_ratio=2)


def trunk_like(model, config):
    """A frozen trunk with the weights of another library's model."""
    trunk = FrozenSwin(config)
    missing, unexpected = trunk.load_state_dict(convert_weights(model.state_dict()), strict=False)
    assert not missing and not unexpected
    return trunk


def random_trunk(config=SMALL, dtype=torch.float32):
    trunk = FrozenSwin(config, dtype)
    libraries.randomise(trunk)
    return trunk


def assert_stages_equal(library, config, size):
    model = libraries.build(library, config, size)
    image = torch.randn(2, 3, *size)
    theirs = libraries.stage_outputs(library, model, image)
    ours = trunk_like(model, config)(image)
    assert len(ours) == len(theirs) == config.num_stages
    for y, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 0.1  # the comparison says something
        torch.testing.assert_close(y.flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


# No map here is as small as a window: there timm, torchvision and transformers drop the shift.
@pytest.mark.parametrize(
    ("config", "size"),
    [(SMALL, (75, 117)), (WINDOW_7, (75, 117)), (WINDOW_12, (101, 133))],
    ids=["window4", "window7", "window12"],
)
@pytest.mark.parametrize("library", ["torchvision", "transformers", "detectron2"])
def test_equals_other_libraries(library, config, size):
    assert_stages_equal(library, config, size)


# timm pads maps to whole windows after shifting them, the others before: compared with it are maps
# that need no padding, and blocks that do not shift.
@pytest.mark.parametrize(
    ("config", "size"),
    [
        (SMALL, (127, 190)),
        (WINDOW_7, (111, 166)),
        (WINDOW_12, (190, 191)),
        (SwinConfig(16, (1, 1, 1), (1, 2, 4), window_size=4), (75, 117)),
    ],
    ids=["window4", "window7", "window12", "unshifted"],
)
def test_equals_timm(config, size):
    assert_stages_equal("timm", config, size)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (16, 16), (1, 90), (27, 20), (33, 31)], ids=str)
@pytest.mark.parametrize("config", [SMALL, WINDOW_7], ids=["window4", "window7"])
def test_equals_detectron2_on_maps_no_larger_than_a_window(config, size):
    assert_stages_equal("detectron2", config, size)


def test_mergings_of_mmdetection_are_those_of_unfold():
    """MMDetection merges patches by nn.Unfold, whose channels run (c, row, column)."""
    norm, reduction = nn.LayerNorm(4 * 16), nn.Linear(4 * 16, 2 * 16, bias=False)
    for module in (norm, reduction):
        libraries.randomise(module)
    state = {"backbone.patch_embed.projection.weight": torch.zeros(16, 3, 4, 4)}
    for name, module in (("norm", norm), ("reduction", reduction)):
        for key, value in module.state_dict().items():
            state[f"backbone.stages.0.downsample.{name}.{key}"] = value
    trunk = FrozenSwin(SMALL)
    trunk.load_state_dict(convert_weights(state), strict=False)
    y = torch.randn(2, 6, 8, 16)
    columns = nn.functional.unfold(y.permute(0, 3, 1, 2), kernel_size=2, stride=2)
    expected = reduction(norm(columns.transpose(1, 2))).view(2, 3, 4, 32)
    torch.testing.assert_close(trunk.transition(0)(y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "window", "timm_name", "torchvision_name"),
    [
        ("swin_t", 7, "swin_tiny_patch4_window7_224", "swin_t"),
        ("swin_s", 7, "swin_small_patch4_window7_224", "swin_s"),
        ("swin_b", 7, "swin_base_patch4_window7_224", "swin_b"),
        ("swin_b", 12, "swin_base_patch4_window12_384", None),
        ("swin_l", 7, "swin_large_patch4_window7_224", None),
        ("swin_l", 12, "swin_large_patch4_window12_384", None),
    ],
)
def test_variants_have_the_shapes_of_other_libraries(variant, window, timm_name, torchvision_name):
    timm = pytest.importorskip("timm")
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        ours = FrozenSwin(trunk_config(variant, window_size=window)).state_dict()
        theirs = [timm.create_model(timm_name)]
        if torchvision_name:
            theirs.append(getattr(torchvision.models, torchvision_name)())
    del ours[WEIGHT_HASH]
    for model in theirs:
        converted = convert_weights(model.state_dict())
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.items()}


def test_never_trains_even_when_told_to():
    trunk = random_trunk()
    parent = nn.Sequential(trunk)
    image = torch.randn(1, 3, 40, 30, requires_grad=True)
    expected = trunk(image)
    for module in (trunk, parent):
        module.train()
        assert not any(part.training for part in trunk.modules())
        stages = oracles.stages_of(trunk, image)
        outputs = trunk(image) + [t for _, y_out, taps in stages for t in (y_out, *taps)]
        assert not any(y.requires_grad for y in outputs)
        assert all(map(torch.equal, outputs, expected))
    assert parent.training
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_stochastic_depth_acts_on_the_trainable_swin_in_training_only():
    swin = Swin(SMALL, drop_path=0.5)
    swin.load_state_dict(random_trunk().state_dict(), strict=False)
    image = torch.randn(4, 3, 40, 30)
    assert not torch.equal(swin(image)[-1], swin(image)[-1])
    frozen = FrozenSwin(SMALL)
    frozen.load_state_dict(swin.state_dict())
    torch.testing.assert_close(swin.eval()(image)[-1], frozen(image)[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(75, 117), (1, 1), (30, 9)], ids=str)
def test_taps_are_what_the_residual_stream_gains(size):
    trunk = random_trunk(dtype=torch.float64)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    for stage, (y_in, y_out, taps) in enumerate(oracles.stages_of(trunk, image)):
        assert len(taps) == SMALL.num_taps[stage]
        assert all(tap.shape == y_out.shape for tap in taps)
        torch.testing.assert_close(y_in + sum(taps), y_out, rtol=1e-12, atol=1e-12)
    assert torch.equal(y_out, trunk(image)[-1])


def test_stores_its_weights_in_bf16():
    trunk, half = random_trunk(), FrozenSwin(SMALL, torch.bfloat16)
    half.load_state_dict(trunk.state_dict())
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    image = torch.randn(2, 3, 75, 117)
    for y, expected in zip(half(image), trunk(image), strict=True):
        assert y.dtype == torch.bfloat16
        assert oracles.relative_error(y, expected) < 2 * oracles.TOLERANCE[torch.bfloat16]


def test_autocast_decides_the_dtype_of_the_computation():
    image = torch.randn(1, 3, 40, 30)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = random_trunk()(image)
    assert {y.dtype for y in outputs} == {torch.bfloat16}


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 0, 8)], ids=str)
def test_refuses_what_is_no_image(shape):
    with pytest.raises(ValueError, match=r"must have shape \[B, 3, H, W\], got"):
        random_trunk()(torch.zeros(shape))


def test_takes_an_empty_batch():
    assert [y.shape[0] for y in random_trunk()(torch.zeros(0, 3, 40, 30))] == [0, 0, 0]


def test_takes_images_of_any_strides():
    trunk, image = random_trunk(), torch.randn(2, 3, 37, 50)
    expected = trunk(image)
    flipped = image.transpose(2, 3).contiguous().transpose(2, 3)
    strided = torch.randn(2, 6, 74, 100)
    strided[:, ::2, ::2, ::2] = image
    for view in (image.to(memory_format=torch.channels_last), flipped, strided[:, ::2, ::2, ::2]):
        assert view.stride() != image.stride()
        for y, same in zip(trunk(view), expected, strict=True):
            torch.testing.assert_close(y, same, rtol=1e-5, atol=1e-5)


def test_refuses_an_integer_dtype_and_a_rate_out_of_range():
    with pytest.raises(TypeError, match="dtype must be floating"):
        FrozenSwin(SMALL, torch.int8)
    with pytest.raises(ValueError, match="drop_path must be in"):
        Swin(SMALL, drop_path=1.0)
