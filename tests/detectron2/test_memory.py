"""What takes less memory computes what Detectron2's own modules do."""

import contextlib
from functools import partial

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling import (
    FPN,
    Backbone,
    build_model,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss

from bench.step import build
from bench.step import step as whole_step
from bench.train_step import Trainee
from e3va.budget import ShapesOnly
from e3va.detectron2 import LeanConvFCHead, LeanFPN, LeanROIAlign, load_config, retinanet
from e3va.detectron2.budget import sample_batch
from e3va.detectron2.rpn import _Take
from e3va.measure import LiveBytes, whole_step_bytes
from e3va.ops.backends import native
from tests.detectron2.factories import FOLDER, SMALL

CHANNELS = 24
SIZES = {"p2": (17, 21), "p3": (9, 11), "p4": (5, 6), "p5": (3, 3), "p6": (2, 2)}
SHAPES = {f"p{s}": ShapeSpec(channels=CHANNELS, stride=2**s) for s in range(2, 7)}


def config(*overrides):
    base = str(FOLDER / "Base-MaskRCNN-E3VA-Swin-FPN.yaml")
    return load_config(base, ["MODEL.DEVICE", "cpu", *overrides])


def maps(images, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    made = {n: torch.randn(images, CHANNELS, *s, generator=generator) for n, s in SIZES.items()}
    return {n: x.to(dtype).requires_grad_() for n, x in made.items()}


def targets(*counts):
    made = []
    for count in counts:
        corner = torch.rand(count, 2) * 40
        target = Instances((68, 84))
        target.gt_boxes = Boxes(torch.cat([corner, corner + 4 + 30 * torch.rand(count, 2)], 1))
        target.gt_classes = torch.zeros(count, dtype=torch.int64)
        made.append(target)
    return made


def proposed(name, instances, *overrides):
    """Proposals, losses, what is logged, and gradients, by the generator called ``name``."""
    cfg = config("MODEL.PROPOSAL_GENERATOR.NAME", name, *overrides)
    torch.manual_seed(0)
    rpn = build_proposal_generator(cfg, SHAPES).train()
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    features = maps(len(instances))
    images = ImageList(torch.zeros(len(instances), 3, 68, 84), [(68, 84)] * len(instances))
    torch.manual_seed(0)
    with EventStorage() as storage:
        proposals, losses = rpn(images, features, instances)
        logged = {name: value for name, (value, _) in storage.latest().items()}
    (losses["loss_rpn_cls"] + 3 * losses["loss_rpn_loc"]).backward()
    gradients = {n: x.grad for n, x in (*features.items(), *rpn.named_parameters())}
    return proposals, losses, logged, gradients


@pytest.mark.parametrize("counts", [(3,), (1, 0), (5, 2)])
@pytest.mark.parametrize("loss", ["smooth_l1", "giou"])
def test_sampled_rpn(counts, loss):
    """All of the smallest map are sampled, so every border is among them."""
    torch.manual_seed(3)
    instances = targets(*counts)
    options = ("MODEL.RPN.BBOX_REG_LOSS_TYPE", loss, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 1000)
    ours, theirs = (proposed(n, instances, *options) for n in ("SampledRPN", "RPN"))
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        torch.testing.assert_close(a.objectness_logits, b.objectness_logits)
    assert ours[2] == theirs[2] and ours[2]["rpn/num_neg_anchors"] > 0
    for index in (1, 3):
        assert ours[index].keys() == theirs[index].keys()
        for name, value in theirs[index].items():
            torch.testing.assert_close(ours[index][name], value, rtol=1e-4, atol=1e-6)
    assert all(g.abs().sum() > 0 for g in theirs[3].values())


def test_sampled_rpn_under_autocast_keeps_no_hidden_map():
    """And its weights get their gradients though the head runs without autograd as well."""
    cfg = config()
    rpn = build_proposal_generator(cfg, SHAPES).train()
    features = maps(1, torch.bfloat16)
    images = ImageList(torch.zeros(1, 3, 68, 84), [(68, 84)])
    with EventStorage(), torch.autocast("cpu", torch.bfloat16), LiveBytes() as memory:
        _, losses = rpn(images, features, targets(2))
    patches = 256 * CHANNELS * 9 * 2
    assert memory.live < 8 * patches
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in rpn.parameters())


def test_sampled_rpn_refuses_heads_that_see_more():
    with pytest.raises(ValueError, match="3×3"):
        build_proposal_generator(config("MODEL.RPN.CONV_DIMS", [-1, -1]), SHAPES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 64, 100])
