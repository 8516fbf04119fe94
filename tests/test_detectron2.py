"""The Detectron2 integration, on tiny data sets made here and on a few real images."""

import argparse
import importlib
import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from e3va import FrozenSwin, trunk_config
from e3va.backbone import OutputNorm
from e3va.detectron2 import (
    E3VASwinBackbone,
    SafeCheckpointer,
    Trainer,
    add_e3va_config,
    load_config,
    register_coco_json,
)
from e3va.detectron2.train import StepTrainer, build_optimizer
from e3va.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "detectron2_configs").rglob("*.yaml"))
DIGITS = str(ROOT / "detectron2_configs/digits/mask_rcnn_e3va.yaml")
CLASSES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}]


def polygon(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def write_coco(folder: Path, annotations=None, categories=CLASSES, sizes=None) -> Path:
    """Images of mixed sizes with a rectangle each, the last image without; the JSON's path.

    ``annotations``: (image id, category id, box, segmentation) instead of the rectangles.
    """
    sizes = sizes or [(70, 50), (33, 64), (64, 90), (40, 40)]
    rectangles = [(i, 3 if i % 2 else 7, [4 + i, 6, 20, 16 + i]) for i in range(len(sizes) - 1)]
    if annotations is None:
        annotations = [(i, c, box, [polygon(*box)]) for i, c, box in rectangles]
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for image, category, (x, y, w, h) in rectangles:
            if image == i:
                pixels[y : y + h, x : x + w, 0 if category == 3 else 1] = 230
        Image.fromarray(pixels).save(folder / f"{i}.png")
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": w, "height": h}
            for i, (w, h) in enumerate(sizes)
        ],
        "annotations": [
            {
                "id": k + 1,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[-1],
                "iscrowd": 0,
                "segmentation": segmentation,
            }
            for k, (image, category, box, segmentation) in enumerate(annotations)
        ],
        "categories": categories,
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(content))
    return path


def overrides(folder: Path, train: Path, *more: object, test: Path | None = None) -> list[str]:
    values = {
        "OUTPUT_DIR": folder / "out",
        "DATASETS.COCO_JSON.TRAIN_JSON": train,
        "DATASETS.COCO_JSON.TRAIN_IMAGES": "",
        "DATASETS.COCO_JSON.TEST_JSON": test or train,
        "DATASETS.COCO_JSON.TEST_IMAGES": "",
        "MODEL.E3VA.WEIGHTS": "",
        "MODEL.DEVICE": "cpu",
        "INPUT.MASK_FORMAT": "polygon",
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 3,
        "SOLVER.WARMUP_ITERS": 0,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    }
    return [str(v) for pair in values.items() for v in pair] + [str(v) for v in more]


@pytest.fixture
def tiny(tmp_path):
    """Makes the digits config on a tiny data set, with KEY, VALUE overrides."""

    def make(*more: object):
        train = write_coco(tmp_path / "data")
        cfg = load_config(DIGITS, overrides(tmp_path, train, *more))
        register_coco_json(cfg)
        return cfg

    return make


@pytest.fixture(scope="module")
def train_net():
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(opts, *, eval_only=False, resume=False):
    return argparse.Namespace(config_file=DIGITS, opts=opts, eval_only=eval_only, resume=resume)


def step(trainer):
    with EventStorage(0) as storage:
        trainer.iter = 0
        trainer.run_step()
    return storage.latest()


def targets(size, boxes):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    instances.gt_masks = PolygonMasks(
        [[np.array(polygon(x, y, u - x, v - y))] for x, y, u, v in boxes]
    )
    return instances


# Backbones and configs


