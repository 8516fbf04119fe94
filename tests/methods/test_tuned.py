"""The peers: what they train, how much of it, and that they compute what they are defined as."""

import copy
import importlib.util
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from e3va import Backbone, build_backbone, trunk_config
from e3va.measure import trainable_parameters
from e3va.methods import METHODS
from e3va.trunks import Swin, SwinConfig
from e3va.weights import load_trunk, save_trunk
from tests import oracles

TINY = SwinConfig(16, (2, 2, 2, 2), (1, 2, 4, 8), window_size=5)
NEEDS_PEFT = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="PEFT is missing")
PEERS = [m for m in METHODS if m not in ("full", "frozen", "e3va", "e3va_paper")]
ALL = [pytest.param(m, marks=NEEDS_PEFT) if m == "lora" else m for m in PEERS]
WITH_ADAPTERS = ALL[3:]
WITH_DROPOUT = ("adapter", "adaptformer", "lorand")
FIRST = {"lora": "lora_B"}
"""What of an adapter gets a gradient while it adds nothing; of the others: the up-projection."""


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-for-bit claims should not hang on how a reduction is split among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trunk_state(config=TINY):
    """Weights and biases that make every part of a trunk matter."""
    trunk = Swin(config)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return trunk.state_dict()


def build(method, config=TINY, state=None, **options):
    backbone = build_backbone(method, config, **options)
    backbone.trunk.load_state_dict(state or trunk_state(config))
    return backbone


def wake(backbone):
    """Move the adapters away from their initialisation, where most gradients are zero."""
    with torch.no_grad():
        for parameter in backbone.adapters.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return backbone


def names_of_trained(backbone):
    return {name for name, p in backbone.named_parameters() if p.requires_grad}


def step(backbone, size=(41, 50)):
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=0.01)
    features = backbone(torch.randn(2, 3, *size))
    sum((p * torch.randn_like(p)).sum() for p in features.values()).backward()
    optimizer.step()


# How much is trained, and what

MILLIONS = {
    "bitfit": (0.20, 0.30),
    "norm": (0.06, 0.09),
    "partial1": (12.6, 28.3),
    "adapter": (3.11, 4.66),
    "adaptformer": (1.55, 2.33),
    "lora": (3.08, 4.62),
    "lorand": (1.203, 1.799),
    "mona": (3.67, 5.27),
}
DECIMALS = {"partial1": 1, "lorand": 3}