def test_lean_roi_align_gives_the_same_bits(dtype, channels):
    results = []
    boxes = torch.tensor(
        [[0, 0.0, 0, 90, 60], [1, 5, 7, 9, 8], [0, -9, 3, 300, 8], [1, 2, 2, 2, 2]]
    )
    for kind in (LeanROIAlign, ROIAlign):
        torch.manual_seed(0)
        x = torch.randn(2, channels, 20, 30).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            out = kind((7, 5), 0.25, 0)(x, boxes)
        out.backward(torch.randn_like(out))
        results.append((out, x.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype and theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_gradient_of_what_overlaps_is_the_same_every_time(two_threads):
    """Two threads that add to a float in any order would be seen: enough is added."""
    x = torch.randn(2, 256, 50, 50, requires_grad=True)
    highest = ((2, (512, 1, 1)), (50, (512, 3, 1)), (50, (512, 1, 3)))
    places = [torch.randint(*bounds) for bounds in highest]
    patches = _Take.apply(x, *places)
    G = torch.randn_like(patches)
    first, *others = (torch.autograd.grad(patches, x, G, retain_graph=True) for _ in range(30))
    assert all(torch.equal(first[0], other[0]) for other in others)
    expected = torch.zeros(x.shape, dtype=torch.float64)  # one after the other
    for image, row, column, g in zip(
        *(place.expand(512, 3, 3).flatten() for place in places),
        G.double().flatten(0, 2),
        strict=True,
    ):
        expected[image, :, row, column] += g
    torch.testing.assert_close(first[0], expected.float())


def test_lean_roi_align_widens_a_part_of_the_map_alone():
    x = torch.randn(1, 256, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    boxes = torch.tensor([[0, 0.0, 0, 200, 200]])
    with torch.autocast("cpu", torch.bfloat16), LiveBytes() as memory:
        LeanROIAlign((7, 7), 0.25, 0)(x, boxes).sum().backward()
    assert memory.peak < 1.8 * x.nbytes  # its gradient, and a quarter of it in float32


@pytest.mark.parametrize("name", ["LeanROIHeads", "LeanCascadeROIHeads"])
def test_lean_roi_heads_pool_leanly(name):
    heads = build_roi_heads(
        config("MODEL.ROI_HEADS.NAME", name, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        {n: s for n, s in SHAPES.items() if n != "p6"},
    )
    assert isinstance(heads, CascadeROIHeads if "Cascade" in name else StandardROIHeads)
    aligns = [m for m in heads.modules() if isinstance(m, ROIAlign)]
    assert len(aligns) == 8 and {type(m) for m in aligns} == {LeanROIAlign}


def test_lean_box_head():
    """The casts of its weights are not kept, and its gradients are those of autocast."""
    results = []
    for kind in (LeanConvFCHead, FastRCNNConvFCHead):
        torch.manual_seed(0)
        head = kind(ShapeSpec(channels=64, height=7, width=7), conv_dims=[], fc_dims=[300, 200])
        x = torch.randn(16, 64, 7, 7).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), LiveBytes() as memory:
            out = head(x)
            weight = 300 * 64 * 49 * 2
            assert (memory.live < weight) == (kind is LeanConvFCHead)
        out.float().square().sum().backward()
        results.append((out, x.grad, *(p.grad for p in head.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.std().item())
    without_autocast = LeanConvFCHead.forward(head.double(), x.double())
    assert without_autocast.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("names", "top"), [(["p3", "p4", "p5"], True), (["p4", "p5"], True), (["p3", "p4"], False)]
)
def test_lean_fpn(dtype, names, top):
    """Casts of its weights are not kept, and its results and gradients have the same bits."""
    results = []
    for kind in (LeanFPN, FPN):
        torch.manual_seed(0)
        bottom_up = _Maps()
        block = LastLevelP6P7(CHANNELS, 256, "p5") if top else None
        fpn = kind(bottom_up, names, 256, norm="GN" if len(names) == 2 else "", top_block=block)
        assert {n for n, _ in bottom_up.named_modules()} == {"", "conv"}
        assert type(bottom_up.conv) is torch.nn.Conv2d  # no part of it
        x = torch.randn(1, CHANNELS, 16, 24)
        with torch.autocast("cpu", dtype), LiveBytes() as memory:
            out = fpn(x)
        assert (memory.live < 2 * 2 * 256 * 256 * 9) == (kind is LeanFPN)
        sum((y.float() * torch.randn(y.shape)).sum() for y in out.values()).backward()
        gradients = {n: p.grad for n, p in fpn.named_parameters() if not n.startswith("bottom_up")}
        results.append({**out, **gradients, "x": bottom_up.conv.weight.grad})
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.abs().sum() > 0 and torch.equal(ours[name], value), name


class _Maps(Backbone):
    """Maps of noise that one convolution makes."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(CHANNELS, CHANNELS, 1)
        self._out_features = ["p3", "p4", "p5"]
        self._out_feature_channels = dict.fromkeys(self._out_features, CHANNELS)
        self._out_feature_strides = {"p3": 8, "p4": 16, "p5": 32}

    def forward(self, x):
        x = self.conv(x)
        return {"p3": x, "p4": x[..., ::2, ::2], "p5": x[..., ::4, ::4]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.25, -1.0, 0.0, 1.0])
@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
def test_focal_loss_in_parts(dtype, alpha, gamma, monkeypatch):
    """Of confident logits, ignored and unlabelled anchors too, against fvcore's in float32; the
    gradient as if the loss were scaled, as under float16."""
    monkeypatch.setattr(retinanet, "VALUES", 1000)
    torch.manual_seed(0)
    x = (5 * torch.randn(2, 333, 7)).to(dtype)
    x[0, :4] = torch.tensor([-60.0, 60, -0.0, 15])[:, None]
    y = torch.randint(-1, 8, (2, 333))
    ours, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
    loss = retinanet._FocalLoss.apply(ours, y, alpha, gamma)
    there = y >= 0
    targets = torch.nn.functional.one_hot(y[there], 8)[:, :-1].float()
    expected = sigmoid_focal_loss(theirs[there], targets, alpha, gamma, "sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for scaled in (64 * loss, 64 * expected):
        scaled.backward(retain_graph=True)
    with pytest.raises(AttributeError):  # whose gradient has been used up
        loss.backward()
    assert ours.grad.dtype == dtype and not ours.grad[~there].any()
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 64 * 1e-5}
    torch.testing.assert_close(ours.grad.float(), theirs.grad, **tolerance)


@pytest.mark.parametrize(("values", "counts"), [(2**19, (3,)), (500, (0, 2))])
def test_lean_retinanet(values, counts, monkeypatch):
    """Losses and gradients in one part and in many, with images that have nothing on them."""
    monkeypatch.setattr(retinanet, "VALUES", values)
    results, peaks = [], []
    for name in ("LeanRetinaNet", "RetinaNet"):
        cfg = load_config(
            str(FOLDER / "Base-RetinaNet-E3VA-Swin-FPN.yaml"),
            [word for pair in SMALL.items() for word in pair]
            + ["MODEL.META_ARCHITECTURE", name, "MODEL.RETINANET.NUM_CLASSES", 20],
        )
        torch.manual_seed(0)
        model = build_model(cfg).train()
        torch.manual_seed(5)
        images = [torch.randint(0, 256, (3, 68, 84)).float() for _ in counts]
        batch = [
            {"image": image, "instances": target}
            for image, target in zip(images, targets(*counts), strict=True)
        ]
        with EventStorage() as storage:
            losses = model(batch)
            logged = storage.latest()
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((losses, gradients, logged))
        anchors, classes = 5000, 20
        logits = torch.randn(1, anchors, classes, requires_grad=True)
        labels = torch.randint(-1, classes + 1, (1, anchors))
        nothing = [torch.zeros(anchors, 4)], [logits], [*labels], [torch.zeros(1, anchors, 4)]
        boxes = [Boxes(torch.tensor([[0.0, 0, 9, 9]]).repeat(anchors, 1))]
        _, predicted, labelled, deltas = nothing
        with EventStorage(), LiveBytes() as memory:
            made = model.losses(boxes, predicted, labelled, deltas, [boxes[0].tensor])
            made["loss_cls"].backward()
        peaks.append(memory.peak)
    for ours, theirs in zip(*(result[:2] for result in results), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert results[0][2] == results[1][2]
    assert peaks[0] < peaks[1] / 2 or values > 500


def bytes_of_a_step(config_file, size, limit, *overrides):
    model = build(str(FOLDER / config_file), "e3va", ["MODEL.TRUNK.WEIGHTS", "", *overrides])
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, 0.0, fused=True)
    batch = sample_batch(load_config(str(FOLDER / config_file), overrides), *size)
    return whole_step_bytes(
        model, adamw, lambda: whole_step(model, batch, adamw, early=True), limit
    )


@pytest.mark.parametrize(
    "config_file",
    ["coco/mask_rcnn_e3va_swin_t_1x.yaml", "coco/cascade_mask_rcnn_e3va_swin_t_1x.yaml"],
)
def test_a_step_takes_less_than_with_detectron2s_own(config_file):
    """With narrow heads, that all but the maps be small; and not a byte less is enough."""
    narrow = [word for pair in SMALL.items() for word in pair]
    own = "CascadeROIHeads" if "cascade" in config_file else "StandardROIHeads"
    names = ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.NAME", own]
    ours = bytes_of_a_step(config_file, (320, 448), None, *narrow)
    theirs = bytes_of_a_step(config_file, (320, 448), None, *narrow, *names)
    assert ours < theirs
    bytes_of_a_step(config_file, (320, 448), ours, *narrow)
    with pytest.raises(torch.OutOfMemoryError):
        bytes_of_a_step(config_file, (320, 448), ours - 2**16, *narrow)


LONG = pytest.mark.long  # much like others of the list
CAPS = [
    ("coco/mask_rcnn_e3va_swin_b_1x", (800, 1344), 1, 2048),
    ("coco/cascade_mask_rcnn_e3va_swin_b_1x", (800, 1344), 1, 1150),
    ("coco/cascade_mask_rcnn_e3va_swin_l_1x", (800, 1344), 1, 1400),
    pytest.param("coco/cascade_mask_rcnn_e3va_swin_l_1x", (800, 1333), 1, 4096, marks=LONG),
    pytest.param("coco/cascade_mask_rcnn_e3va_swin_l_1x", (800, 1333), 2, 6144, marks=LONG),
    ("coco/cascade_mask_rcnn_e3va_swin_l_1x", (800, 1333), 4, 11264),
    ("voc/retinanet_e3va_swin_l", (600, 1000), 1, 720),
]
"""Setups of bench.train_step, sizes, images, and MiB that their steps have to do with."""


@pytest.mark.parametrize(("name", "size", "images", "mib"), CAPS)
@pytest.mark.parametrize("traced", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_step_fits(name, size, images, mib, traced):
    """Traced on shapes, and for real: minutes on a CPU that has bf16, hours on others."""
    if why := native.why_not(torch.device("cpu"), torch.bfloat16):
        pytest.skip(f"attention takes more without its kernel: {why}")
    shapes = ShapesOnly() if traced else None
    trainee = Trainee(name, "e3va", size, images, shapes)
    model, adamw = trainee.model, trainee.optimizer
    run = partial(whole_step, model, trainee.batch, adamw, early=True)
    with shapes or contextlib.nullcontext():
        assert whole_step_bytes(model, adamw, run, limit=mib * 2**20) > mib * 2**17


def test_a_traced_step_that_does_not_fit_raises():
    shapes = ShapesOnly()
    trainee = Trainee(CAPS[0][0], "e3va", (320, 448), 1, shapes)
    model, adamw = trainee.model, trainee.optimizer
    run = partial(whole_step, model, trainee.batch, adamw, early=True)
    with shapes:
        needed = whole_step_bytes(model, adamw, run)
        with pytest.raises(torch.OutOfMemoryError):
            whole_step_bytes(model, adamw, run, limit=needed - 2**20)