@pytest.mark.parametrize("method", METHODS)
def test_registered_backbones(tiny, method):
    cfg = tiny("MODEL.TUNING.METHOD", method)
    fpn = build_backbone(cfg)
    bottom_up = fpn.bottom_up
    assert isinstance(bottom_up, E3VASwinBackbone)
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
            n
            for n, _ in bottom_up.named_parameters()
            if n.startswith(("swin.highway", "swin.norms"))
        }

    cfg.MODEL.BACKBONE.NAME = "build_e3va_swin_backbone"
    assert isinstance(build_backbone(cfg), E3VASwinBackbone)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_is_valid(path):
    cfg = load_config(str(path))
    assert cfg.MODEL.BACKBONE.NAME in BACKBONE_REGISTRY
    assert cfg.MODEL.TUNING.METHOD == "e3va"
    assert trunk_config(cfg.MODEL.E3VA.VARIANT, window_size=cfg.MODEL.E3VA.WINDOW_SIZE)
    assert cfg.INPUT.FORMAT == "RGB"
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        assert all(s < cfg.SOLVER.MAX_ITER for s in cfg.SOLVER.STEPS)


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_mask_rcnn"])
@pytest.mark.parametrize("variant", "tsbl")
def test_coco_configs_follow_the_recipe(detector, variant):
    for schedule, epochs in (("1x", 12), ("3x", 36)):
        path = ROOT / f"detectron2_configs/coco/{detector}_e3va_swin_{variant}_{schedule}.yaml"
        cfg = load_config(str(path))
        assert cfg.MODEL.E3VA.VARIANT.endswith(variant)
        assert cfg.MODEL.E3VA.WEIGHTS.endswith(".pth")
        images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
        assert images == pytest.approx(epochs * 117266, rel=0.03)
        assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR) == ("ADAMW", 1e-4)
        assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM) == (0.05, 0.0)
        assert cfg.DATASETS.TRAIN == ("coco_2017_train",)


def test_swin_t_config_builds_its_model():
    path = ROOT / "detectron2_configs/coco/mask_rcnn_e3va_swin_t_1x.yaml"
    cfg = load_config(str(path), ["MODEL.E3VA.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    swin = build_model(cfg).backbone.bottom_up.swin
    assert {p.dtype for p in swin.trunk.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in swin.highway.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.TUNING.METHOD", "prefix", "unknown tuning method 'prefix'; known: full, frozen"),
        ("MODEL.E3VA.VARIANT", "swin_xl", "unknown trunk variant 'swin_xl'; known: swin_t"),
        ("MODEL.E3VA.TRUNK_DTYPE", "int8", "TRUNK_DTYPE must be one of float32.* got 'int8'"),
        ("MODEL.E3VA.BRANCHES", 0, "branches must be at least 1"),
        ("MODEL.E3VA.HIDDEN_RATIO", 1.5, "hidden_ratio must be in"),
        ("MODEL.PIXEL_MEAN", [0.0], "images of 3 channels, but MODEL.PIXEL_MEAN has 1"),
    ],
)
def test_bad_backbone_values(tiny, key, value, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(tiny(key, value))


def test_bad_solver_values(tiny):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="ADAMW or SGD, got 'LION'"):
        build_optimizer(tiny("SOLVER.OPTIMIZER", "LION"), model)
    cfg = tiny("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float64")
    with pytest.raises(ValueError, match=r"SOLVER.AMP.DTYPE must be one of bfloat16, float16"):
        Trainer(cfg)


def test_bad_config_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="--config-file"):
        load_config("")
    typo = tmp_path / "typo.yaml"
    typo.write_text("VERSION: 2\nMODEL:\n  E3VA:\n    VARIAN: swin_t\n")
    with pytest.raises(KeyError, match="VARIAN"):
        load_config(str(typo))
    code = tmp_path / "code.yaml"
    code.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n")
    with pytest.raises(Exception, match="python/object/apply"):
        load_config(str(code))
    assert not (tmp_path / "ran").exists()


def test_missing_weights(tiny):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build_backbone(tiny("MODEL.E3VA.WEIGHTS", "nowhere.pth"))
    with pytest.raises(FileNotFoundError, match=r"e3va://nowhere\.safetensors.*ship with e3va"):
        build_backbone(tiny("MODEL.E3VA.WEIGHTS", "e3va://nowhere.safetensors"))