def count(method, config):
    """From the definitions: of a block with C channels and h heads, then of the rest."""
    table = (2 * config.window_size - 1) ** 2
    per_block = {
        "bitfit": lambda C, h: 11 * C + table * h,  # norms 2, qkv 3, proj 1, MLP 5
        "norm": lambda C, h: 4 * C,
        "partial1": lambda C, h: 0,
        "adapter": lambda C, h: 2 * (2 * C * 64 + 64 + C),
        "adaptformer": lambda C, h: 2 * C * 64 + 64 + C,
        "lora": lambda C, h: 2 * (2 * C * 64),
        "lorand": lambda C, h: 2 * (2 * (C * 16 + 2 * 64 + 16 * C // 2) + C // 2 + C),
        "mona": lambda C, h: 2 * (
            4 * C + (2 * C * 64 + 64 + C) + 64 * (9 + 25 + 49) + 3 * 64 + 64 * 64 + 64
        ),
    }[method]  # fmt: skip
    blocks = zip(config.depths, config.dims, config.num_heads, strict=True)
    total = sum(depth * per_block(C, h) for depth, C, h in blocks)
    C, h = config.dims[-1], config.num_heads[-1]
    outside = 2 * config.embed_dim, 4 * sum(config.dims[:-1]), sum(config.dims)
    if method == "partial1":
        total = 12 * C * C + 13 * C + table * h
    elif method == "bitfit":  # patch embedding: convolution and norm; merging norms; output norms
        total += sum(outside)
    elif method == "norm":
        total += outside[0] + 2 * (outside[1] + outside[2])
    return total


@pytest.mark.parametrize("method", ALL)
def test_parameter_counts(method):
    for variant, millions in zip(("swin_b", "swin_l"), MILLIONS[method], strict=True):
        config = trunk_config(variant)
        with torch.device("meta"):
            trained = trainable_parameters(build_backbone(method, config))
        assert trained == count(method, config)
        assert round(trained / 1e6, DECIMALS.get(method, 2)) == millions


@pytest.mark.parametrize("method", ALL)
def test_only_what_is_meant_is_trained_and_the_rest_stays_to_the_bit(method):
    backbone = wake(build(method)).train()
    trained = names_of_trained(backbone)
    everything = {name for name, _ in backbone.named_parameters()}
    norms = [n for n, m in backbone.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    assert trained == {
        "bitfit": {n for n in everything if "bias" in n},
        "norm": {f"{n}.{part}" for n in norms for part in ("weight", "bias")},
        "partial1": {n for n in everything if n.startswith("trunk.layers.3.blocks.1.")},
    }.get(method, {n for n in everything if n.startswith("adapters.")})

    before = copy.deepcopy(backbone.state_dict())
    step(backbone)
    for name, parameter in backbone.named_parameters():
        if name in trained:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
            assert not torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name


# What it computes


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("size", [(65, 93), (1, 1), (20, 37)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_frozen_network_at_initialisation(method, size, dtype):
    state = trunk_state()
    backbone = build(method, state=state).train()
    image = torch.randn(2, 3, *size)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours = backbone(image)
        alike = Backbone(backbone.trunk)(image)  # the same kernels
        frozen = build("frozen", state={**state, "weight_hash": torch.zeros(32)})(image)
    for s, (name, p) in enumerate(ours.items()):
        assert p.shape == (2, 16 * 2**s, *(math.ceil(n / 2 ** (s + 2)) for n in size))
        assert p.dtype == dtype
        assert torch.equal(p, alike[name])
        tolerance = oracles.TOLERANCE[dtype]
        assert oracles.relative_error(p, frozen[name]) < tolerance


@pytest.mark.parametrize("method", WITH_ADAPTERS)
def test_an_adapter_learns_from_its_initialisation(method):
    backbone = build(method).train()
    step(backbone)
    for name, parameter in backbone.adapters.named_parameters():
        moving = FIRST.get(method, ".up.") in name
        if method == "lorand":
            moving = name.endswith(("up.weight", "up.bias"))
        assert (parameter.grad.abs().sum() > 0) == moving, name
    before = copy.deepcopy(backbone.adapters.state_dict())
    backbone.zero_grad()
    step(backbone)
    for name, value in backbone.adapters.state_dict().items():
        assert not torch.equal(value, before[name]), name


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def adapter(a, x, y):
    return y + (x + linear(gelu(linear(x, a.down)), a.up))


def adaptformer(a, x, y):
    if not hasattr(a, "down"):  # after attention
        return y + x
    return y + x + 0.1 * linear(linear(y, a.down).clamp_min(0), a.up)


def lorand(a, x, y):
    def project(x, p):
        return x @ oracles.lorand_projection(p.reduce, p.kernel, p.weight) + p.bias

    return y + (x + project(gelu(project(x, a.down)), a.up))


def mona(a, x, y):
    def depth_wise(t, conv):
        size = conv.weight.shape[-1]
        H, W = t.shape[1:3]
        padded = F.pad(t, (0, 0, *[size // 2] * 4))
        shifts = [(i, j) for i in range(size) for j in range(size)]
        taps = (padded[:, i : i + H, j : j + W] * conv.weight[:, 0, i, j] for i, j in shifts)
        return sum(taps) + conv.bias

    y = y + x
    centred = y - y.mean(-1, keepdim=True)
    normal = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    normal = normal * a.norm.weight + a.norm.bias
    t = linear(normal * a.norm.gamma + y * a.norm.gamma_x, a.down)
    t = t + sum(depth_wise(t, conv) for conv in a.convs) / 3
    t = t + linear(t, a.mix)
    return y + linear(gelu(t), a.up)


@pytest.mark.parametrize("method", [adapter, adaptformer, lorand, mona], ids=lambda f: f.__name__)
def test_adapters_equal_their_formulas(method):
    config = SwinConfig(16, (2, 1), (2, 4), window_size=3)
    backbone = wake(build(method.__name__, config)).double().eval()
    trunk, image = backbone.trunk, torch.randn(2, 3, 29, 42, dtype=torch.float64)
    y = trunk.embed(image)
    expected = {}
    for s, adapters in enumerate(backbone.adapters):
        remaining = iter(adapters)

        def complete(x, y, norm, remaining=remaining):
            y = method(next(remaining), x, y)
            return y, y if norm is None else norm(y)

        y = trunk.stage(s, trunk.transition(s - 1)(y) if s else y, complete)
        assert not list(remaining)
        expected[f"p{s}"] = F.layer_norm(y, y.shape[-1:]).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone(image), expected, rtol=1e-9, atol=1e-9)


@NEEDS_PEFT
def test_lora_equals_the_network_with_its_products_added_to_the_weights():
    backbone = wake(build("lora")).double()
    trunk = Swin(TINY).double()
    trunk.load_state_dict(backbone.trunk.state_dict())
    for stage, adapters in zip(trunk.layers, backbone.adapters, strict=True):
        for block, lora in zip(stage.blocks, adapters.blocks, strict=True):
            q, v = (
                layer.lora_B.default.weight @ layer.lora_A.default.weight
                for layer in (lora.q, lora.v)
            )
            block.attn.qkv.weight.data += torch.cat((q, torch.zeros_like(q), v)).detach()
    image = torch.randn(2, 3, 29, 42, dtype=torch.float64)
    merged = Backbone(trunk).double()
    torch.testing.assert_close(backbone(image), merged(image), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ALL)
def test_dropout_is_for_training_only(method):
    backbone = wake(build(method)).train()
    image = torch.randn(1, 3, 40, 40)
    same = torch.equal(backbone(image)["p0"], backbone(image)["p0"])
    assert same == (method not in WITH_DROPOUT)
    backbone.eval()
    assert torch.equal(backbone(image)["p0"], backbone(image)["p0"])


@pytest.mark.parametrize("method", ALL)
def test_autocast_and_a_trunk_in_half_precision(method):
    state = trunk_state()
    exact = wake(build(method, state=state)).eval()
    half = build(method, state=state, dtype=torch.bfloat16).eval()
    half.adapters.load_state_dict(exact.adapters.state_dict())
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in half.trunk.parameters() if not p.requires_grad} == {torch.bfloat16}
    image = torch.randn(1, 3, 37, 50)
    with torch.autocast("cpu", torch.bfloat16):
        computed = exact(image)
    stored = half(image)
    for name, p in exact(image).items():
        assert computed[name].dtype == torch.bfloat16 and stored[name].dtype == torch.float32
        assert oracles.relative_error(computed[name], p) < 0.05
        assert oracles.relative_error(stored[name], p) < 0.05
    sum(p.float().sum() for p in (*computed.values(), *stored.values())).backward()
    for parameter in (*exact.parameters(), *half.parameters()):
        assert (parameter.grad is not None) == parameter.requires_grad


@NEEDS_PEFT
def test_lora_computes_and_keeps_no_more_than_half_precision_under_autocast():
    backbone = wake(build("lora"))
    seen = []
    for module in backbone.modules():
        if type(module).__name__ == "Linear" and "lora" in type(module).__module__:
            for part in (module.lora_A.default, module.lora_B.default):
                part.register_forward_hook(lambda m, args, out: seen.extend((*args, out)))
    with torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(1, 3, 40, 40))
    assert {t.dtype for t in seen} == {torch.bfloat16} and len(seen) == 8 * sum(TINY.depths)


@pytest.mark.parametrize("method", ALL)
def test_copies_and_empty_batches(method):
    backbone = wake(build(method)).eval()
    image = torch.randn(1, 3, 40, 40)
    other, before = copy.deepcopy(backbone), backbone(image)["p3"]
    step(other)
    assert torch.equal(backbone(image)["p3"], before)
    assert not torch.equal(other(image)["p3"], before)
    assert backbone(torch.randn(0, 3, 40, 40))["p0"].shape == (0, 16, 10, 10)


@pytest.mark.parametrize("method", ALL)
def test_the_trunk_loads_the_same_files(method, tmp_path):
    pretrained = Swin(TINY)
    save_trunk(pretrained, tmp_path / "trunk.safetensors")
    backbone = build_backbone(method, TINY)
    load_trunk(backbone.trunk, tmp_path / "trunk.safetensors")
    for name, value in pretrained.state_dict().items():
        assert torch.equal(backbone.trunk.state_dict()[name], value), name


def test_wrong_names_and_missing_peft(monkeypatch):
    assert list(METHODS) == [
        *("full", "frozen", "bitfit", "norm", "partial1", "adapter", "adaptformer", "lora"),
        *("lorand", "mona", "e3va_paper", "e3va"),
    ]
    with pytest.raises(ValueError, match=f"'dtl'; known: {', '.join(METHODS)}$"):
        build_backbone("dtl", TINY)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"'lora' needs PEFT: pip install 'e3va\[peft\]'"):
        build_backbone("lora", TINY)
    build_backbone("mona", TINY)


# The ways to train


@pytest.mark.parametrize("method", ALL)
def test_one_step_in_detectron2(method, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from e3va.detectron2 import Trainer, load_config, register_coco_json
    from tests.detectron2 import factories as d2

    more = ("MODEL.TUNING.METHOD", method, "MODEL.FPN.OUT_CHANNELS", 16)
    train = d2.write_coco(tmp_path / "data")
    cfg = load_config(d2.DIGITS, d2.overrides(tmp_path, train, *more))
    register_coco_json(cfg)
    trainer = Trainer(cfg)
    net = wake(trainer.model.backbone.bottom_up.net)
    before = copy.deepcopy(net.state_dict())
    d2.step(trainer)
    trained = names_of_trained(net)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name

    trainer.checkpointer.save("saved")
    torch.manual_seed(1)
    other = Trainer(cfg)
    other.checkpointer.load(str(tmp_path / "out/saved.pth"))
    loaded = other.model.backbone.bottom_up.net.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in net.state_dict().items())
