"""torchvision's detectors over our backbones."""

import copy

import numpy as np
import pytest
import torch

import e3va
from tests.torchvision.conftest import (
    SMALL,
    SMALL_HEADS,
    TINY,
    backbone,
    batch,
    box_target,
    detector,
)

detection = pytest.importorskip("torchvision.models.detection")

from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign  # noqa: E402

from e3va.optim import Rates, parameter_groups  # noqa: E402
from e3va.torchvision import build_detector, mask_rcnn  # noqa: E402
from e3va.torchvision.model import DETECTORS  # noqa: E402

LOSSES = {
    "faster_rcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"},
    "retinanet": {"classification", "bbox_regression"},
}
LOSSES["mask_rcnn"] = LOSSES["faster_rcnn"] | {"loss_mask"}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("mask_rcnn", "full"),
        ("mask_rcnn", "frozen"),
        ("mask_rcnn", "e3va"),
        ("faster_rcnn", "e3va"),
        ("retinanet", "e3va"),
    ],
)
def test_one_step_trains_what_is_trainable_and_nothing_else(kind, method):
    model = detector(method, kind).train()
    if method == "e3va":  # V = 0 at first, which would stop the gradients of P, Q, b and U
        for stage in model.backbone.body.highway.stages:
            torch.nn.init.normal_(stage.V, std=0.1)
    if kind == "retinanet":  # the layers before begin so small that some gradients underflow
        for conv in (m for m in model.head.modules() if isinstance(m, torch.nn.Conv2d)):
            torch.nn.init.kaiming_uniform_(conv.weight)
    before = copy.deepcopy(model.state_dict())
    images, targets = batch()
    losses = model(images, targets)
    assert set(losses) == LOSSES[kind]
    sum(losses.values()).backward()
    unused = "backbone.body.norms.0." if kind == "retinanet" else "nothing"  # it has no p0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(unused):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    torch.optim.AdamW(parameter_groups(model, Rates(1e-3, 0.05))).step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(unused)
    }
    trunk = {k for k in before if k.startswith("backbone.body.trunk.")}
    assert trunk and (trunk <= changed if method == "full" else not trunk & changed)


@pytest.mark.parametrize("kind", SMALL_HEADS)
def test_only_empty_targets_train(kind):
    images, _ = batch()
    model = detector(kind=kind).train()
    losses = model(images, [box_target(*image.shape[-2:]) for image in images])
    total = sum(losses.values())
    total.backward()
    assert total > 0
    of_objects = {"loss_mask", "loss_box_reg", "bbox_regression"} & set(losses)
    assert of_objects and all(losses[name] == 0 for name in of_objects)


@pytest.mark.parametrize("kind", SMALL_HEADS)
def test_detections_lie_in_the_original_image(kind):
    images, _ = batch()
    threshold = "score_thresh" if kind == "retinanet" else "box_score_thresh"
    model = detector(kind=kind, **{threshold: 0.0}).eval()
    with torch.no_grad():
        for image, found in zip(images, model(images), strict=True):
            height, width = image.shape[-2:]
            assert ("masks" in found) == DETECTORS[kind].masks
            if DETECTORS[kind].masks:
                assert found["masks"].shape == (len(found["boxes"]), 1, height, width)
            assert len(found["boxes"]) and set(found["labels"].tolist()) <= {1, 2}
            assert found["boxes"].min() >= 0
            assert (found["boxes"].amax(0)[2:] <= torch.tensor([width, height])).all()


# Against what torchvision builds by itself


FEWER = {"retinanet": {}, "faster_rcnn": {"box_batch_size_per_image": 32}}
FEWER["faster_rcnn"] |= {"rpn_post_nms_top_n_train": 64, "box_detections_per_img": 8}
FEWER["mask_rcnn"] = FEWER["faster_rcnn"]


def theirs(kind, fpn, num_classes):
    """torchvision's detector over the same pyramid, with its own heads and anchors."""
    sizes = SMALL["anchor_sizes"]
    if kind == "retinanet":
        sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in sizes)
    else:
        sizes = tuple((x,) for x in sizes)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    options = {"min_size": SMALL["min_size"], "max_size": SMALL["max_size"], **FEWER[kind]}
    if kind == "retinanet":
        return detection.RetinaNet(fpn, num_classes, anchor_generator=anchors, **options)
    levels = ["p0", "p1", "p2", "p3"]
    options["rpn_anchor_generator"] = anchors
    options["box_roi_pool"] = MultiScaleRoIAlign(levels, 7, 2)
    if kind == "faster_rcnn":
        return detection.FasterRCNN(fpn, num_classes, **options)
    return detection.MaskRCNN(
        fpn, num_classes, mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2), **options
    )


@pytest.mark.parametrize("kind", SMALL_HEADS)
def test_detectors_are_torchvisions(kind):
    images, targets = batch()
    ours = build_detector(kind, backbone(), 3, **SMALL, **FEWER[kind])
    shift = 1 if kind == "retinanet" else 0  # it has no output for the background
    reference = theirs(kind, ours.backbone, 3 - shift)
    reference.load_state_dict(ours.state_dict())
    shifted = [{**target, "labels": target["labels"] - shift} for target in targets]
    losses = []
    for model, labelled in ((ours, targets), (reference, shifted)):
        torch.manual_seed(0)
        losses.append(model.train()(images, labelled))
    assert losses[0] == losses[1]
    for model in (ours, reference):
        model.eval()
        if kind == "retinanet":
            model.score_thresh = 0.0
        else:
            model.roi_heads.score_thresh = 0.0
    for found, expected in zip(ours(images), reference(images), strict=True):
        assert set(found) == set(expected) and len(found["labels"])
        expected["labels"] += shift
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_retinanet_finds_the_class_that_it_learned():
    """Labels begin at 1 in targets and in detections alike."""
    torch.manual_seed(0)
    image, target = torch.rand(3, 64, 64), box_target(64, 64, (8, 8, 40, 40))
    for label in (1, 2):
        model = detector("frozen", "retinanet").train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 5e-3)
        for _ in range(15):
            optimizer.zero_grad()
            sum(model([image], [{**target, "labels": torch.tensor([label])}]).values()).backward()
            optimizer.step()
        (found,) = model.eval()([image])
        assert found["labels"][found["scores"].argmax()] == label


# Mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SMALL_HEADS)
def test_boxes_stay_exact_under_autocast(kind, dtype):
    """In bfloat16, whole pixels beyond 256 could not be told apart."""
    threshold = "score_thresh" if kind == "retinanet" else "box_score_thresh"
    model = detector("frozen", kind, min_size=512, max_size=1024, **{threshold: 0.0}).eval()
    generator, heads = "rpn.anchor_generator", ["rpn.head", "roi_heads.box_predictor"]
    if kind == "retinanet":
        generator, heads = "anchor_generator", ["head"]
    seen = {}
    keep = lambda name: lambda module, args, output: seen.update({name: output})  # noqa: E731
    for name in ("backbone", generator, *heads):
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        found = model([torch.rand(3, 64, 128)])[0]
    assert all(p.dtype == dtype for p in seen["backbone"].values())
    anchors = seen[generator][0]
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert anchors.dtype == torch.float32
    assert len(centers[:, 0].unique()) >= (128 if kind == "retinanet" else 256)
    for name in heads:
        leaves = torch.utils._pytree.tree_leaves(seen[name])
        assert leaves and {leaf.dtype for leaf in leaves} == {torch.float32}
    assert {v.dtype for k, v in found.items() if k != "labels"} == {torch.float32}


@pytest.mark.parametrize("kind", SMALL_HEADS)
def test_bfloat16_training_step_is_near_float32(kind):
    images, targets = batch()
    model = detector(kind=kind).train()
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(sum(model(images, targets).values()))
    losses[1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.1)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", SMALL_HEADS)
def test_bad_arguments_are_named(kind):
    frozen = e3va.build_backbone("frozen", TINY)
    with pytest.raises(TypeError, match="must be a Backbone, got FrozenSwin"):
        build_detector(kind, frozen.trunk, 3)
    for classes in (1, 2.5):
        with pytest.raises(ValueError, match="counts the background"):
            build_detector(kind, frozen, classes)
    with pytest.raises(ValueError, match="5 levels, got 5"):
        build_detector(kind, frozen, 3, anchor_sizes=5)
    with pytest.raises(ValueError, match=r"5 levels, got \(8, 16\)"):
        build_detector(kind, frozen, 3, anchor_sizes=(8, 16))
    with pytest.raises(TypeError, match="no_such_option"):
        build_detector(kind, frozen, 3, no_such_option=1)
    with pytest.raises(ValueError, match="unknown detector 'yolo'; known: mask_rcnn, faster_rcnn"):
        build_detector("yolo", frozen, 3)
    score = "score_thresh" if kind == "retinanet" else "box_score_thresh"
    overlap = score.replace("score", "nms")
    for value in (-0.1, 1.5, "high", float("nan"), None, True):
        with pytest.raises(ValueError, match=f"{overlap} must be a number from 0 to 1, got"):
            build_detector(kind, frozen, 3, **{overlap: value})
    for value in (0, 1, 1.0, np.float64(0.5), np.float32(0.5)):
        build_detector(kind, frozen, 3, **{overlap: value, score: value})
    build_detector(kind, frozen, 3, **{score: -1.0})  # all are kept
    positive, negative = score.replace("score", "fg_iou"), score.replace("score", "bg_iou")
    with pytest.raises(ValueError, match=f"{positive} must not be below {negative}, got 0.1"):
        build_detector(kind, frozen, 3, **{positive: 0.1})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("mask_rcnn", "mask_channels"),
        ("mask_rcnn", "box_batch_size_per_image"),
        ("faster_rcnn", "representation_size"),
        ("faster_rcnn", "rpn_pre_nms_top_n_train"),
        ("retinanet", "out_channels"),
        ("retinanet", "min_size"),
    ],
)
@pytest.mark.parametrize("value", [-1, 0, 7.5, "abc", None, True, (), (16, 0), (16, None)])
def test_counts_are_whole_numbers(kind, name, value):
    frozen = e3va.build_backbone("frozen", TINY)
    with pytest.raises(
        ValueError, match=f"{name} must be (a whole number|whole numbers) from 1 on"
    ):
        build_detector(kind, frozen, 3, **{name: value})
    right = (16, np.int64(24)) if name in ("mask_channels", "min_size") else np.int64(24)
    build_detector(kind, frozen, 3, **{name: right})
    if name == "min_size":
        build_detector(kind, frozen, 3, min_size=[16, 24])
        with pytest.raises(
            ValueError, match=r"max_size must be a whole number from 1 on, got \[96"
        ):
            build_detector(kind, frozen, 3, max_size=[96])


def test_detectors_are_copied_whole():
    model = mask_rcnn(backbone(), 3, **SMALL, **SMALL_HEADS["mask_rcnn"]).eval()
    image = torch.rand(3, 64, 64)
    assert copy.deepcopy(model)([image])[0].keys() == model([image])[0].keys()