def test_packaged_weights():
    """The digits config as it is starts from the trunk that ships with the package."""
    swin = build_backbone(load_config(DIGITS)).bottom_up.swin
    shipped = load_file(ROOT / "e3va/demo/swin_digits.safetensors")
    for name, weight in swin.trunk.named_parameters():
        assert torch.equal(weight, shipped[name]), name


def test_import_without_detectron2(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.delitem(sys.modules, "e3va.detectron2")
    with pytest.raises(ImportError, match="needs Detectron2, which is installed from"):
        importlib.import_module("e3va.detectron2")


def test_add_config_leaves_detectron2_defaults_alone():
    ours, theirs = get_cfg(), get_cfg()
    add_e3va_config(ours)
    del ours.MODEL["TUNING"], ours.MODEL["E3VA"], ours.MODEL["UPERNET"]
    for section in ("CLASSES", "COCO_JSON", "VOC_TREE", "SEMANTIC_MAPS"):
        del ours.DATASETS[section]
    del ours.INPUT.CROP["RESIZE"], ours.INPUT.CROP["SINGLE_CATEGORY_MAX_AREA"]
    del ours.INPUT["COLOR_JITTER"]
    del ours.TEST["SLIDE"], ours.SOLVER["POLY_LR_POWER"]
    del (
        ours.SOLVER["OPTIMIZER"],
        ours.SOLVER["BETAS"],
        ours.SOLVER["HIGHWAY_LR_FACTOR"],
        ours.SOLVER["HIGHWAY_LR_RATIO"],
        ours.SOLVER.AMP["DTYPE"],
        ours.SOLVER["ACCUMULATE"],
        ours.SOLVER["EMA"],
    )
    assert ours == theirs


# One's own data


def test_classes_come_from_the_json(tiny):
    cfg = tiny("MODEL.ROI_HEADS.NUM_CLASSES", 80)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 2
    assert cfg.DATASETS.CLASSES == ["red", "green"]
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    assert MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes == ["red", "green"]
    assert [a["category_id"] for r in records for a in r["annotations"]] == [1, 0, 1]


def test_data_sets_are_those_of_the_config_without_json(tiny):
    cfg = tiny("DATASETS.COCO_JSON.TRAIN_JSON", "", "DATASETS.TRAIN", ("coco_2017_train",))
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert cfg.DATASETS.TEST[0].startswith("coco_json:")


def test_unusable_annotations_are_dropped_and_counted(tmp_path, caplog):
    """Images 0 and 1 are 70x50 and 33x64."""
    square = [polygon(5, 5, 9, 9)]
    annotations = [
        (0, 3, [5, 5, 9, 9], square),
        (0, 3, [60, -4, 20, 14], [polygon(60, -4, 20, 14)]),  # clipped
        (0, 3, [5, 5, 0, 9], square),  # empty
        (0, 3, [5, 5, 9, -9], square),  # inside out
        (0, 3, [90, 5, 9, 9], [polygon(90, 5, 9, 9)]),  # outside
        (0, 3, [float("nan"), 5, 9, 9], square),
        (0, 7, [5, 5, 9, 9], []),  # no mask
        (1, 7, [5, 5, 0, 0], square),  # all that this image has
    ]
    cfg = load_config(DIGITS, overrides(tmp_path, write_coco(tmp_path, annotations)))
    register_coco_json(cfg)
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    assert [a["bbox"] for a in records[0]["annotations"]] == [[5, 5, 14, 14], [60, 0, 70, 10]]
    assert not records[1]["annotations"]
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "e3va.detectron2.data"]
    assert "dropped 5 instances" in warning
    assert "1 without a mask" in warning

    cfg.SOLVER.MAX_ITER = 1
    assert all(np.isfinite(value) for value, _ in step(Trainer(cfg)).values())


