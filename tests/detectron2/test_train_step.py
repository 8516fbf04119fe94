"""What bench.step and bench.train_step measure, on detectors small enough for it."""

import contextlib
import json

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its steps are not measured")

from bench import growth, step, train_step
from e3va.budget import ShapesOnly
from e3va.measure import SPLIT, LiveBytes
from e3va.optim import take_step
from tests.detectron2.factories import SMALL as NARROW
from tests.detectron2.factories import flat

SMALL = {
    "digits/mask_rcnn_e3va": (64, 96),
    "digits/retinanet_e3va": (64, 96),
    "digits/upernet_e3va": (64, 96),
}
PARTS = ("forward", "backward", "optimizer")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(train_step, "SETUPS", SMALL)


def count(trainee, early):
    """Live bytes of a step's activations beside the gradients, and of all that a whole one has."""
    model, optimizer = trainee.model, trainee.optimizer
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()  # makes its state
    torch.manual_seed(0)
    with LiveBytes() as activations:
        trainee.loss().backward()
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(0)
    with LiveBytes() as whole:
        take_step(trainee.loss, optimizer, early)
    there = sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters())
    steps = sum(4 for p in model.parameters() if p.requires_grad)
    there += steps + sum(buffer.nbytes for buffer in model.buffers())
    return activations.peak, there + whole.peak


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", ["stock", "full", "e3va"])
def test_split_sums_to_an_independent_count(name, method):
    trainee = train_step.Trainee(name, method, SMALL[name], 2)
    stock = method == "stock"
    costs = step.measure(trainee.model, trainee.batch, trainee.optimizer, stock)
    activations, whole = count(train_step.Trainee(name, method, SMALL[name], 2), early=not stock)
    split = costs["split"]
    assert costs["peak_live_bytes"] == activations
    assert costs["total_bytes"] == sum(split.values()) == whole
    assert tuple(split) == SPLIT and min(split.values()) >= 0
    assert bool(split["neck"]) == bool(split["proposals"]) == (name != "digits/upernet_e3va")
    if method == "e3va":  # its maps are among what it saves, and nothing else outlives its forward
        assert split["backbone_saved"] >= costs["saved_bytes"] > 0
        assert split["backbone_saved"] < costs["saved_bytes"] * 1.05


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", ["stock", "full", "lora", "e3va"])
def test_the_bytes_are_the_same_without_the_arithmetic(name, method):
    results = []
    for shapes in (None, ShapesOnly()):
        trainee = train_step.Trainee(name, method, SMALL[name], 1, shapes)
        with shapes or contextlib.nullcontext():
            results.append(step.measure(trainee.model, trainee.batch, trainee.optimizer))
    real, counted = results
    assert counted["trainable_params"] == real["trainable_params"]
    for key in ("neck", "optimizer", "trunk_weights", "other_weights"):
        assert counted["split"][key] == real["split"][key]
    # A kernel may keep the statistics of a norm in another dtype.
    assert counted["saved_bytes"] == pytest.approx(real["saved_bytes"], rel=3e-3)
    # How many regions are positive depends on values, and so how far the backward is at the peak.
    real, counted = (
        r["total_bytes"] - r["split"]["heads"] - r["split"]["gradients"] for r in (real, counted)
    )
    assert counted == pytest.approx(real, rel=3e-3)


