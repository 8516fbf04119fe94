import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import e3va
from e3va import Backbone, E3VABackbone, HighwayConfig, build_backbone, trunk_config
from e3va.measure import LiveBytes, SavedBytes, trainable_parameters
from e3va.ops.backends.native import build_info
from e3va.ops.backends.registry import IMPLEMENTATIONS, PREFERENCE
from e3va.ops.storage import STORAGES
from e3va.trunks import FrozenSwin, Swin, SwinConfig
from tests import oracles
from tests.ops.backends import DEVICES
from tests.oracles import relative_error

TINY = SwinConfig(16, (2, 2, 4, 2), (1, 2, 4, 8), window_size=5)
SIZES = [(65, 93), (1, 1), (3, 17), (32, 32), (20, 127)]


def randomised(trunk):
    """Weights and biases that make every part of the trunk matter."""
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return trunk


def wake(backbone):
    """Move the highway away from its initialisation, so that every gradient is non-zero."""
    for stage in backbone.highway.stages:
        torch.nn.init.normal_(stage.V, std=0.1)
        if stage.D is not None:
            torch.nn.init.normal_(stage.D, std=0.1)
    return backbone


SMALL = HighwayConfig(branches=1, kernel_dim=4)
FORMS = [SMALL, SMALL.published(), HighwayConfig(1, 4, mixing=0), HighwayConfig(1, 4, state=False)]


@pytest.fixture
def backbone():
    return E3VABackbone(randomised(FrozenSwin(TINY)), SMALL)


def loss_of(features):
    """No mean of squares: that of normalised maps is constant, and its gradient zero."""
    return sum(p.float().sin().mean() for p in features.values())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_equals_the_frozen_network_at_initialisation(form, size, dtype):
    backbone = E3VABackbone(randomised(FrozenSwin(TINY)), form)
    frozen = Backbone(backbone.trunk)
    image = torch.randn(2, 3, *size)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours, theirs = backbone(image), frozen(image)
    for s, name in enumerate(("p0", "p1", "p2", "p3")):
        expected = (2, 16 * 2**s, *(math.ceil(n / 2 ** (s + 2)) for n in size))
        assert ours[name].shape == expected and ours[name].dtype == dtype
        assert torch.equal(ours[name], theirs[name])


def test_only_highway_and_norms_train_and_the_trunk_stays_to_the_bit(backbone):
    backbone.train()
    before = copy.deepcopy(backbone.state_dict())
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=0.01)
    image = torch.randn(2, 3, 41, 50)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of({k: p * torch.randn_like(p) for k, p in backbone(image).items()}).backward()
        optimizer.step()
    for name, value in backbone.state_dict().items():
        if name.startswith("trunk.") or name == "highway.form":
            assert torch.equal(value, before[name]), name
        else:
            assert not torch.equal(value, before[name]), name
    assert {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad} == {
        "highway",
        "norms",
    }