def test_bad_data_sets(tmp_path):
    good = write_coco(tmp_path / "good")

    def fails(error, message, *more, train=good, test=None):
        cfg = load_config(DIGITS, overrides(tmp_path, train, *more, test=test))
        with pytest.raises(error, match=message):
            register_coco_json(cfg)

    fails(
        FileNotFoundError, r"TRAIN_JSON: no file '.*nowhere\.json'", train=tmp_path / "nowhere.json"
    )
    key = "DATASETS.COCO_JSON.TEST_IMAGES"
    fails(FileNotFoundError, "TEST_IMAGES: no folder 'nowhere'", key, "nowhere")
    fails(
        ValueError, "environment variable is not set", train=Path("$E3VA_NO_SUCH_VARIABLE/a.json")
    )
    fails(ValueError, "same categories", test=write_coco(tmp_path / "one", [], CLASSES[:1]))

    text = tmp_path / "text.json"
    text.write_text("{'a': 1}")
    fails(ValueError, r"text\.json is not valid JSON", train=text)
    other = tmp_path / "other.json"
    other.write_text('{"images": [{}]}')
    fails(ValueError, "no list 'annotations'", train=other)

    rle = {"size": [50, 70], "counts": "PP1"}
    encoded = write_coco(tmp_path / "rle", [(0, 3, [5, 5, 9, 9], rle)])
    fails(ValueError, "set INPUT.MASK_FORMAT to bitmask", train=encoded)
    boxes = write_coco(tmp_path / "boxes", [(0, 3, [5, 5, 9, 9], []), (0, 3, [5, 5, 9, 9], None)])
    fails(ValueError, "set MODEL.MASK_ON to False", train=boxes)
    lost = write_coco(tmp_path / "lost")
    (lost.parent / "3.png").unlink()
    fails(FileNotFoundError, r"no image at .*3\.png, which .*coco\.json lists", test=lost)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("annotations", {"bbox": ...}, "annotation 1 of .* has no 'bbox'"),
        ("annotations", {"bbox": None}, "annotation 1 of .* has no 'bbox'"),
        ("annotations", {"id": ...}, "annotation None of .* has no 'id'"),
        ("annotations", {"id": 2}, "annotation 2 of .* is not the only one with this id"),
        ("categories", {"id": 7}, "several categories with the id 7"),
        ("categories", {"id": "7"}, r"categories\[0\] has the id '7'"),
        ("images", {"id": 1}, "several images with the id 1"),
        ("images", {"width": 70.0}, r"images\[0\] has the width 70\.0"),
        ("images", {"width": ...}, r"images\[0\] has no 'width'"),
        ("categories", None, "has no category"),
    ],
)
def test_bad_entries(tmp_path, kind, change, message):
    """Found before anything is trained; an ellipsis stands for what is missing."""
    good, path = write_coco(tmp_path / "good"), write_coco(tmp_path / "bad")
    content = json.loads(path.read_text())
    if change is None:
        content[kind] = []
    else:
        entry = content[kind][0] | change
        content[kind][0] = {k: v for k, v in entry.items() if v is not ...}
    path.write_text(json.dumps(content))
    cfg = load_config(DIGITS, overrides(tmp_path, good, test=path))
    with pytest.raises(ValueError, match=message):
        register_coco_json(cfg)