def test_results_are_kept_and_continued(small, tmp_path, monkeypatch, capsys):
    file, picture = tmp_path / "steps.json", tmp_path / "steps.png"
    options = ["--setup", *list(SMALL)[:1], "--json", str(file), "--repeats", "1"]
    train_step.main([*options, "--methods", "full"])
    full = json.loads(file.read_text())["setups"]["digits/mask_rcnn_e3va"]["full"]
    built = []
    trainee = train_step.Trainee
    monkeypatch.setattr(train_step, "Trainee", lambda *a, **k: built.append(a) or trainee(*a, **k))
    train_step.main([*options, "--methods", "full"])
    assert not built, "what is there is measured again"
    report = train_step.main([*options, "--methods", "full", "e3va", "--plot", str(picture)])
    assert json.loads(file.read_text()) == report
    assert report["batch"] == 1 and "device" in report["environment"]
    methods = report["setups"]["digits/mask_rcnn_e3va"]
    assert {**methods["full"], "seconds_per_step": 0} | {
        f"{part}_seconds": 0 for part in PARTS
    } == {**full, "seconds_per_step": 0} | {f"{part}_seconds": 0 for part in PARTS}
    for result in methods.values():
        assert result["seconds_per_step"] > max(result[f"{part}_seconds"] for part in PARTS) > 0
        assert sum(result["split"].values()) == result["total_bytes"] > result["peak_live_bytes"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Memory that e3va saves" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="name another file with --json"):
        train_step.main([*options, "--batch", "2"])
    for garbage in ("", "[]", "{}"):
        file.write_text(garbage)
        with pytest.raises(SystemExit, match="holds no results to go on from"):
            train_step.main(options)


def test_average_saving_is_the_papers():
    """Its table: 17061 and 7639 MB on COCO, 15679 and 4819 on VOC; its abstract says 62.2 %."""
    coco, voc, ade20k = train_step.BENCHMARKS
    setups = {
        coco: {"full": {"total_bytes": 17061}, "e3va": {"total_bytes": 7639}},
        voc: {"full": {"total_bytes": 15679}, "e3va": {"total_bytes": 4819}},
    }
    average = train_step.average_saving(setups, "total_bytes", (coco, voc))
    assert round(average, 1) == train_step.PUBLISHED["total_bytes"]
    assert train_step.average_saving(setups, "total_bytes") is None
    setups[ade20k] = {"full": {"total_bytes": 200}, "e3va": {"total_bytes": 150}}
    by_hand = (55.2253 + 69.2646 + 25) / 3
    assert train_step.average_saving(setups, "total_bytes") == pytest.approx(by_hand, abs=1e-3)
    assert train_step.average_saving(setups, "seconds_per_step") is None
    assert train_step.average(setups, "total_bytes").endswith("the paper says 62.2 %")


def test_growth(tmp_path, monkeypatch):
    """A square of twice the side, or four images, take four times what an image adds."""
    points = [growth.Point(side, (side, side)) for side in (64, 128)]
    monkeypatch.setattr(growth, "AXES", {"side": points, "images": [growth.Point(4, (64, 64), 4)]})
    monkeypatch.setattr(growth, "CONFIG", "digits/upernet_e3va")  # whose steps no value changes
    file, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    options = ["--methods", "full", "e3va", "--json", str(file), "--plot", str(picture)]
    report = growth.main(options)
    assert json.loads(file.read_text()) == report
    axes = report["axes"]
    for method in ("full", "e3va"):
        (_, small), (_, large) = axes["side"][method]
        ((_, four),) = axes["images"][method]
        assert small < large == pytest.approx(four, rel=0.05)
    assert axes["side"]["e3va"][1][1] < axes["side"]["full"][1][1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_step_alone(tmp_path):
    file = tmp_path / "step.json"
    config = str(train_step.CONFIGS / "digits/mask_rcnn_e3va.yaml")
    methods = ["stock", "e3va", "e3va/own"]
    options = ["--config-file", config, "--methods", *methods, "--size", "64", "96"]
    options += ["--repeats", "1", "--json", str(file)]
    step.main([*options, "MODEL.TRUNK.WEIGHTS", ""])
    report = json.loads(file.read_text())
    assert report["size"] == [64, 96] and report["config"] == config
    keys = ("backbone_trainable_params", "saved_bytes", "peak_live_bytes", "total_bytes")
    for result in report["methods"].values():
        assert all(key in result for key in keys) and result["seconds_per_step"] > 0
    assert list(report["methods"]) == methods
    assert report["methods"]["stock"]["saved_bytes"] == 0


def test_a_step_in_float32(monkeypatch):
    """Neither autocast nor a trunk stored in another dtype, whatever the config says."""
    config = str(train_step.CONFIGS / "coco/mask_rcnn_e3va_swin_t_1x.yaml")
    built, computed = [], set()

    def model(batch):
        computed.add(torch.is_autocast_enabled(step.DEVICE))
        return {"loss": torch.zeros((), requires_grad=True)}

    def build(file, method, overrides):
        built.append(step.config_of(file, method, overrides).MODEL.TRUNK.DTYPE)
        return model

    def measure(model, batch, optimizer, stock, amp):
        step.loss(model, batch, step.DEVICE, amp)
        return dict.fromkeys(("peak_live_bytes", "total_bytes", "saved_bytes"), 0)

    monkeypatch.setattr(step, "build", build)
    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr("e3va.detectron2.solver.build_optimizer", lambda cfg, model: None)
    options = ["--config-file", config, "--methods", "e3va", "--size", "32", "32"]
    for more, dtype, amp in ((["--float32"], "float32", False), ([], "bfloat16", True)):
        built.clear(), computed.clear()
        step.main([*options, "--repeats", "1", *more])
        assert (built, computed) == ([dtype], {amp})


@pytest.mark.parametrize("method", ["stock", "e3va/own", "e3va"])
def test_own_heads_are_detectron2s(method):
    """And FPN, of which nothing of ours is left."""
    config = str(train_step.CONFIGS / "coco/mask_rcnn_e3va_swin_t_1x.yaml")
    model = step.build(config, method, flat(NARROW))
    found = {type(m).__name__ for m in model.modules()} & {*step.STOCK, "LeanConv2d"}
    lean = {"SampledRPN", "LeanROIHeads", "LeanConvFCHead", "LeanConv2d"}
    assert found == (lean if method == "e3va" else set())