def test_every_trainable_parameter_gets_a_gradient(backbone):
    features = wake(backbone)(torch.randn(1, 3, 50, 50))
    loss = sum((p * torch.randn_like(p)).sum() for p in features.values())
    loss.backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_equal_autograd_through_the_unfused_network(form):
    """The oracle runs a trainable Swin, adapters one at a time and plain layers, in float64."""
    backbone = wake(
        E3VABackbone(randomised(FrozenSwin(TINY)), replace(form, storage="full"))
    ).double()
    trunk = Swin(TINY).double()
    trunk.load_state_dict(backbone.trunk.state_dict(), strict=False)
    image = torch.randn(1, 3, 45, 37, dtype=torch.float64)
    weights = {k: torch.randn_like(p) for k, p in backbone(image).items()}

    def loss_of_oracle():
        y = h = trunk.embed(image)
        loss, carry = 0.0, None
        for s, stage in enumerate(backbone.highway.stages):
            if s:
                y, h = map(trunk.transition(s - 1), (y, h))
                carry = F.avg_pool2d(carry.permute(0, 3, 1, 2), 2, ceil_mode=True)
                carry = carry.permute(0, 2, 3, 1)
            xs, taps = [], []

            def keep(x, y, norm, xs=xs, taps=taps):
                y = y + x
                z = F.layer_norm(y, y.shape[-1:]) if norm is None else norm(y)
                xs.append(x.detach())
                taps.append((x if form.tap == "output" else z).detach())
                return y, z

            y = trunk.stage(s, y, keep).detach()
            kernels = stage.P, stage.g, stage.Q, stage.b, stage.U, stage.g_up
            parameters = *kernels, stage.V, stage.c, stage.D, stage.gamma
            h, carry = oracles.highway(h, xs, *parameters, carry, taps)
            norm = backbone.norms[s]
            p = F.layer_norm(h, h.shape[-1:], norm.weight, norm.bias).permute(0, 3, 1, 2)
            loss = loss + (p * weights[f"p{s}"]).sum()
        return loss

    trained = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
    ours = sum((p * weights[k]).sum() for k, p in backbone(image).items())
    theirs = loss_of_oracle()
    torch.testing.assert_close(ours, theirs)
    actual = torch.autograd.grad(ours, list(trained.values()))
    expected = torch.autograd.grad(theirs, list(trained.values()))
    for name, a, e in zip(trained, actual, expected, strict=True):
        torch.testing.assert_close(a, e, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_saved_bytes_are_exactly_as_designed(autocast, storage, form):
    """Per stage of N tokens, C channels and K taps, at e bytes a value: the taps K·N·C·e, or a
    byte or half of one a value and 4 for each token's scale; u K·N·α·e, or beside int4 taps a byte
    a value and such a scale; the state before the stage N·α·e, if there is one; and the feature p
    N·C·e, which a neck keeps too. Beside these the output norm's statistics 2·N·4. Nothing of width
    m per token, nothing of the trunk but its taps."""
    e = (autocast or torch.float32).itemsize
    stored = {"full": lambda C: C * e, "int4": lambda C: C // 2 + 4}.get(storage, lambda C: C + 4)
    backbone = E3VABackbone(FrozenSwin(TINY), replace(form, storage=storage))
    config = backbone.highway.config
    image = torch.randn(2, 3, 41, 50)
    expected = 0
    for s, (K, C) in enumerate(zip(TINY.num_taps, TINY.dims, strict=True)):
        N = 2 * math.ceil(41 / 2 ** (s + 2)) * math.ceil(50 / 2 ** (s + 2))
        u = config.rank + 4 if storage == "int4" else config.rank * e
        expected += K * N * (stored(C) + u) + N * C * e
        if config.state and s > 0:
            expected += N * config.rank * e
        expected += 2 * N * 4
    with SavedBytes([backbone]) as saved, torch.autocast("cpu", autocast, enabled=bool(autocast)):
        backbone(image)
    assert saved.total == expected


def test_nothing_of_the_trunk_but_taps_is_saved():
    backbone = E3VABackbone(
        randomised(FrozenSwin(TINY)), replace(SMALL.published(), storage="full")
    )
    image = torch.randn(1, 3, 41, 50)
    with SavedBytes([backbone]) as saved:
        features = backbone(image)
    maps = [t for t in saved.tensors if t.dim() == 4 and t.shape[-1] > 1]
    taps = [tap for *_, taps in oracles.stages_of(backbone.trunk, image) for tap in taps]
    distinct = {t.data_ptr(): t for t in maps}.values()
    unexplained = [t for t in distinct if not any(torch.equal(t, tap) for tap in taps)]
    # What is left are the features themselves, which the neck keeps anyway.
    for tensor, p in zip(unexplained, features.values(), strict=True):
        assert torch.equal(tensor.permute(0, 3, 1, 2), p)


def test_keeps_far_less_alive_than_full_fine_tuning():
    peaks = {}
    for method in ("full", "frozen", "e3va"):
        backbone = build_backbone(method, trunk_config("swin_digits"))
        with LiveBytes() as memory:
            features = backbone(torch.randn(1, 3, 96, 128))
            if method != "frozen":
                loss_of(features).backward()
        peaks[method] = memory.peak
        del features
    assert peaks["frozen"] < peaks["e3va"] < 0.25 * peaks["full"]


@pytest.mark.parametrize("storage", ["full", "int4"])
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_compiles_without_a_graph_break(compiler, storage, form):
    backbone = E3VABackbone(randomised(FrozenSwin(TINY)), replace(form, storage=storage))
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    image = torch.randn(1, 3, 41, 50)
    ours, theirs = compiled(image), wake(backbone)(image)
    for name, p in theirs.items():
        torch.testing.assert_close(compiled(image)[name], p)
        assert ours[name].shape == p.shape
    torch.manual_seed(1)
    loss_of(compiled(image)).backward()
    gradient = backbone.highway.stages[0].P.grad.clone()
    backbone.zero_grad()
    torch.manual_seed(1)
    loss_of(backbone(image)).backward()
    torch.testing.assert_close(backbone.highway.stages[0].P.grad, gradient)


@pytest.mark.skipif("C++" not in build_info().built, reason="the CPU kernels were not built")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_step_on_the_cpu_runs_the_compiled_kernels_alone(monkeypatch, dtype):
    """Falling back to the reference would give the same numbers, slowly. Asked for by name, too."""
    ran = set()

    def record(op, name, run):
        def recorded(*arguments):
            ran.add((op, name))
            return run(*arguments)

        return recorded

    for op in PREFERENCE:
        for name, backend in list(IMPLEMENTATIONS[op].items()):
            recorded = backend._replace(run=record(op, name, backend.run))
            monkeypatch.setitem(IMPLEMENTATIONS[op], name, recorded)
    backbone = E3VABackbone(FrozenSwin(TINY), SMALL)
    for name in ("auto", "native"):
        ran.clear()
        with e3va.backend(name):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                features = backbone(torch.randn(1, 3, 41, 50))
            loss_of(features).backward()
        assert ran == {(op, "native") for op in PREFERENCE}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, error", [(None, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)]
)
def test_kernels_together_do_what_the_definitions_do(device, dtype, error):
    """Maps and gradients, with the backward in whatever thread autograd takes."""
    part = "CUDA" if device == "cuda" else "C++"
    if part not in build_info().built:
        pytest.skip(f"the {part} kernels were not built")
    if device == "cuda":
        pytest.importorskip("triton", reason="triton is not installed")
    config = SwinConfig(32, (2, 2, 2, 2), (1, 2, 4, 8))
    backbone = wake(E3VABackbone(randomised(FrozenSwin(config)), HighwayConfig(storage="full")))
    image = torch.randn(2, 3, 45, 93)

    def run(backend, device, dtype):
        backbone.to(device).zero_grad()
        with e3va.backend(backend):
            with torch.autocast(device, dtype, enabled=dtype is not None):
                maps = backbone(image.to(device))
            loss_of(maps).backward()
        trained = [p.grad for p in backbone.parameters() if p.requires_grad]
        return [value.detach().cpu() for value in (*maps.values(), *trained)]

    expected = run("reference", "cpu", None)
    for ours, theirs in zip(run("triton,native", device, dtype), expected, strict=True):
        assert relative_error(ours, theirs) < error


def test_empty_batch_and_strided_images(backbone):
    features = backbone(torch.randn(0, 3, 40, 40))
    sum(p.sum() for p in features.values()).backward()
    assert features["p0"].shape == (0, 16, 10, 10)
    assert backbone.highway.stages[0].P.grad.abs().sum() == 0
    image = torch.randn(2, 3, 40, 44)
    for strided in (image.to(memory_format=torch.channels_last), image.mT.contiguous().mT):
        torch.testing.assert_close(backbone(strided)["p3"], backbone(image)["p3"])


def test_maps_are_contiguous_where_that_is_faster(backbone):
    image = torch.randn(2, 3, 40, 44)
    for name, p in backbone(image).items():
        assert p.is_contiguous(), name
    with torch.autocast("cpu", torch.bfloat16):  # nothing is copied there
        features = backbone(image)
    for name, p in features.items():
        assert p.is_contiguous(memory_format=torch.channels_last), name


def test_frozen_weights_in_half_precision_leave_features_in_the_norms_dtype():
    trunk = FrozenSwin(TINY, torch.bfloat16)
    assert {p.dtype for p in trunk.parameters()} == {torch.bfloat16}
    backbone = E3VABackbone(trunk, HighwayConfig(1, 4))
    assert {p.dtype for p in backbone.parameters() if p.requires_grad} == {torch.float32}
    features = backbone(torch.randn(1, 3, 40, 40))
    assert {p.dtype for p in features.values()} == {torch.float32}
    loss_of(features).backward()


@pytest.mark.parametrize(
    "shape", [(3, 40, 40), (1, 1, 40, 40), (1, 3, 0, 40), (1, 3, 40, 0)], ids=str
)
def test_images_of_a_wrong_shape(backbone, shape):
    with pytest.raises(ValueError, match=r"image must have shape \[B, 3, H, W\], got"):
        backbone(torch.randn(shape))


def test_methods():
    counts = {
        m: trainable_parameters(build_backbone(m, TINY, **options))
        for m, options in (("full", {}), ("frozen", {}), ("e3va", {"kernel_dim": 4}))
    }
    assert counts["frozen"] == 0 < counts["e3va"] < counts["full"]
    with pytest.raises(ValueError, match="unknown tuning method 'prefix'; known: full, frozen, b"):
        build_backbone("prefix", TINY)
    with pytest.raises(TypeError, match="trunk must be a frozen one, got Swin"):
        E3VABackbone(Swin(TINY))


def test_drop_path_is_for_full_fine_tuning_in_training_only():
    backbone = build_backbone("full", TINY, drop_path=0.9)
    image = torch.randn(1, 3, 40, 40)
    assert not torch.equal(backbone(image)["p3"], backbone(image)["p3"])
    backbone.eval()
    assert torch.equal(backbone(image)["p3"], backbone(image)["p3"])
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\)"):
        build_backbone("full", TINY, drop_path=1.0)
