"""The registered backbones, and what Detectron2 makes of them."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.export import TracingAdapter
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from e3va.detectron2 import BottomUp, load_config
from e3va.methods import METHODS
from e3va.trunks import SwinConfig
from e3va.trunks.swin import SWIN_VARIANTS
from tests.detectron2.factories import DIGITS, FOLDER, ROOT, assert_close, polygon


def targets(size, boxes):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    instances.gt_masks = PolygonMasks(
        [[np.array(polygon(x, y, u - x, v - y))] for x, y, u, v in boxes]
    )
    return instances


@pytest.mark.parametrize("method", METHODS)
def test_registered_backbones(tiny, method):
    cfg = tiny("MODEL.TUNING.METHOD", method)
    fpn = build_backbone(cfg)
    bottom_up = fpn.bottom_up
    assert isinstance(bottom_up, BottomUp)
    shapes = {name: (s.channels, s.stride) for name, s in bottom_up.output_shape().items()}
    assert shapes == {"p0": (32, 4), "p1": (64, 8), "p2": (128, 16), "p3": (256, 32)}
    assert fpn.size_divisibility == 32
    assert {n: s.stride for n, s in fpn.output_shape().items()} == {
        f"p{i}": 2**i for i in range(2, 7)
    }

    image = torch.randn(2, 3, 64, 96)
    features = bottom_up(image)
    for name, shape in bottom_up.output_shape().items():
        h, w = 64 // shape.stride, 96 // shape.stride
        assert features[name].shape == (2, shape.channels, h, w)
    assert list(fpn(image)) == ["p2", "p3", "p4", "p5", "p6"]

    trained = {n for n, p in bottom_up.named_parameters() if p.requires_grad}
    if method == "full":
        assert trained == {n for n, _ in bottom_up.named_parameters()}
    elif method == "frozen":
        assert not trained
    elif method == "e3va":
        assert trained == {
            n for n, _ in bottom_up.named_parameters() if n.startswith(("net.highway", "net.norms"))
        }

    cfg.MODEL.BACKBONE.NAME = "build_e3va_swin_backbone"
    assert isinstance(build_backbone(cfg), BottomUp)


def test_swin_t_config_builds_its_model():
    path = ROOT / "detectron2_configs/coco/mask_rcnn_e3va_swin_t_1x.yaml"
    cfg = load_config(str(path), ["MODEL.TRUNK.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    net = build_model(cfg).backbone.bottom_up.net
    assert {p.dtype for p in net.trunk.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in net.highway.parameters()} == {torch.float32}


def test_full_tuning_stores_float32(tiny, caplog):
    net = build_backbone(tiny("MODEL.TUNING.METHOD", "full", "MODEL.TRUNK.DTYPE", "float16"))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert "MODEL.TRUNK.DTYPE is of frozen weights" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.TUNING.METHOD", "prefix", "unknown tuning method 'prefix'; known: full, frozen"),
        ("MODEL.TRUNK.VARIANT", "swin_xl", "unknown trunk variant 'swin_xl'; known: swin_t"),
        ("MODEL.TRUNK.FAMILY", "convnext", "VARIANT swin_digits is a swin, but .*FAMILY is 'conv"),
        ("MODEL.TRUNK.DTYPE", "int8", "TRUNK.DTYPE must be one of float32.* got 'int8'"),
        ("MODEL.HIGHWAY.BRANCHES", 0, "branches must be at least 1"),
        ("MODEL.HIGHWAY.HIDDEN_RATIO", 1.5, "hidden_ratio must be in"),
        ("MODEL.PIXEL_MEAN", [0.0], "images of 3 channels, but MODEL.PIXEL_MEAN has 1"),
    ],
)
def test_bad_backbone_values(tiny, key, value, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(tiny(key, value))


def test_missing_weights(tiny):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build_backbone(tiny("MODEL.TRUNK.WEIGHTS", "nowhere.pth"))
    with pytest.raises(FileNotFoundError, match=r"e3va://nowhere\.safetensors.*ship with e3va"):
        build_backbone(tiny("MODEL.TRUNK.WEIGHTS", "e3va://nowhere.safetensors"))


def test_packaged_weights():
    """The digits config as it is starts from the trunk that ships with the package."""
    net = build_backbone(load_config(DIGITS)).bottom_up.net
    shipped = load_file(ROOT / "e3va/demo/swin_digits.safetensors")
    for name, weight in net.trunk.named_parameters():
        assert torch.equal(weight, shipped[name]), name


@pytest.mark.parametrize("boxes", [[], [[4.0, 5.0, 30.0, 28.0]]], ids=["no targets", "one target"])
def test_every_trained_parameter_gets_a_gradient(tiny, boxes):
    """Also where nothing is to be found, as distributed training demands."""
    model = build_model(tiny()).train()
    batch = [
        {"image": torch.randint(0, 255, (3, 40, 70)), "instances": targets((40, 70), boxes)},
        {"image": torch.randint(0, 255, (3, 66, 31)), "instances": targets((66, 31), [])},
    ]
    with EventStorage(0):
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert all(p.grad is None for p in model.backbone.bottom_up.net.trunk.parameters())


@torch.no_grad()
def test_inference_on_images_of_mixed_sizes(tiny):
    model = build_model(tiny()).eval()
    sizes = [(1, 1), (7, 40), (65, 33)]
    batch = [
        {"image": torch.randint(0, 255, (3, *s)), "height": 2 * s[0], "width": 2 * s[1]}
        for s in sizes
    ]
    for (h, w), output in zip(sizes, model(batch), strict=True):
        instances = output["instances"]
        assert instances.image_size == (2 * h, 2 * w)
        assert instances.pred_masks.shape[1:] == (2 * h, 2 * w)


def test_synchronised_norms_build(packaged):
    model = build_model(packaged("MODEL.FPN.NORM", "SyncBN"))
    assert [m for m in model.backbone.modules() if isinstance(m, nn.SyncBatchNorm)]


@pytest.mark.parametrize("method", ["e3va", "frozen"])
def test_compiled_trunk(compiler, packaged, monkeypatch, method):
    """The same features and gradients, in one graph, for each size by itself. The graph is run as
    it is: to generate code for it takes a minute."""
    compile = torch.compile
    compiled = []

    def in_one_graph(function, **options):
        compiled.append(options)
        return compile(function, **options, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", in_one_graph)
    monkeypatch.setitem(SWIN_VARIANTS, "swin_pico", SwinConfig(32, (1, 2), (1, 2)))
    more = ["MODEL.TUNING.METHOD", method, "MODEL.TRUNK.VARIANT", "swin_pico"]
    more += ["MODEL.TRUNK.WEIGHTS", "", "MODEL.BACKBONE.NAME", "build_e3va_swin_backbone"]
    image = torch.randn(1, 3, 32, 64)
    outputs = []
    for switch in (False, True):
        torch.manual_seed(1)
        backbone = build_backbone(packaged(*more, "MODEL.TRUNK.COMPILE", switch)).train()
        torch.manual_seed(2)
        maps = backbone(image)
        if maps["p0"].requires_grad:
            sum(p.sin().mean() for p in maps.values()).backward()
        gradients = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
        outputs.append({n: p.detach() for n, p in maps.items()} | gradients)
        assert compiled == [{"dynamic": False}] * switch
    assert outputs[0].keys() == outputs[1].keys()
    assert_close(*outputs, 1e-4)


@pytest.mark.parametrize("config", ["mask_rcnn_e3va", "retinanet_e3va", "upernet_e3va"])
def test_traced_models_give_equal_results(config, monkeypatch):
    """Detectron2's tracing, on another image of the traced one's size."""
    cfg = load_config(str(FOLDER / f"digits/{config}.yaml"), ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    model = build_model(cfg).eval()
    images = [torch.rand(3, 96, 130) * 255 for _ in range(2)]
    inputs = [[{"image": image}] for image in images]

    def unpasted(model, inputs):
        return [{"instances": found} for found in model.inference(inputs, do_postprocess=False)]

    infer = unpasted if config.startswith("mask_rcnn") else None  # as Detectron2's tool does
    adapter = TracingAdapter(model, inputs[0], infer)
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        (expected,) = infer(model, inputs[1]) if infer else model(inputs[1])
        (found,) = adapter.outputs_schema(traced(images[1]))
    if "sem_seg" in expected:
        torch.testing.assert_close(found["sem_seg"], expected["sem_seg"])
        return
    # By class, then score: of two classes with one score, either may come first.
    found, expected = (
        of["instances"][of["instances"].pred_classes.argsort(stable=True)]
        for of in (found, expected)
    )
    assert len(found) == len(expected) > 0
    for name, value in expected.get_fields().items():
        ours, theirs = (getattr(v, "tensor", v) for v in (found.get(name), value))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