def test_what_cannot_be_scored_is_left_out(tmp_path, caplog):
    box, square = [5, 5, 9, 9], [polygon(5, 5, 9, 9)]
    annotations = [(box, square), (box, []), (box, None), ([5, 5, 9], square)]
    path = write_coco(tmp_path, [(0, 3, *annotation) for annotation in annotations])
    content = json.loads(path.read_text())
    del content["annotations"][2]["segmentation"]
    path.write_text(json.dumps(content))
    for masks, left in (("True", 1), ("False", 3)):
        caplog.clear()
        cfg = load_config(DIGITS, overrides(tmp_path, path, "MODEL.MASK_ON", masks))
        register_coco_json(cfg)
        evaluator = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
        assert len(evaluator._coco_api.loadAnns(evaluator._coco_api.getAnnIds())) == left
        assert f"{4 - left} instances are not scored" in caplog.text
        evaluator.reset()
        for record in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
            found = Instances((record["height"], record["width"]))
            found.pred_boxes = Boxes(torch.tensor([[5.0, 5, 14, 14]]))
            found.pred_classes, found.scores = torch.tensor([0]), torch.ones(1)
            found.pred_masks = torch.zeros(1, *found.image_size, dtype=torch.bool)
            found.pred_masks[:, 5:14, 5:14] = True
            evaluator.process([record], [{"instances": found}])
        assert evaluator.evaluate()["bbox"]["AP"] > 0


# Optimizer


