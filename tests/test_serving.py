import pytest
import torch

from e3va import E3VABackbone, trunk_config
from e3va.serving import SharedTrunk, shared_forward
from e3va.trunks import FrozenSwin
from tests.oracles import relative_error

CONFIG = trunk_config("swin_digits")


def make_backbones(count, dtype=torch.float32):
    """As loaded one by one: each with a trunk of its own, of the same weights."""
    weights = FrozenSwin(CONFIG).state_dict()
    backbones = []
    for _ in range(count):
        trunk = FrozenSwin(CONFIG, dtype)
        trunk.load_state_dict(weights)
        backbone = E3VABackbone(trunk)
        for stage in backbone.highway.stages:
            torch.nn.init.normal_(stage.V, std=0.3)
        backbones.append(backbone.eval())
    return backbones


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_equals_separate_backbones(dtype, tolerance):
    backbones = make_backbones(3, dtype)
    image = torch.randn(2, 3, 41, 70)
    with torch.no_grad():
        alone = [backbone(image) for backbone in backbones]
    for together, expected in zip(shared_forward(backbones, image), alone, strict=True):
        assert together.keys() == expected.keys()
        for name, value in expected.items():
            assert relative_error(together[name], value) <= tolerance
    assert relative_error(alone[0]["p3"], alone[1]["p3"]) > 0.01  # they differ indeed


class Detector(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = torch.nn.Conv2d(CONFIG.dims[-1], 2, 1)

    def forward(self, image):
        return self.head(self.backbone(image)["p3"])


def test_detectors_share_the_trunk_and_its_forward(monkeypatch):
    models = [Detector(backbone) for backbone in make_backbones(2)]
    first, second = torch.randn(1, 3, 40, 64), torch.randn(1, 3, 33, 64)
    stages = []
    run = FrozenSwin.stage
    monkeypatch.setattr(FrozenSwin, "stage", lambda *a, **k: stages.append(a[1]) or run(*a, **k))
    with torch.no_grad():
        expected = [[model(image) for model in models] for image in (first, second)]
        assert stages == [0, 1, 2, 3] * 4
        stages.clear()
        with SharedTrunk(models):
            # Each model prepares its images by itself: equal, but not the same tensor.
            found = [[model(image.clone()) for model in models] for image in (first, second)]
        assert stages == [0, 1, 2, 3] * 2  # half of it
        again = models[1](first)  # as before
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, expected[0][1])
    assert models[0].backbone.trunk is models[1].backbone.trunk


def test_other_trunks_are_refused():
    one, two = make_backbones(1)[0], make_backbones(1)[0]
    with pytest.raises(ValueError, match="trunks differ"):
        SharedTrunk([one, two])
    same = make_backbones(2)
    same[1].trunk.to(torch.bfloat16)
    with pytest.raises(ValueError, match="trunks differ"):
        SharedTrunk(same)
    with pytest.raises(ValueError, match="a Linear with one E3VABackbone is needed"):
        SharedTrunk([one, torch.nn.Linear(2, 2)])


@torch.no_grad()
def test_one_tensor_for_every_image():
    """Video loops fill the same tensor again and again."""
    models = [Detector(backbone) for backbone in make_backbones(2)]
    images = [torch.randn(1, 3, 40, 64) for _ in range(2)]
    expected = [[model(image) for model in models] for image in images]
    buffer = torch.empty(1, 3, 40, 64)
    with SharedTrunk(models):
        for image, results in zip(images, expected, strict=True):
            buffer.copy_(image)
            for model, result in zip(models, results, strict=True):
                torch.testing.assert_close(model(buffer), result, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_autocast_is_computed_anew():
    models = [Detector(backbone) for backbone in make_backbones(2)]
    image = torch.randn(1, 3, 40, 64)
    exact = models[0](image)
    with SharedTrunk(models):
        with torch.autocast("cpu", torch.bfloat16):
            rounded = models[0](image)
        again = models[0](image)
    assert rounded.dtype == torch.bfloat16 and again.dtype == torch.float32
    torch.testing.assert_close(again, exact, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_image_that_failed_is_computed_again(monkeypatch):
    models = [Detector(backbone) for backbone in make_backbones(2)]
    images = [torch.randn(1, 3, 40, 64) for _ in range(2)]
    expected = models[0](images[1])
    with SharedTrunk(models):
        models[0](images[0])
        with monkeypatch.context() as patch:
            patch.setattr(FrozenSwin, "embed", lambda *_: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError):
                models[0](images[1])
        torch.testing.assert_close(models[0](images[1]), expected, rtol=1e-4, atol=1e-5)


def test_no_model_or_one_twice():
    (backbone,) = make_backbones(1)
    for models in ([], [backbone, backbone], [backbone, Detector(backbone)]):
        with pytest.raises(ValueError, match=f"each once, got {len(models)}"):
            SharedTrunk(models)
