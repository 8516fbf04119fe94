"""What takes less memory computes what Detectron2's own modules do."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling import build_proposal_generator, build_roi_heads
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from e3va.detectron2 import LeanROIAlign, load_config
from e3va.measure import LiveBytes
from tests.detectron2.factories import FOLDER

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
    boxes = torch.tensor([[0, 0.0, 0, 90, 60], [1, 5, 7, 9, 8], [0, -9, 3, 300, 8], [1, 2, 2, 2, 2]])
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
