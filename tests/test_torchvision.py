"""torchvision's Mask R-CNN over our backbones: model, COCO data, training loop, evaluation."""

import copy
import itertools
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

import e3va
from e3va.data.coco import CocoInstances, average_precision, flip
from e3va.optim import Rates, parameter_groups

pytest.importorskip("torchvision")
rle = pytest.importorskip("pycocotools.mask")

from e3va.torchvision import detect, evaluate, mask_rcnn  # noqa: E402
from e3va.torchvision.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from e3va.torchvision.train import main, schedule, train  # noqa: E402

TINY = e3va.SwinConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
SMALL_HEADS = {
    "out_channels": 16,
    "min_size": 64,
    "max_size": 96,
    "anchor_sizes": (8, 16, 32, 64, 96),
    "representation_size": 32,
    "mask_channels": (16,),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-for-bit claims should not hang on how a reduction is split among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def detector(method="e3va", seed=0, trunk_seed=0, **options):
    torch.manual_seed(trunk_seed)
    trunk = e3va.Swin(TINY).state_dict()
    torch.manual_seed(seed)
    highway = {"branches": 1, "kernel_dim": 4} if method == "e3va" else {}
    backbone = e3va.build_backbone(method, TINY, **highway)
    backbone.trunk.load_state_dict(trunk)
    return mask_rcnn(backbone, 3, **{**SMALL_HEADS, **options})


def trunk_of(model):
    return model.backbone.body.trunk


def box_target(height, width, *boxes):
    """A target of rectangles, their labels 1, 2, 1, 2, …"""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.arange(len(boxes)) % 2 + 1
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": labels, "masks": masks}


def batch():
    """Mixed sizes (one below a window), an empty target, a box one pixel high."""
    images = [torch.rand(3, 64, 90), torch.rand(3, 5, 6), torch.rand(3, 70, 48)]
    targets = [
        box_target(64, 90, (5, 5, 40, 40), (30, 20, 80, 60), (10, 50, 60, 51)),
        box_target(5, 6),
        box_target(70, 48, (4, 8, 40, 60)),
    ]
    return images, targets


def rectangle(x, y, w, h, kind="polygon", size=(60, 80)):
    if kind == "polygon":
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    mask = np.zeros(size, dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    encoded = rle.encode(mask)
    if kind == "rle":
        return {"size": list(size), "counts": encoded["counts"].decode()}
    runs = [len(list(run)) for _, run in itertools.groupby(mask.flatten(order="F"))]
    return {"size": list(size), "counts": [0] * int(mask[0, 0]) + runs}  # zeros come first


def coco_tree(folder, images=4, extra=(), seed=0):
    """A COCO tree of coloured rectangles; its ids start at 0 and its categories have gaps."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 7, "name": "wide"}, {"id": 3, "name": "tall"}]
    for i in range(images):
        pixels = random.integers(0, 80, (60, 80, 3), dtype=np.uint8)
        record = {"id": i, "file_name": f"{i}.png", "width": 80, "height": 60}
        content["images"].append(record)
        for j, kind in enumerate(("polygon", "rle", "counts")[: i % 4]):
            w, h = ((24, 12), (12, 24))[j % 2]
            x, y = int(random.integers(0, 80 - w)), int(random.integers(0, 60 - h))
            pixels[y : y + h, x : x + w] = (200, 90, 0) if w > h else (0, 90, 200)
            annotation = {
                "id": len(content["annotations"]),
                "image_id": i,
                "category_id": 7 if w > h else 3,
                "bbox": [x, y, w, h],
                "segmentation": rectangle(x, y, w, h, kind),
            }
            content["annotations"].append(annotation)
        Image.fromarray(pixels).save(folder / record["file_name"])
    content["annotations"] += extra
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def coco(folder, **options):
    return CocoInstances(coco_tree(folder, **options), folder)


def annotation(bbox, segmentation=None, **more):
    return {
        "id": 99,
        "image_id": 0,
        "category_id": 3,
        "bbox": bbox,
        "segmentation": rectangle(4, 4, 9, 9) if segmentation is None else segmentation,
        **more,
    }


# Model


@pytest.mark.parametrize("method", ["full", "frozen", "e3va"])
def test_one_step_trains_what_is_trainable_and_nothing_else(method):
    model = detector(method).train()
    if method == "e3va":  # V = 0 at first, which would stop the gradients of P, Q, b and U
        for stage in model.backbone.body.highway.stages:
            torch.nn.init.normal_(stage.V, std=0.1)
    before = copy.deepcopy(model.state_dict())
    images, targets = batch()
    losses = model(images, targets)
    assert set(losses) == {
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"
    }  # fmt: skip
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    torch.optim.AdamW(parameter_groups(model, Rates(1e-3, 0.05))).step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k, p in model.named_parameters() if p.requires_grad}
    trunk = {k for k in before if k.startswith("backbone.body.trunk.")}
    assert trunk and (trunk <= changed if method == "full" else not trunk & changed)


def test_only_empty_targets_train():
    images, _ = batch()
    model = detector().train()
    losses = model(images, [box_target(*image.shape[-2:]) for image in images])
    sum(losses.values()).backward()
    assert losses["loss_mask"] == 0 and losses["loss_box_reg"] == 0


def test_detections_lie_in_the_original_image():
    images, _ = batch()
    model = detector(box_score_thresh=0.0).eval()
    with torch.no_grad():
        for image, found in zip(images, model(images), strict=True):
            height, width = image.shape[-2:]
            assert found["masks"].shape == (len(found["boxes"]), 1, height, width)
            assert len(found["boxes"]) and set(found["labels"].tolist()) <= {1, 2}
            assert found["boxes"].min() >= 0
            assert (found["boxes"].amax(0)[2:] <= torch.tensor([width, height])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_stay_exact_under_autocast(dtype):
    """In bfloat16, whole pixels beyond 256 could not be told apart."""
    model = detector("frozen", min_size=512, max_size=1024, box_score_thresh=0.0).eval()
    seen = {}
    keep = lambda name: lambda module, args, output: seen.update({name: output})  # noqa: E731
    for name in ("backbone", "rpn.anchor_generator", "rpn.head", "rpn", "roi_heads.box_predictor"):
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        found = model([torch.rand(3, 64, 128)])[0]
    assert all(p.dtype == dtype for p in seen["backbone"].values())
    anchors = seen["rpn.anchor_generator"][0]
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert anchors.dtype == torch.float32 and len(centers[:, 0].unique()) >= 256
    assert {t.dtype for t in (*seen["rpn.head"][0], *seen["rpn.head"][1])} == {torch.float32}
    assert {t.dtype for t in seen["roi_heads.box_predictor"]} == {torch.float32}
    assert seen["rpn"][0][0].dtype == found["boxes"].dtype == torch.float32
    assert found["masks"].dtype == torch.float32


def test_bfloat16_training_step_is_near_float32():
    images, targets = batch()
    model = detector().train()
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(sum(model(images, targets).values()))
    losses[1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_bad_arguments_are_named():
    backbone = e3va.build_backbone("frozen", TINY)
    with pytest.raises(TypeError, match="Backbone, got FrozenSwin"):
        mask_rcnn(backbone.trunk, 3)
    with pytest.raises(ValueError, match="counts the background"):
        mask_rcnn(backbone, 1)
    with pytest.raises(ValueError, match=r"5 levels, got \(8, 16\)"):
        mask_rcnn(backbone, 3, anchor_sizes=(8, 16))


def test_norms_biases_and_tables_do_not_decay():
    model = detector("full")
    model.highway = e3va.Highway(TINY, e3va.HighwayConfig(1, 4))
    frozen = next(model.backbone.body.norms[0].parameters()).requires_grad_(False)
    decay, rest = parameter_groups(model, Rates(1e-3, 0.1))
    if rest["weight_decay"]:
        decay, rest = rest, decay
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decaying = {names[id(p)].rpartition(".")[2] for p in decay["params"]}
    assert decaying == {"weight", "P", "D", "g", "Q", "U", "g_up", "V"}
    assert {names[id(p)].rpartition(".")[2] for p in rest["params"]} == {
        "weight", "bias", "gamma", "b", "c", "relative_position_bias_table"
    }  # fmt: skip
    grouped = [id(p) for p in (*decay["params"], *rest["params"])]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p is not frozen)
    with pytest.raises(ValueError, match="no trainable"):
        parameter_groups(e3va.FrozenSwin(TINY), Rates(1e-3, 0.1))


def test_the_highway_may_learn_faster():
    model = detector("e3va")
    groups = parameter_groups(model, Rates(1e-3, 0.1, highway_lr_factor=2, highway_lr_ratio=5))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = (10 if name.endswith((".V", ".c")) else 2) if ".highway." in name else 1
            assert rates[id(parameter)] == pytest.approx(factor * 1e-3)


# Data


def test_masks_of_all_encodings_and_contiguous_labels(tmp_path):
    data = coco(tmp_path)
    assert len(data) == 4 and data.classes == ["tall", "wide"]
    assert data[0][1]["masks"].shape == (0, 60, 80) and data[0][1]["boxes"].shape == (0, 4)
    image, target = data[3]
    assert image.shape == (3, 60, 80) and image.dtype == torch.float32 and image.max() <= 1
    assert target["labels"].tolist() == [2, 1, 2]  # category ids 7, 3, 7
    for mask, box in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        expected = torch.zeros(60, 80, dtype=torch.uint8)
        expected[box[1] : box[3], box[0] : box[2]] = 1
        assert torch.equal(mask, expected)


def test_unusable_annotations_are_dropped_and_counted_once(tmp_path, caplog):
    extra = [
        annotation([3, 3, 0, 5]),
        annotation([3, 3, 5, -2]),
        annotation([90, 3, 5, 5]),
        annotation([float("nan"), 3, 5, 5]),
        annotation([]),
        annotation(None),
        annotation([3, 3, 5, 5], segmentation=[]),
        annotation([3, 3, 5, 5], segmentation=[[1, 2, 3, 4]]),
        annotation([-10, 50, 30, 40]),  # clipped
        annotation([10, 10, 20, 1], segmentation=rectangle(10, 10, 20, 1)),  # one pixel high
        annotation([3, 3, 5, 5], iscrowd=1),
    ]
    with caplog.at_level(logging.WARNING):
        data = coco(tmp_path, extra=extra)
    (message,) = caplog.messages
    assert "dropped 8 of 17" in message and str(data.path) in message
    assert data[0][1]["boxes"].tolist() == [[0, 50, 20, 60], [10, 10, 30, 11]]
    crowds = [a["iscrowd"] for a in data.ground_truth()["annotations"]]
    assert crowds == [0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_images_without_targets_can_be_left_out(tmp_path):
    path = coco_tree(tmp_path, extra=[annotation([3, 3, 5, 5], iscrowd=1)])
    assert len(CocoInstances(path, tmp_path)) == 4
    assert len(CocoInstances(path, tmp_path, keep_empty=False)) == 3


def test_bad_files_are_named(tmp_path):
    path = coco_tree(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        CocoInstances(tmp_path / "nowhere.json", tmp_path)
    (tmp_path / "2.png").rename(tmp_path / "3.png")
    with pytest.raises(FileNotFoundError, match=r"2\.png.*instances\.json"):
        CocoInstances(path, tmp_path)
    Image.new("RGB", (50, 40)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2\.png is 50×40 pixels.*80×60"):
        CocoInstances(path, tmp_path)[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "no list 'categories'"),
        (lambda c: c["annotations"][0].pop("segmentation"), "annotation 0 .* no 'segmentation'"),
        (lambda c: c["annotations"][1].update(image_id=77), "annotation 1 .* unknown image 77"),
        (lambda c: c["annotations"][1].update(category_id=5), "unknown category 5"),
        (
            lambda c: c["annotations"][0].update(segmentation={"counts": "PP1"}),
            "annotation 0 .* run-length encoding",
        ),
        (
            lambda c: c["annotations"][0].update(segmentation=[1, 1, 9, 1, 9, 9]),
            "annotation 0 .* no list of polygons",
        ),
        (lambda c: c["annotations"][0].update(bbox=["1", 2, 3, 4]), "no list of numbers"),
        (lambda c: c["images"][0].pop("height"), r"images\[0\] has no 'height'"),
        (lambda c: c["categories"][0].pop("id"), r"categories\[0\] has no 'id'"),
    ],
)
def test_broken_annotations_are_named(tmp_path, change, message):
    path = coco_tree(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        CocoInstances(path, tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        CocoInstances(path, tmp_path)


def test_masks_without_a_pixel_are_no_targets(tmp_path):
    path = coco_tree(tmp_path)
    content = json.loads(path.read_text())
    before = [len(target["labels"]) for _, target in CocoInstances(path, tmp_path)]
    outside = [[500.0, 500.0, 510.0, 500.0, 510.0, 510.0]]
    first = content["annotations"][0]
    content["annotations"].append({**first, "id": 99, "segmentation": outside})
    path.write_text(json.dumps(content))
    data = CocoInstances(path, tmp_path)
    assert [len(target["labels"]) for _, target in data] == before
    assert all(target["masks"].any((1, 2)).all() for _, target in data)


def test_mask_of_another_size_is_named(tmp_path):
    extra = [annotation([3, 3, 5, 5], segmentation=rectangle(3, 3, 5, 5, "rle", size=(9, 9)))]
    with pytest.raises(ValueError, match=r"annotation 99 .*\[9, 9\].*\[60, 80\]"):
        coco(tmp_path, extra=extra)[0]


def test_flip_moves_boxes_with_masks(tmp_path):
    image, target = coco(tmp_path)[3]
    mirrored, flipped = flip(image, target)
    assert torch.equal(mirrored.flip(-1), image)
    for mask, box in zip(flipped["masks"], flipped["boxes"].tolist(), strict=True):
        rows, columns = mask.nonzero().unbind(1)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


# Evaluation


class Oracle(torch.nn.Module):
    """Finds what the data set says, or something else."""

    def __init__(self, data, spoil=lambda found: found):
        super().__init__()
        self.data, self.spoil, self.calls = data, spoil, 0

    def forward(self, images):
        assert not self.training
        image, target = self.data[self.calls]
        assert torch.equal(image, images[0])
        self.calls += 1
        found = {**target, "scores": torch.ones(len(target["boxes"]))}
        return [self.spoil({**found, "masks": target["masks"][:, None].float()})]


def test_perfect_predictions_score_100(tmp_path):
    # Ids start at 0, which COCO's evaluation takes for "no match", unless they are renumbered.
    data = coco(tmp_path)
    perfect = {"box_ap": 100.0, "box_ap50": 100.0, "mask_ap": 100.0, "mask_ap50": 100.0}
    model = Oracle(data).train()
    assert evaluate(model, data, "cpu") == pytest.approx(perfect)
    assert model.training
    assert average_precision(data, json.loads(json.dumps(detect(Oracle(data), data, "cpu"))))


def test_imperfect_predictions_score_less(tmp_path):
    data = coco(tmp_path)

    def wrong_class(found):
        return {**found, "labels": 3 - found["labels"]}

    def nothing(found):
        return {k: v[:0] for k, v in found.items()}

    def half_a_mask(found):  # IoU 0.5 .. 0.55: right at the first threshold only
        masks = found["masks"].clone()
        for mask, (x1, _, x2, _) in zip(masks, found["boxes"].int().tolist(), strict=True):
            mask[..., (x1 + x2) // 2 :] = 0
        return {**found, "masks": masks}

    for spoil in (wrong_class, nothing):
        assert set(evaluate(Oracle(data, spoil), data, "cpu").values()) == {0.0}
    scores = evaluate(Oracle(data, half_a_mask), data, "cpu")
    assert scores["box_ap"] == pytest.approx(100)
    assert scores["mask_ap50"] == pytest.approx(100) and scores["mask_ap"] == pytest.approx(10)


def test_ap_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no instance"):
        average_precision(coco(tmp_path, images=1), [])


# Training

SETTINGS = {"iterations": 5, "batch_size": 2, "lr": 1e-3, "warmup": 2, "eval_period": 3}


def history(folder):
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_resumed_run_repeats_the_uninterrupted_one(tmp_path):
    data = coco(tmp_path / "data")
    whole = detector()
    result = train(whole, data, data, tmp_path / "whole", **SETTINGS, device="cpu")
    assert whole.training and result["seconds_per_iter"] > 0 and result["peak_bytes"] > 0
    steps = [entry for entry in history(tmp_path / "whole") if "loss" in entry]
    assert [entry["iteration"] for entry in steps] == [1, 2, 3, 4, 5]
    rates = [1 / 3, 2 / 3, 1, 0.75, 0.25]
    assert [entry["lr"] for entry in steps] == pytest.approx([1e-3 * rate for rate in rates])
    evaluations = [entry for entry in history(tmp_path / "whole") if "mask_ap" in entry]
    assert [entry["iteration"] for entry in evaluations] == [3, 5]

    class Interrupted(CocoInstances):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 4 * SETTINGS["batch_size"]:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        broken = Interrupted(data.path, data.folder)
        train(detector(), broken, data, tmp_path / "parts", **SETTINGS, device="cpu")
    assert len(history(tmp_path / "parts")) == 5  # four steps, one of them after the checkpoint
    torch.rand(7)  # the state of the global generator must not matter
    parts = detector(seed=1)
    resumed = train(parts, data, data, tmp_path / "parts", **SETTINGS, resume=True, device="cpu")
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    assert resumed["mask_ap"] == result["mask_ap"]
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    # A finished run has nothing left to do.
    again = train(parts, data, data, tmp_path / "parts", **SETTINGS, resume=True, device="cpu")
    assert again["mask_ap"] == result["mask_ap"]
    with pytest.raises(ValueError, match=r"lr 0\.001, not 0\.002"):
        other = {**SETTINGS, "lr": 2e-3}
        train(detector(), data, data, tmp_path / "parts", **other, resume=True, device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_with_amp_moves_the_weights_and_resumes(tmp_path, dtype):
    data = coco(tmp_path)
    settings = {"batch_size": 2, "lr": 1e-3, "amp_dtype": dtype, "device": "cpu"}
    model = detector()
    before = model.rpn.head.cls_logits.weight.detach().clone()
    train(model, data, data, tmp_path, iterations=3, **settings)
    assert not torch.equal(model.rpn.head.cls_logits.weight, before)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    train(detector(), data, data, tmp_path, iterations=3, resume=True, **settings)


def test_checkpoint_leaves_out_the_frozen_trunk_and_refuses_another(tmp_path):
    model, path = detector(), tmp_path / "checkpoint.pt"
    save_checkpoint(path, model, iteration=3)
    content = torch.load(path, weights_only=True)
    assert not any("trunk" in name for name in content["model"])
    assert any("highway" in name for name in content["model"])
    other = detector(seed=5)
    assert load_checkpoint(path, other) == {"iteration": 3}
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="frozen trunk"):
        load_checkpoint(path, detector(trunk_seed=1))
    with pytest.raises(ValueError, match="frozen trunk"):
        load_checkpoint(path, detector("full"))
    with pytest.raises(ValueError, match="another model"):
        load_checkpoint(path, detector(representation_size=64))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_checkpoint(tmp_path / "nowhere.pt", model)


def test_full_checkpoint_holds_the_trunk(tmp_path):
    model = detector("full")
    save_checkpoint(tmp_path / "checkpoint.pt", model)
    other = detector("full", trunk_seed=1)
    load_checkpoint(tmp_path / "checkpoint.pt", other)
    for a, b in zip(trunk_of(model).parameters(), trunk_of(other).parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_failed_evaluation_loses_nothing_trained(tmp_path):
    data = coco(tmp_path / "data")

    class Unreadable(CocoInstances):
        def image(self, index):
            raise OSError("no such image")

    settings = {**SETTINGS, "eval_period": None, "device": "cpu"}
    with pytest.raises(OSError, match="no such image"):
        train(detector(), data, Unreadable(data.path, data.folder), tmp_path / "run", **settings)
    with (tmp_path / "run" / "history.jsonl").open("a") as file:
        file.write('{"iteration": 5, "lo')  # a line whose writing was interrupted
    result = train(detector(seed=1), data, data, tmp_path / "run", **settings, resume=True)
    assert result["mask_ap"] >= 0
    assert [e["iteration"] for e in history(tmp_path / "run")] == [1, 2, 3, 4, 5, 5]
    assert "mask_ap" in history(tmp_path / "run")[-1]


def test_a_new_run_does_not_go_on_from_an_old_ones_checkpoint(tmp_path):
    data = coco(tmp_path / "data")
    settings = {"batch_size": 2, "lr": 1e-3, "device": "cpu"}
    train(detector(), data, data, tmp_path, iterations=2, **settings)
    broken = detector()
    torch.nn.init.constant_(broken.rpn.head.cls_logits.bias, float("nan"))
    with pytest.raises(FloatingPointError):
        train(broken, data, data, tmp_path, iterations=2, **settings)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert load_checkpoint(tmp_path / "checkpoint.previous.pt", detector())["iteration"] == 2


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "foreign"])
def test_foreign_checkpoints_are_named(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"weights": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged or no checkpoint"):
        load_checkpoint(path, detector())


def test_bad_runs_are_refused(tmp_path):
    data = coco(tmp_path / "data")

    def run(train_data=data, model=None, val_data=data, **changes):
        settings = {"iterations": 2, "batch_size": 1, "lr": 1e-3, **changes}
        train(model or detector(), train_data, val_data, tmp_path / "out", device="cpu", **settings)

    for changes, message in [
        ({"iterations": 0}, "iterations"),
        ({"lr": 0.0}, "lr must be positive, got 0"),
        ({"warmup": 2}, "warmup must be in"),
        ({"eval_period": 0}, "eval_period"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(**changes)
    path = coco_tree(tmp_path / "empty", images=1)
    empty = CocoInstances(path, tmp_path / "empty", keep_empty=False)
    with pytest.raises(ValueError, match="no image to train on"):
        run(empty)
    path.write_text(path.read_text().replace("wide", "broad"))
    with pytest.raises(ValueError, match=r"different classes.*broad.*wide"):
        run(CocoInstances(path, tmp_path / "empty"))
    with pytest.raises(ValueError, match="no instance to find"):
        bare = json.loads(data.path.read_text()) | {"annotations": []}
        (data.folder / "bare.json").write_text(json.dumps(bare))
        run(val_data=CocoInstances(data.folder / "bare.json", data.folder))
    broken = detector()
    torch.nn.init.constant_(broken.rpn.head.cls_logits.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="iteration 1"):
        run(model=broken)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_schedule_warms_up_and_ends_near_zero():
    rates = [schedule(i, 10, 3) for i in range(10)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == sorted(rates[3:], reverse=True) and 0 < rates[-1] < 0.06
    assert schedule(0, 1, 0) == 1


def test_a_few_steps_lower_the_loss(tmp_path):
    data = coco(tmp_path / "data", images=8)
    settings = {"iterations": 40, "batch_size": 2, "lr": 3e-3, "warmup": 5, "device": "cpu"}
    train(detector(), data, data, tmp_path / "out", **settings)
    losses = [entry["loss"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


def test_command_line(tmp_path, capsys):
    from safetensors.torch import save_file

    path = coco_tree(tmp_path / "data")
    trunk = e3va.Swin(e3va.trunk_config("swin_digits"))
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    arguments = ["--method", "e3va", "--variant", "swin_digits", "--output", str(tmp_path / "out")]
    arguments += ["--weights", str(tmp_path / "trunk.safetensors"), "--device", "cpu"]
    for split in ("train", "val"):
        arguments += [f"--{split}-json", str(path), f"--{split}-images", str(path.parent)]
    arguments += ["--iterations", "1", "--batch-size", "1", "--min-size", "64", "--max-size", "96"]
    arguments += ["--out-channels", "16", "--representation-size", "16", "--mask-channels", "8"]
    arguments += ["--rois", "16"]
    main([*arguments, "--amp", "bfloat16"])
    report = json.loads(capsys.readouterr().out)
    assert {"mask_ap", "box_ap", "trainable_params", "seconds_per_iter"} <= set(report)
    assert (tmp_path / "out" / "checkpoint.pt").is_file()
    with pytest.raises(SystemExit):
        main(["--iterations", "1"])


# Real images


def test_real_annotations_are_read(real_data):
    nuclei = CocoInstances(real_data / "nuclei/instances_val.json", real_data / "nuclei/images")
    assert len(nuclei) == 70 and len(nuclei.ground_truth()["annotations"]) == 2641
    boards = real_data / "microcontrollers/valid"
    boards = CocoInstances(boards / "_annotations.coco.json", boards)
    places = real_data / "coco_open"
    places = CocoInstances(places / "annotations/instances_val2017.json", places / "val2017")
    assert (len(boards), len(places), len(places.classes)) == (15, 20, 80)
    for data in (nuclei, boards, places):
        _, target = data[0]
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (found - box).abs().max() <= 2
    truth = Oracle(boards)
    assert evaluate(truth, boards, "cpu")["mask_ap"] == pytest.approx(100)
    assert average_precision(boards, [])["mask_ap"] == 0