@pytest.mark.parametrize("first", [0, 1])
def test_a_perfect_detector_scores_100(tmp_path, first):
    """Whatever number the annotations start from."""
    path = write_coco(tmp_path)
    content = json.loads(path.read_text())
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = first + i
    path.write_text(json.dumps(content))
    cfg = load_config(DIGITS, overrides(tmp_path, path))
    register_coco_json(cfg)
    evaluator = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    evaluator.reset()
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
        found = Instances((record["height"], record["width"]))
        boxes = [a["bbox"] for a in record["annotations"]]
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        found.scores = torch.ones(len(boxes))
        masks = torch.zeros(len(boxes), *found.image_size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = True
        found.pred_masks = masks
        evaluator.process([record], [{"instances": found}])
    metrics = evaluator.evaluate()
    assert metrics["bbox"]["AP"] == metrics["segm"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["ADAMW", "SGD"])
def test_optimizer_groups(tiny, method, kind):
    options = ["SOLVER.OPTIMIZER", kind, "SOLVER.HIGHWAY_LR_FACTOR", 1.0]
    options += ["SOLVER.HIGHWAY_LR_RATIO", 1.0]
    cfg = tiny("MODEL.TUNING.METHOD", method, *options)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    grouped = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(trained)
    assert {id(p) for p, _ in grouped} == {id(p) for p in trained}

    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert any(isinstance(m, OutputNorm) for m in norms)
    undecayed = {id(p) for m in norms for p in m.parameters() if p.requires_grad} | {
        id(p)
        for n, p in model.named_parameters()
        if "position_bias" in n or n.endswith((".bias", ".b", ".c", ".gamma"))
    }
    for p, group in grouped:
        assert group["weight_decay"] == (0.0 if id(p) in undecayed else 0.05)
        assert group["lr"] == cfg.SOLVER.BASE_LR


def test_the_highway_may_learn_faster(tiny):
    cfg = tiny("SOLVER.HIGHWAY_LR_FACTOR", 3.0, "SOLVER.HIGHWAY_LR_RATIO", 4.0)
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = (12 if name.endswith((".V", ".c")) else 3) if ".highway." in name else 1
            assert rates[id(parameter)] == pytest.approx(factor * cfg.SOLVER.BASE_LR)


def test_bias_decay_covers_the_highway(tiny):
    cfg = tiny("SOLVER.WEIGHT_DECAY_BIAS", 0.01)
    model = build_model(cfg)
    decay = {
        id(p): g["weight_decay"]
        for g in build_optimizer(cfg, model).param_groups
        for p in g["params"]
    }
    for stage in model.backbone.bottom_up.swin.highway.stages:
        assert decay[id(stage.b)] == decay[id(stage.c)] == 0.01
        assert decay[id(stage.P)] == decay[id(stage.V)] == 0.05


def test_gradient_clipping(tiny):
    """SGD moves by learning rate times clipped gradient."""
    cfg = tiny("SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0)
    cfg.SOLVER.BASE_LR = 1.0
    moves = {}
    for kind in ("full_model", "norm", "value"):
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
        model = nn.Linear(2, 1)
        before = model.weight.detach().clone(), model.bias.detach().clone()
        model.weight.grad, model.bias.grad = torch.tensor([[30.0, 0.0]]), torch.tensor([40.0])
        build_optimizer(cfg, model).step()
        moves[kind] = [
            (b - p).abs().sum().item() for b, p in zip(before, model.parameters(), strict=True)
        ]
    assert moves["full_model"] == pytest.approx([0.6, 0.8], rel=1e-4)
    assert moves["norm"] == pytest.approx([1.0, 1.0], rel=1e-4)
    assert moves["value"] == pytest.approx([1.0, 1.0], rel=1e-4)


# Training


def test_train_evaluate_resume(tmp_path, train_net):
    """Three iterations from given trunk weights, then evaluation alone, then two iterations."""
    trunk = dict(FrozenSwin(trunk_config("swin_digits")).named_parameters())
    save_file(trunk, tmp_path / "trunk.safetensors")
    train, test = write_coco(tmp_path / "train"), write_coco(tmp_path / "test")
    opts = overrides(
        tmp_path, train, "MODEL.E3VA.WEIGHTS", tmp_path / "trunk.safetensors", test=test
    )
    out = tmp_path / "out"

    trained = train_net.main(arguments(opts))
    assert set(trained) == {"bbox", "segm"}
    saved = torch.load(out / "model_final.pth", weights_only=True)
    prefix = "backbone.bottom_up.swin."
    assert saved["trunk"]["source"] == str(tmp_path / "trunk.safetensors")
    assert not [name for name in saved["model"] if name.startswith(f"{prefix}trunk.")]
    assert all(saved["model"][f"{prefix}highway.stages.{s}.V"].any() for s in range(4))
    assert saved["iteration"] == 2

    config = (out / "config.yaml").read_text()
    weights = ["MODEL.WEIGHTS", str(out / "model_final.pth")]
    evaluated = train_net.main(arguments(opts + weights, eval_only=True))
    for task in trained:
        assert evaluated[task] == pytest.approx(trained[task], nan_ok=True)
    assert (out / "config.yaml").read_text() == config  # which predict is given

    train_net.main(arguments([*opts, "SOLVER.MAX_ITER", "5"], resume=True))
    assert "Starting training from iteration 3" in (out / "log.txt").read_text()
    resumed = torch.load(out / "model_final.pth", weights_only=True)
    assert resumed["iteration"] == 4
    steps = resumed["trainer"]["_trainer"]["optimizer"]["state"][0]["step"]
    assert steps == 5


def test_only_what_was_trained_is_evaluated(tmp_path, train_net):
    def fails(message, *more, resume=False):
        opts = overrides(tmp_path, write_coco(tmp_path / "data"), *more)
        with pytest.raises(ValueError, match=message):
            train_net.main(arguments(opts, eval_only=True, resume=resume))

    fails("--eval-only needs MODEL.WEIGHTS")
    fails(f"a checkpoint in {tmp_path}", resume=True)
    trunk = dict(FrozenSwin(trunk_config("swin_digits")).named_parameters())
    save_file(trunk, tmp_path / "trunk.safetensors")
    fails("of another model: .* are missing", "MODEL.WEIGHTS", tmp_path / "trunk.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_cpu(tiny, dtype):
    trainer = Trainer(tiny("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype))
    assert isinstance(trainer._trainer, StepTrainer)
    seen = []
    bottom_up = trainer.model.backbone.bottom_up
    bottom_up.register_forward_hook(lambda *args: seen.extend(p.dtype for p in args[2].values()))
    trunk = {n: p.clone() for n, p in bottom_up.swin.trunk.named_parameters()}
    V = bottom_up.swin.highway.stages[0].V.detach().clone()
    for _ in range(8):  # steps are skipped until the loss scale of float16 no longer overflows
        assert np.isfinite(step(trainer)["total_loss"][0])
        if not torch.equal(bottom_up.swin.highway.stages[0].V, V):
            break
    else:
        pytest.fail("the highway never moved")
    assert set(seen) == {getattr(torch, dtype)}
    assert all(torch.equal(p, trunk[n]) for n, p in bottom_up.swin.trunk.named_parameters())
    scaler = trainer._trainer.state_dict()["grad_scaler"]
    assert bool(scaler) == (dtype == "float16")  # bfloat16 needs no scaling


def test_resume_in_another_precision(tiny):
    """Only float16 has a loss scale to save and restore."""
    amp = "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE"
    configs = tiny(), tiny(*amp, "bfloat16"), tiny(*amp, "float16")
    trainers = [Trainer(cfg)._trainer for cfg in configs]
    trainers[2]._scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for source in trainers:
        source.iter = 0
        for target in trainers:
            target.load_state_dict(source.state_dict())
    resumed = Trainer(configs[2])._trainer
    resumed.load_state_dict(trainers[2].state_dict())
    assert resumed._scaler.get_scale() == 128.0


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
    assert all(p.grad is None for p in model.backbone.bottom_up.swin.trunk.parameters())


def test_images_without_annotations_may_be_trained_on(tiny):
    cfg = tiny("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "SOLVER.IMS_PER_BATCH", 4)
    trainer = Trainer(cfg)
    batch = next(iter(trainer.data_loader))
    assert min(len(sample["instances"]) for sample in batch) == 0
    assert np.isfinite(step(trainer)["total_loss"][0])


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


# Checkpoints


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["bomb.pth", "bomb.pkl"])
def test_checkpoints_never_run_code(tmp_path, name):
    data = {"model": {"weight": Bomb(tmp_path / "ran")}}
    if name.endswith(".pth"):
        torch.save(data, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(data))
    with pytest.raises(Exception, match=r"mkdir"):
        SafeCheckpointer(nn.Linear(1, 1)).load(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_safetensors(tmp_path):
    model = nn.Linear(3, 2)
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "w.safetensors")
    SafeCheckpointer(model).load(str(tmp_path / "w.safetensors"))
    assert torch.equal(model.weight, torch.ones(2, 3))


# Real images


@pytest.mark.parametrize(("name", "classes"), [("nuclei", 1), ("microcontrollers", 6)])
def test_real_images(real_data, tmp_path, monkeypatch, name, classes):
    monkeypatch.setenv("E3VA_DATA", str(real_data))
    path = ROOT / f"detectron2_configs/real/{name}_mask_rcnn_e3va.yaml"
    keys = ["MODEL.E3VA.WEIGHTS", "", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(str(path), [*keys, "SOLVER.IMS_PER_BATCH", "2"])
    register_coco_json(cfg)
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert num_classes == classes
    trainer = Trainer(cfg)
    assert np.isfinite(step(trainer)["total_loss"][0])
    loader = iter(trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]))
    trainer.model.eval()
    with torch.no_grad():
        (output,) = trainer.model(next(loader))
    assert output["instances"].pred_masks.dtype == torch.bool


def test_real_coco_files_with_crowds(real_data, tmp_path):
    """Polygons, crowd masks in run-length encoding and category ids with gaps, as COCO has them."""
    coco = real_data / "coco_open"
    train = coco / "annotations/instances_train2017.json"
    test = coco / "annotations/instances_val2017.json"
    key = "DATASETS.COCO_JSON."
    images = [f"{key}TRAIN_IMAGES", coco / "train2017", f"{key}TEST_IMAGES", coco / "val2017"]
    small = ["INPUT.MIN_SIZE_TRAIN", (96,), "SOLVER.IMS_PER_BATCH", 2]
    cfg = load_config(DIGITS, overrides(tmp_path, train, *images, *small, test=test))
    register_coco_json(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert np.isfinite(step(Trainer(cfg))["total_loss"][0])
