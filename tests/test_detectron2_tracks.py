"""Every Detectron2 config; boxes in Pascal VOC trees; semantic maps and UPerNet."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.export import TracingAdapter
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from torch import nn

from e3va import E3VABackbone, FrozenSwin, HighwayConfig, cli, trunk_config
from e3va.detectron2 import (
    SemanticInference,
    Trainer,
    UPerNetHead,
    load_config,
    register_datasets,
)
from e3va.detectron2.data import InstanceCrop, build_mapper
from e3va.detectron2.flops import HANDLES
from e3va.detectron2.semantic import SemanticMapper, read_map, semantic_inference
from e3va.detectron2.train import build_lr_scheduler
from tests.test_detectron2 import ROOT, step, write_coco

FOLDER = ROOT / "detectron2_configs"
CONFIGS = [p for p in sorted(FOLDER.rglob("*.yaml")) if "Base" not in p.name]
VOC = str(FOLDER / "digits/retinanet_e3va.yaml")
SEMANTIC = str(FOLDER / "digits/upernet_e3va.yaml")
NAMES = ["absent", "red car", "N/A"]

# The narrowest that every config can be made, but for its detector, its recipe and its precision.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.E3VA.VARIANT": "swin_digits",
    "MODEL.E3VA.WEIGHTS": "",
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 64,
    "MODEL.UPERNET.AUX_DIM": 32,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "INPUT.MASK_FORMAT": "polygon",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
}


def flat(values: dict) -> list:
    return [item for pair in values.items() for item in pair]


def write_voc(
    folder: Path, boxes=None, size=(70, 50), tags=False, stems=("a b", "c", "d.e")
) -> Path:
    """A tree of three images, the last without boxes; in "train" all of them, in "val" the first.

    ``boxes``: of the first image, (name, xmin, ymin, xmax, ymax, difficult).
    """
    boxes = boxes or [("red car", 5, 6, 30, 40, 0), ("N/A", 20, 3, 60, 33, 0)]
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem, image_boxes in zip(stems, (boxes, boxes[:1], []), strict=True):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"JPEGImages/{stem}.jpg")
        root = ElementTree.Element("annotation")
        if tags:
            side = ElementTree.SubElement(root, "size")
            ElementTree.SubElement(side, "width").text = str(size[0])
            ElementTree.SubElement(side, "height").text = str(size[1])
        for name, *corners, difficult in image_boxes:
            item = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(item, "name").text = name
            if tags:
                ElementTree.SubElement(item, "pose").text = "Unspecified"
                ElementTree.SubElement(item, "truncated").text = "0"
            if tags or difficult:
                ElementTree.SubElement(item, "difficult").text = str(difficult)
            box = ElementTree.SubElement(item, "bndbox")
            for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                ElementTree.SubElement(box, tag).text = str(value)
        ElementTree.ElementTree(root).write(folder / f"Annotations/{stem}.xml")
    (folder / "ImageSets/Main/train.txt").write_text("".join(f"{s}\n" for s in stems))
    (folder / "ImageSets/Main/val.txt").write_text(f"{stems[0]}\n")
    return folder


def write_maps(folder: Path, classes=3, size=(48, 40)) -> Path:
    """Two images to train on, one to test on; a third of their pixels is unlabelled."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 2), ("validation", 1)):
        for name in ("images", "annotations"):
            (folder / name / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{split}/{i}.jpg")
            labels = rng.integers(1, classes + 1, (size[1], size[0]), dtype=np.uint8)
            labels[: size[1] // 3] = 0
            Image.fromarray(labels).save(folder / f"annotations/{split}/{i}.png")
    names = "".join(f"{i}, class {i}\n" for i in range(1, classes + 1))
    (folder / "classes.csv").write_text(f"Pixel Value, Class\n0, background\n{names}")
    return folder


def registered(path: str, folder: Path, **more):
    overrides = {**SMALL, "OUTPUT_DIR": str(folder / "out"), **more}
    cfg = load_config(str(path), flat(overrides))
    register_datasets(cfg)
    return cfg


@pytest.fixture
def voc(tmp_path):
    def make(root=None, classes=(), **more):
        section = "DATASETS.VOC_TREE"
        given = {f"{section}.ROOT": str(root or write_voc(tmp_path / "voc"))}
        return registered(VOC, tmp_path, **given, **{f"{section}.CLASSES": classes}, **more)

    return make


@pytest.fixture
def semantic(tmp_path):
    def make(root=None, classes=(), **more):
        section = "DATASETS.SEMANTIC_MAPS"
        given = {f"{section}.ROOT": str(root or write_maps(tmp_path / "maps"))}
        return registered(SEMANTIC, tmp_path, **given, **{f"{section}.CLASSES": classes}, **more)

    return make


def infer(trainer):
    cfg = trainer.cfg
    (sample,) = next(iter(trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    model = semantic_inference(cfg, trainer.model).eval()
    with torch.no_grad():
        (output,) = model([sample])
    trainer.model.train()
    return sample, output


# Configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(FOLDER)))
def test_every_config_trains_and_infers(path, tmp_path):
    """One step and one image, on tiny data, with the narrowest trunk and heads."""
    shipped = load_config(str(path))
    data = {"COCO_JSON.TRAIN_JSON": "", "COCO_JSON.TEST_JSON": "", "VOC_TREE.ROOT": ""}
    data |= {"COCO_JSON.TRAIN_IMAGES": "", "COCO_JSON.TEST_IMAGES": ""}
    if shipped.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        data |= {"SEMANTIC_MAPS.ROOT": str(write_maps(tmp_path / "maps"))}
        data |= {"SEMANTIC_MAPS.CLASSES": []}
    elif shipped.MODEL.MASK_ON:
        json_file = str(write_coco(tmp_path / "coco"))
        data |= {"COCO_JSON.TRAIN_JSON": json_file, "COCO_JSON.TEST_JSON": json_file}
    else:
        data |= {"VOC_TREE.ROOT": str(write_voc(tmp_path / "voc")), "VOC_TREE.CLASSES": []}
        data |= {"VOC_TREE.TRAIN_SPLIT": "train", "VOC_TREE.TEST_SPLIT": "val"}
    cfg = registered(path, tmp_path, **{f"DATASETS.{key}": v for key, v in data.items()})
    trainer = Trainer(cfg)
    assert all(np.isfinite(value) for value, _ in step(trainer).values())
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None]
    assert any(".highway." in n for n in trained)
    sample, output = infer(trainer)
    if "instances" in output:
        instances = output["instances"]
        assert instances.image_size == (sample["height"], sample["width"])
        assert instances.has("pred_masks") == cfg.MODEL.MASK_ON
    else:
        assert output["sem_seg"].shape == (3, sample["height"], sample["width"])


@pytest.mark.parametrize(
    ("name", "variant", "features"),
    [
        ("coco/cascade_mask_rcnn_e3va_swin_{}_3x", "tsbl", 4),
        ("voc/retinanet_e3va_swin_{}", "bl", 3),
        ("voc/faster_rcnn_e3va_swin_{}", "bl", 4),
        ("ade20k/upernet_e3va_swin_{}", "bl", 4),
    ],
)
def test_full_size_models(name, variant, features):
    """Of their true width, on no device; the highway has the paper's number of parameters."""
    for letter in variant:
        cfg = load_config(str(FOLDER / f"{name.format(letter)}.yaml"))
        cfg.MODEL.E3VA.WEIGHTS, cfg.MODEL.DEVICE = "", "meta"
        with torch.device("meta"):
            model = build_model(cfg)
        swin = getattr(model.backbone, "bottom_up", model.backbone).swin
        assert swin.trunk.config.embed_dim == {"t": 96, "s": 96, "b": 128, "l": 192}[letter]
        assert sum(p.requires_grad for p in swin.norms.parameters()) == 2 * features
        adapters = sum(p.numel() for p in swin.highway.parameters())
        expected = {"b": 1.181e6, "l": 1.766e6}.get(letter, adapters)
        assert adapters == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("letter", "bl")
def test_lazy_configs(letter, tmp_path):
    """They agree with the YAML of the same name; narrowed, they train for a step."""
    path = FOLDER / f"lazy/cascade_mask_rcnn_e3va_swin_{letter}_3x.py"
    cfg = LazyConfig.load(str(path))
    yaml = load_config(str(FOLDER / "coco" / path.with_suffix(".yaml").name))
    swin = cfg.model.backbone.bottom_up.swin
    assert (swin.swin.trunk.variant, swin.weights) == (f"swin_{letter}", yaml.MODEL.E3VA.WEIGHTS)
    assert cfg.train.max_iter == cfg.lr_multiplier.scheduler.num_updates == yaml.SOLVER.MAX_ITER
    assert tuple(cfg.lr_multiplier.scheduler.milestones) == yaml.SOLVER.STEPS
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (1e-4, 0.05)
    assert list(cfg.model.pixel_mean) == yaml.MODEL.PIXEL_MEAN
    assert list(cfg.model.pixel_std) == pytest.approx(yaml.MODEL.PIXEL_STD)

    swin.swin.trunk.variant, swin.weights, swin.swin.dtype.name = "swin_digits", "", "float32"
    cfg.model.roi_heads.batch_size_per_image = 16
    cfg.model.proposal_generator.post_nms_topk = (20, 20)
    names = f"lazy:{letter}"
    if names not in DatasetCatalog:
        register_coco_instances(names, {}, str(write_coco(tmp_path)), str(tmp_path))
    train = cfg.dataloader.train
    train.dataset.names, train.total_batch_size, train.num_workers = names, 2, 0
    train.mapper.augmentations[1].short_edge_length = (64,)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    batch = next(iter(instantiate(train)))
    with EventStorage():
        sum(model(batch).values()).backward()
    optimizer.step()
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(decay) == set(trained.values())
    assert not [n for n, p in trained.items() if p.grad is None]
    stage = model.backbone.bottom_up.swin.highway.stages[0]
    assert (decay[stage.b], decay[stage.c], decay[stage.P]) == (0, 0, 0.05)
    assert decay[model.backbone.bottom_up.swin.norms[0].weight] == 0
    with torch.no_grad():
        (found,) = model.eval()([batch[0]])
    assert found["instances"].image_size == (batch[0]["height"], batch[0]["width"])


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
    assert len(found["instances"]) == len(expected["instances"]) > 0
    for name, value in expected["instances"].get_fields().items():
        ours, theirs = (getattr(v, "tensor", v) for v in (found["instances"].get(name), value))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_tools_of_detectron2_run_on_our_configs(tmp_path):
    """By way of python -m e3va.detectron2, which adds our keys to their configs."""
    tool = tmp_path / "tool.py"
    tool.write_text(
        "import sys\n"
        "from torch import empty\n"
        "from torch.nn import Identity\n"
        "from fvcore.nn import FlopCountAnalysis\n"
        "from detectron2.config import get_cfg\n"
        "from detectron2.modeling import BACKBONE_REGISTRY\n"
        "cfg = get_cfg()\n"
        "cfg.merge_from_file(sys.argv[1])\n"
        "assert cfg.MODEL.BACKBONE.NAME in BACKBONE_REGISTRY\n"
        "assert 'e3va::highway' in FlopCountAnalysis(Identity(), (empty(1),))._op_handles\n"
        "print(__name__, cfg.MODEL.TUNING.METHOD)\n"
    )

    def run(*arguments):
        command = [sys.executable, "-m", "e3va.detectron2", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(tool, FOLDER / "coco/cascade_mask_rcnn_e3va_swin_b_1x.yaml")
    assert done.stdout.split() == ["__main__", "e3va"], done.stderr
    assert "usage: python -m e3va.detectron2 TOOL.py" in run().stderr


def test_flops_of_our_ops():
    """Those of torchvision's Swin, where attention is made of plain products, and the adapters'."""
    swin_t = pytest.importorskip("torchvision.models").swin_t(weights=None).features.eval()
    config, image = trunk_config("swin_t"), torch.randn(1, 3, 224, 224)
    trunk = FrozenSwin(config)
    expected = FlopCountAnalysis(swin_t, image).total()

    def flops(model):
        return FlopCountAnalysis(model.eval(), image).set_op_handle(**HANDLES)

    assert flops(trunk).total() == expected
    adapters = 0
    highway = HighwayConfig(tap="output")  # the norm after a stage's last sub-layer is one more
    for s, (taps, C) in enumerate(zip(config.num_taps, config.dims, strict=True)):
        tokens, r, m = (56 // 2**s) ** 2, highway.rank, highway.hidden(C)
        adapters += taps * tokens * (2 * (C * r + r * m) + 9 * r)
    ours = flops(E3VABackbone(trunk, highway)).by_operator()
    alone = flops(trunk).by_operator()
    assert ours["highway"] + ours["sublayer_epilogue"] - alone["sublayer_epilogue"] == adapters


def test_cascade_configs_follow_the_recipe():
    for variant in "tsbl":
        cfg = load_config(str(FOLDER / f"coco/cascade_mask_rcnn_e3va_swin_{variant}_3x.yaml"))
        epoch = 117266 / cfg.SOLVER.IMS_PER_BATCH
        assert [round(s / epoch) for s in cfg.SOLVER.STEPS] == pytest.approx([27, 33], abs=1)
        assert cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads"
        assert (cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.INPUT.MIN_SIZE_TRAIN[-1]) == (480, 800)
        assert cfg.INPUT.CROP.ENABLED


def test_voc_configs_follow_the_recipe():
    for detector in ("retinanet", "faster_rcnn"):
        for variant in "bl":
            cfg = load_config(str(FOLDER / f"voc/{detector}_e3va_swin_{variant}.yaml"))
            epoch = 16551 / cfg.SOLVER.IMS_PER_BATCH
            assert pytest.approx(12 * epoch, abs=1) == cfg.SOLVER.MAX_ITER
            assert (pytest.approx(9 * epoch, abs=1),) == cfg.SOLVER.STEPS
            assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (1e-4, 0.05)
            assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((600,), 1000)
            assert cfg.DATASETS.TRAIN == ("voc_2007_trainval", "voc_2012_trainval")
            assert cfg.DATASETS.TEST == ("voc_2007_test",)
            assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 20 or detector == "retinanet"
            assert cfg.MODEL.RETINANET.NUM_CLASSES == 20 or detector == "faster_rcnn"


def test_ade20k_configs_follow_the_recipe():
    for variant in "bl":
        cfg = load_config(str(FOLDER / f"ade20k/upernet_e3va_swin_{variant}.yaml"))
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (160000, 16)
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (6e-5, 0.01)
        assert cfg.INPUT.CROP.SIZE == [512, 512]
        assert cfg.INPUT.COLOR_JITTER == 0.5
        assert cfg.MODEL.UPERNET.AUX_LOSS_WEIGHT == 0.4
        classes = MetadataCatalog.get(cfg.DATASETS.TEST[0]).stuff_classes
        assert len(classes) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 150
        parameter = nn.Parameter(torch.zeros(1))
        scheduler = build_lr_scheduler(cfg, torch.optim.AdamW([parameter], lr=6e-5))
        multiplier = scheduler._multiplier
        assert multiplier(0) == pytest.approx(0, abs=1e-5)
        assert multiplier(0.5 * 1500 / 160000) == pytest.approx(0.5, rel=0.01)
        for done in (1500, 80000, 159999):
            assert multiplier(done / 160000) == pytest.approx(1 - done / 160000)


def test_half_of_the_images_are_cropped():
    """As DETR's are: resized, cropped, then resized once more."""
    cfg = load_config(str(FOLDER / "coco/cascade_mask_rcnn_e3va_swin_t_3x.yaml"))
    mapper = build_mapper(cfg, True)
    crops = 0
    for _ in range(60):
        image = T.AugInput(np.zeros((300, 500, 3), np.uint8))
        transforms = mapper.augmentations(image).transforms
        crops += any(isinstance(t, T.CropTransform) for t in transforms)
        assert 480 <= min(image.image.shape[:2]) <= 800 or max(image.image.shape[:2]) == 1333
    assert 15 < crops < 45
    assert not any(
        isinstance(a, T.RandomApply) for a in build_mapper(cfg, False).augmentations.augs
    )


def test_crops_move_polygons():
    """And do not cut them, which Detectron2 does with a library that may not be there."""
    image = T.AugInput(np.zeros((60, 80, 3), np.uint8))
    crop = InstanceCrop("absolute", (20, 30))(image)
    assert image.image.shape == (20, 30, 3)
    polygon = np.array([[0.0, 0.0], [80.0, 0.0], [40.0, 60.0]])
    (moved,) = crop.apply_polygons([polygon])
    np.testing.assert_array_equal(moved, polygon - [crop.x0, crop.y0])


# Pascal VOC


def detections(records, shift=0.0):
    """Perfect ones, or moved by ``shift`` pixels."""
    for i, record in enumerate(records):
        found = Instances((record["height"], record["width"]))
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]]).reshape(-1, 4)
        found.pred_boxes = Boxes(boxes + shift)
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        found.scores = torch.linspace(0.9, 0.5 + 0.01 * i, len(boxes))
        yield record, {"instances": found}


def score(evaluator, pairs):
    evaluator.reset()
    for record, output in pairs:
        evaluator.process([record], [output])
    return evaluator.evaluate()["bbox"]


def test_a_perfect_detector_scores_100_on_a_tree(voc):
    """Without the tags that Detectron2's evaluator demands, with names of blanks and slashes, and
    with a class that does not occur."""
    cfg = voc(classes=NAMES)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert cfg.DATASETS.CLASSES == NAMES
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert MetadataCatalog.get(name).thing_classes == NAMES
        result = score(Trainer.build_evaluator(cfg, name), detections(DatasetCatalog.get(name)))
        assert result == {
            "AP": pytest.approx(100),
            "AP50": pytest.approx(100),
            "AP75": result["AP"],
        }


def test_trees_are_scored_as_detectron2_scores_them(voc, tmp_path):
    boxes = [("b", 5, 6, 30, 40, 0), ("b", 9, 9, 20, 22, 1), ("a", 20, 3, 60, 33, 0)]
    cfg = voc(write_voc(tmp_path / "tags", boxes, tags=True))
    name = cfg.DATASETS.TEST[0]
    records = DatasetCatalog.get(name)
    assert MetadataCatalog.get(name).thing_classes == ["a", "b"]
    # Detectron2's own evaluator cannot read names with blanks.
    root = Path(MetadataCatalog.get(name).dirname)
    for old in (root / "Annotations/a b.xml", root / "JPEGImages/a b.jpg"):
        old.rename(old.with_stem("ab"))
    (root / "ImageSets/Main/val.txt").write_text("ab\n")
    for shift in (0.0, 2.0, 6.0):
        ours = score(Trainer.build_evaluator(cfg, name), detections(records, shift))
        renamed = [{**record, "image_id": "ab"} for record in records]
        theirs = score(PascalVOCDetectionEvaluator(name), detections(renamed, shift))
        assert ours == pytest.approx(theirs)
        assert shift == 0 or ours["AP"] < 100


def test_degenerate_boxes_are_dropped_with_one_warning(voc, tmp_path, caplog):
    boxes = [
        ("a", 5, 6, 30, 40, 0),
        ("a", 5, 6, 5, 40, 0),
        ("a", 5, 46, 30, 40, 0),
        ("a", 80, 6, 99, 40, 0),  # outside
        ("a", -4, 6, 75.5, 60, 0),  # clipped
    ]
    cfg = voc(write_voc(tmp_path / "odd", boxes))
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    assert [a["bbox"] for a in records[0]["annotations"]] == [[4, 5, 30, 40], [0, 5, 70, 50]]
    Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING and "dropped" in r.msg]
    assert [w.getMessage().split(": ")[1] for w in warnings] == [
        "dropped 6 boxes without width or height"
    ]


def test_bad_trees(voc, tmp_path):
    root = write_voc(tmp_path / "voc")
    key = "DATASETS.VOC_TREE"
    with pytest.raises(FileNotFoundError, match=r"no split 'test' .*; known: train, val"):
        voc(root, **{f"{key}.TEST_SPLIT": "test"})
    with pytest.raises(ValueError, match=r"has boxes of red car, which .* lacks"):
        voc(root, classes=["N/A"])
    with pytest.raises(ValueError, match=r"set MODEL.MASK_ON to False"):
        voc(root, **{"MODEL.MASK_ON": True})
    with pytest.raises(ValueError, match="both given"):
        voc(root, **{"DATASETS.COCO_JSON.TRAIN_JSON": "a.json"})
    with pytest.raises(FileNotFoundError, match="no folder"):
        voc(tmp_path / "nowhere")
    assert voc(root, **{f"{key}.TEST_SPLIT": ""}).DATASETS.TEST == ()
    (root / "Annotations/c.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(ValueError, match=r"c\.xml is no annotation of Pascal VOC"):
        voc(root)
    (root / "Annotations/c.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"no annotation file at .*c\.xml"):
        voc(root)
    (root / "JPEGImages/a b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="no image 'a b'"):
        voc(root)


# Semantic maps


def miou(truth, found, classes):
    """The definition: intersection over union of each class that occurs, without unlabelled."""
    known = truth != 255
    ratios = []
    for label in range(classes):
        expected, got = truth == label, (found == label) & known
        if expected.any():
            ratios.append((expected & got).sum() / (expected | got).sum())
    return 100 * np.mean(ratios)


def test_miou_against_its_definition(semantic):
    cfg = semantic()
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    name = cfg.DATASETS.TEST[0]
    assert MetadataCatalog.get(name).stuff_classes == ["class 1", "class 2", "class 3"]
    assert cfg.DATASETS.CLASSES == ["class 1", "class 2", "class 3"]
    (record,) = DatasetCatalog.get(name)
    with Image.open(record["sem_seg_file_name"]) as file:
        truth = np.array(file).astype(int) - 1
    truth[truth < 0] = 255
    rng = np.random.default_rng(1)
    for wrong in (0.0, 0.3, 1.0):
        found = np.where(rng.random(truth.shape) < wrong, 1, truth % 255)
        evaluator = Trainer.build_evaluator(cfg, name)
        evaluator.reset()
        logits = torch.nn.functional.one_hot(torch.from_numpy(found), 3).permute(2, 0, 1)
        evaluator.process([record], [{"sem_seg": logits}])
        result = evaluator.evaluate()["sem_seg"]
        assert result["mIoU"] == pytest.approx(miou(truth, found, 3))
        assert wrong or result["mIoU"] == 100


def test_semantic_training_crops(semantic):
    crop = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [32, 24]}
    cfg = semantic(**crop, **{"INPUT.MIN_SIZE_TRAIN": (40,)})
    (record, _) = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    sample = SemanticMapper(cfg, True)(record)
    assert sample["image"].shape == (3, 32, 24)
    assert sample["sem_seg"].shape == (32, 24)
    assert set(sample["sem_seg"].unique().tolist()) <= {0, 1, 2, 255}
    assert "sem_seg" not in SemanticMapper(cfg, False)(record)
    with Image.open(record["sem_seg_file_name"]) as file:
        file.resize((20, 20)).save(record["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"is 20×20 pixels, but .* is 48×40"):
        SemanticMapper(cfg, True)(record)


def test_colour_jitter(semantic):
    """Each of the three factors, found again in what is left of three colours, is drawn from 0.5 to
    1.5 for every other training image; maps and test images stay as they are."""
    as_it_is = {"INPUT.MIN_SIZE_TRAIN": (0,), "INPUT.MIN_SIZE_TEST": 0, "INPUT.RANDOM_FLIP": "none"}
    cfg = semantic(**as_it_is)
    (record, _) = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    pixels = np.full((40, 48, 3), 80, np.uint8)
    pixels[10:20], pixels[20:, :, 0] = 120, 120
    Image.fromarray(pixels).save(record["file_name"], "PNG")
    plain = SemanticMapper(cfg, True)(record)
    cfg.INPUT.COLOR_JITTER = 0.5
    mapper = SemanticMapper(cfg, True)
    np.random.seed(0)
    factors = []
    for _ in range(100):
        sample = mapper(record)
        assert torch.equal(sample["sem_seg"], plain["sem_seg"])
        assert sample["image"].dtype == torch.uint8
        assert sample["image"].shape == plain["image"].shape
        dark, bright, red = sample["image"][:, (5, 15, 25), 0].T.int().tolist()
        assert max(dark) - min(dark) <= 1  # grey stays grey
        spread = (bright[0] - dark[0]) / 40
        brightness = spread + (dark[0] - 80 * spread) / pixels.mean()
        factors.append((brightness, spread / brightness, (red[0] - red[1]) / 40 / spread))
    for factor in np.array(factors).T:
        assert 0.4 < factor.min() < 0.7 and 1.3 < factor.max() < 1.6
        assert 35 < np.sum(abs(factor - 1) < 0.1) < 85
    assert (SemanticMapper(cfg, False)(record)["image"].numpy() == pixels.transpose(2, 0, 1)).all()
    cfg.INPUT.COLOR_JITTER = 1.5
    with pytest.raises(ValueError, match=r"INPUT.COLOR_JITTER must be in \[0, 1\], got 1.5"):
        SemanticMapper(cfg, True)


def test_maps_of_every_kind(tmp_path):
    values = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)
    expected = [[255, 0, 1], [2, 255, 255]]
    palette = Image.fromarray(values, "L").convert("P")
    palette.putpalette(list(range(255, 255 - 3 * 64, -1)))
    palette.putdata(values.ravel().tolist())
    for image in (Image.fromarray(values), palette, Image.fromarray(values.astype(np.uint16))):
        image.save(tmp_path / "map.png")
        assert read_map(tmp_path / "map.png", 3).tolist() == expected
        assert read_map(tmp_path / "map.png").tolist() == values.tolist()
    with pytest.raises(ValueError, match="the value 3 of 2 classes"):
        read_map(tmp_path / "map.png", 2)
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "map.png")
    with pytest.raises(ValueError, match="is RGB: a semantic map"):
        read_map(tmp_path / "map.png", 2)


def test_bad_semantic_maps(semantic, tmp_path):
    root = write_maps(tmp_path / "maps")
    assert semantic(root, classes=["x", "y", "z"]).MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    (root / "classes.csv").write_text("1,a\n3,b\n")
    with pytest.raises(ValueError, match=r"must name the values 1, 2, …, got \[1, 3\]"):
        semantic(root)
    (root / "classes.csv").unlink()
    with pytest.raises(FileNotFoundError, match="no classes"):
        semantic(root)
    with pytest.raises(ValueError, match="at most 254"):
        semantic(root, classes=[str(i) for i in range(255)])
    with pytest.raises(ValueError, match=r"needs MODEL.META_ARCHITECTURE SemanticSegmentor"):
        semantic(root, classes=["x"], **{"MODEL.META_ARCHITECTURE": "RetinaNet"})
    (root / "annotations/validation/0.png").unlink()
    with pytest.raises(FileNotFoundError, match="no map at"):
        semantic(root, classes=["x", "y", "z"])
    with pytest.raises(FileNotFoundError, match="no folder"):
        semantic(tmp_path / "nowhere", classes=["x"])


def test_predictions_of_an_image_without_labels(semantic):
    """Its loss is 0, not undefined."""
    cfg = semantic()
    for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0]):
        Image.new("L", (48, 40)).save(record["sem_seg_file_name"])
    losses = step(Trainer(cfg))
    assert losses["total_loss"][0] == 0


# UPerNet


SHAPES = {f"p{s}": ShapeSpec(channels=8 * 2**s, stride=4 * 2**s) for s in range(4)}


def features(height, width):
    sizes = [(height, width)]
    for _ in range(3):
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    return {
        name: torch.randn(2, shape.channels, *size)
        for (name, shape), size in zip(SHAPES.items(), sizes, strict=True)
    }


@pytest.mark.parametrize("size", [(16, 24), (13, 7), (1, 1)])
@pytest.mark.parametrize("norm", ["GN", "BN", ""])
def test_upernet_shapes_and_gradients(size, norm):
    head = UPerNetHead(SHAPES, num_classes=5, conv_dim=32, norm=norm, aux_dim=32)
    maps = features(*size)
    for p in maps.values():
        p.requires_grad_()
    height, width = 4 * size[0] - 1, 4 * size[1] - 3
    targets = torch.randint(0, 5, (2, height, width))
    targets[0] = 255
    _, losses = head(maps, targets)
    assert set(losses) == {"loss_sem_seg", "loss_sem_seg_aux"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(p.grad.isfinite().all() for p in maps.values())

    head.eval()
    logits, losses = head(maps)
    assert logits.shape == (2, 5, 4 * size[0], 4 * size[1])
    assert losses == {}


@pytest.mark.parametrize("norm", ["BN", "naiveSyncBN"])
def test_upernet_says_what_to_do_with_one_image(norm):
    head = UPerNetHead(SHAPES, num_classes=5, conv_dim=32, norm=norm, aux_dim=32)
    maps = {name: p[:1] for name, p in features(8, 8).items()}
    with pytest.raises(ValueError, match=r"MODEL\.SEM_SEG_HEAD\.NORM GN"):
        head(maps, torch.zeros(1, 32, 32, dtype=torch.long))
    assert head.eval()(maps)[0].isfinite().all()


def test_upernet_losses():
    """The mean over labelled pixels; the auxiliary one has its weight."""
    head = UPerNetHead(SHAPES, num_classes=5, conv_dim=32, norm="GN", aux_dim=32, dropout=0.0)
    maps, targets = features(8, 8), torch.randint(0, 5, (2, 32, 32))
    targets[:, :9] = 255
    _, losses = head(maps, targets)
    logits, _ = head.eval()(maps)
    expected = nn.functional.cross_entropy(logits, targets, ignore_index=255)
    assert losses["loss_sem_seg"].item() == pytest.approx(expected.item(), rel=1e-5)
    auxiliary = head.auxiliary(maps["p2"])
    auxiliary = nn.functional.interpolate(auxiliary, scale_factor=16, mode="bilinear")
    expected = nn.functional.cross_entropy(auxiliary, targets, ignore_index=255)
    assert losses["loss_sem_seg_aux"].item() == pytest.approx(0.4 * expected.item(), rel=1e-5)

    alone = UPerNetHead(SHAPES, num_classes=5, conv_dim=32, norm="GN", aux_loss_weight=0)
    assert set(alone(maps, targets)[1]) == {"loss_sem_seg"}
    with pytest.raises(ValueError, match="AUX_FEATURE must be one of p0, p1, p2, p3, got 'res4'"):
        UPerNetHead(SHAPES, num_classes=5, aux_feature="res4")


class Pointwise(nn.Module):
    """A segmentor that sees one pixel at a time, so that windows change nothing."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, batch):
        outputs = []
        for sample in batch:
            red, green, blue = sample["image"].float() / 100
            self.sizes.append(tuple(red.shape))
            size = sample.get("height", red.shape[0]), sample.get("width", red.shape[1])
            logits = torch.stack([red, green - blue])[None]
            outputs.append({"sem_seg": nn.functional.interpolate(logits, size, mode="bilinear")[0]})
        return outputs


@pytest.mark.parametrize(("window", "stride"), [(16, 0), (16, 16), (16, 5), (64, 0), (0, 0)])
def test_windows_cover_the_image(window, stride):
    image = torch.randint(0, 255, (3, 37, 16))
    model = Pointwise()
    (output,) = SemanticInference(model, window, stride)([{"image": image}])
    (whole,) = model([{"image": image}])
    assert torch.allclose(output["sem_seg"], whole["sem_seg"].softmax(0), atol=1e-6)
    assert all(max(size) <= window for size in model.sizes[:-1]) or window in (0, 64)


def test_several_sizes_and_mirrored():
    """Mirrored ones are mirrored back, resized ones resized back."""
    cfg = load_config(SEMANTIC, ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (32, 64)])
    ramp = torch.linspace(0, 200, 32).expand(32, 32)
    image = torch.stack([ramp, ramp.T, torch.zeros(32, 32)]).to(torch.uint8)
    sample = {"image": image, "height": 32, "width": 32}
    model = Pointwise()
    (output,) = semantic_inference(cfg, model)([sample])
    assert model.sizes == [(32, 32), (32, 32), (64, 64), (64, 64)]
    expected = model([sample])[0]["sem_seg"].softmax(0)
    assert torch.allclose(output["sem_seg"], expected, atol=0.01)


def test_bad_windows():
    with pytest.raises(ValueError, match="0 <= STRIDE <= WINDOW"):
        SemanticInference(Pointwise(), 8, 9)
    cfg = load_config(SEMANTIC)
    model = Pointwise()
    assert semantic_inference(cfg, model) is model


def test_windows_and_sizes_of_a_trained_segmentor(semantic):
    options = {"TEST.SLIDE.WINDOW": 32, "TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (32, 48)}
    trainer = Trainer(semantic(**options))
    results = trainer.test(trainer.cfg, trainer.model)
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    assert trainer.model.training


def test_predicts_as_it_is_evaluated(semantic, tmp_path, monkeypatch):
    """On windows and at several sizes, with the classes that config.yaml knows alone."""
    pytest.importorskip("cv2", reason="OpenCV is missing: predict is left untested")
    from detectron2.utils.visualizer import Visualizer

    options = {"TEST.SLIDE.WINDOW": 32, "TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (32, 48)}
    trainer = Trainer(semantic(**options))
    cfg, head = trainer.cfg, trainer.model.sem_seg_head
    nn.init.normal_(head.predictor[1].weight)
    trainer.checkpointer.save("model_final")
    (tmp_path / "out/config.yaml").write_text(cfg.dump())
    sample, expected = infer(trainer)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    image = tmp_path / "street.jpg"
    shutil.move(sample["file_name"], image)
    shutil.rmtree(tmp_path / "maps")

    names, draw = [], Visualizer.draw_sem_seg

    def keep_names(self, *args):
        names.extend(self.metadata.stuff_classes)
        return draw(self, *args)

    monkeypatch.setattr(Visualizer, "draw_sem_seg", keep_names)

    def predict(*more):
        config, weights = (str(tmp_path / "out" / n) for n in ("config.yaml", "model_final.pth"))
        given = [str(image), "--output", str(tmp_path), "--config", config, "--weights", weights]
        cli.main(["predict", *given, *more])
        with Image.open(tmp_path / "street_classes.png") as file:
            return np.array(file)

    found = predict()
    assert names == ["class 1", "class 2", "class 3"]
    assert (found == expected["sem_seg"].argmax(0).numpy()).all()
    for key, off in (("TEST.SLIDE.WINDOW", "0"), ("TEST.AUG.ENABLED", "False")):
        assert (predict("--set", key, off) != found).any()


# Data sets where Detectron2 looks for them


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    if "DETECTRON2_DATASETS" in os.environ:
        pytest.skip("$DETECTRON2_DATASETS is set: Detectron2 does not look in ./datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "datasets"


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_pascal_voc(datasets, tmp_path, detector):
    boxes = [("car", 5, 6, 30, 40, 0), ("dog", 20, 3, 60, 33, 0)]
    for year in (2007, 2012):
        stems = [f"{year}_{i}" for i in range(3)]
        root = write_voc(datasets / f"VOC{year}", boxes, tags=True, stems=stems)
        sets = root / "ImageSets/Main"
        (sets / "train.txt").rename(sets / "trainval.txt")
        shutil.copy(sets / "trainval.txt", sets / "test.txt")
    trainer = Trainer(registered(FOLDER / f"voc/{detector}_e3va_swin_b.yaml", tmp_path))
    assert np.isfinite(step(trainer)["total_loss"][0])
    assert "AP50" in trainer.test(trainer.cfg, trainer.model)["bbox"]


def test_ade20k(datasets, tmp_path):
    root = write_maps(datasets / "ADEChallengeData2016")
    (root / "annotations").rename(root / "annotations_detectron2")
    trainer = Trainer(registered(FOLDER / "ade20k/upernet_e3va_swin_b.yaml", tmp_path))
    assert np.isfinite(step(trainer)["total_loss"][0])
    results = trainer.test(trainer.cfg, trainer.model)["sem_seg"]
    assert 0 <= results["mIoU"] <= 100
    assert len([key for key in results if key.startswith("IoU-")]) == 150


# Real images


@pytest.mark.parametrize("name", ["bccd_retinanet", "indoor_semseg_upernet"])
def test_real_trees_and_maps(real_data, tmp_path, monkeypatch, name):
    monkeypatch.setenv("E3VA_DATA", str(real_data))
    cfg = load_config(
        str(FOLDER / f"real/{name}_e3va.yaml"),
        ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", 2],
    )
    register_datasets(cfg)
    trainer = Trainer(cfg)
    losses = [step(trainer)["total_loss"][0] for _ in range(3)]
    assert np.isfinite(losses).all()
    sample, output = infer(trainer)
    if name.startswith("bccd"):
        assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes == [
            "Platelets",
            "RBC",
            "WBC",
        ]
        records = [DatasetCatalog.get(n) for n in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
        assert sum(len(r["annotations"]) for group in records for r in group) == 4888 - 2
        result = score(Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0]), detections(records[1]))
        assert result["AP50"] == pytest.approx(100)
    else:
        assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 10
        assert output["sem_seg"].shape == (10, sample["height"], sample["width"])


def test_coco_at_another_place(real_data, tmp_path):
    """The COCO config as it is, but for its size; only $DETECTRON2_DATASETS says where COCO is."""
    (tmp_path / "coco").symlink_to(real_data / "coco_open")
    config = FOLDER / "coco/cascade_mask_rcnn_e3va_swin_t_1x.yaml"
    sizes = {**SMALL, "SOLVER.MAX_ITER": 1, "SOLVER.STEPS": (), "OUTPUT_DIR": tmp_path / "out"}
    arguments = [str(value) for value in flat(sizes)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config), *arguments],
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = (tmp_path / "out/metrics.json").read_text().splitlines()
    assert "bbox/AP" in json.loads(metrics[-1])
