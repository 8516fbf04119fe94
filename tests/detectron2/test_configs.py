"""Every file of detectron2_configs: its recipe, and that it trains and infers."""

import os
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.utils.events import EventStorage
from torch import nn

from e3va import trunk_config
from e3va.detectron2 import Trainer, load_config
from e3va.detectron2.solver import build_lr_scheduler
from tests.detectron2.factories import (
    FOLDER,
    ROOT,
    infer,
    registered,
    step,
    write_coco,
    write_maps,
    write_voc,
)

ALL = sorted(FOLDER.rglob("*.yaml"))
CONFIGS = [p for p in ALL if "Base" not in p.name]


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_is_valid(path):
    cfg = load_config(str(path))
    assert cfg.MODEL.BACKBONE.NAME in BACKBONE_REGISTRY
    assert cfg.MODEL.TUNING.METHOD == "e3va"
    assert trunk_config(cfg.MODEL.TRUNK.VARIANT)
    assert cfg.INPUT.FORMAT == "RGB"
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":  # what takes less memory is on by default
        assert cfg.MODEL.PROPOSAL_GENERATOR.NAME == "SampledRPN"
        assert cfg.MODEL.ROI_HEADS.NAME in ("LeanROIHeads", "LeanCascadeROIHeads")
        assert cfg.MODEL.ROI_BOX_HEAD.NAME == "LeanConvFCHead"
    else:
        assert cfg.MODEL.META_ARCHITECTURE in ("LeanRetinaNet", "SemanticSegmentor")
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        assert all(s < cfg.SOLVER.MAX_ITER for s in cfg.SOLVER.STEPS)


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
    assert not [n for n, p in trained.items() if p not in trainer.optimizer.state]
    assert any(".highway." in n for n in trained)
    sample, output = infer(trainer)
    if "instances" in output:
        instances = output["instances"]
        assert instances.image_size == (sample["height"], sample["width"])
        assert instances.has("pred_masks") == cfg.MODEL.MASK_ON
    else:
        assert output["sem_seg"].shape == (3, sample["height"], sample["width"])


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_mask_rcnn"])
@pytest.mark.parametrize("variant", "tsbl")
def test_coco_configs_follow_the_recipe(detector, variant):
    for schedule, epochs in (("1x", 12), ("3x", 36)):
        path = ROOT / f"detectron2_configs/coco/{detector}_e3va_swin_{variant}_{schedule}.yaml"
        cfg = load_config(str(path))
        assert cfg.MODEL.TRUNK.VARIANT.endswith(variant)
        assert cfg.MODEL.TRUNK.WEIGHTS.endswith(".pth")
        images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
        assert images == pytest.approx(epochs * 117266, rel=0.03)
        assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR) == ("ADAMW", 1e-4)
        assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM) == (0.05, 0.0)
        assert cfg.DATASETS.TRAIN == ("coco_2017_train",)


def test_cascade_configs_follow_the_recipe():
    for variant in "tsbl":
        cfg = load_config(str(FOLDER / f"coco/cascade_mask_rcnn_e3va_swin_{variant}_3x.yaml"))
        epoch = 117266 / cfg.SOLVER.IMS_PER_BATCH
        assert [round(s / epoch) for s in cfg.SOLVER.STEPS] == pytest.approx([27, 33], abs=1)
        assert cfg.MODEL.ROI_HEADS.NAME == "LeanCascadeROIHeads"
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
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (3e-4, 0.01)
        assert cfg.INPUT.CROP.SIZE == [512, 512]
        assert cfg.INPUT.COLOR_JITTER == 0.5
        assert cfg.MODEL.UPERNET.AUX_LOSS_WEIGHT == 0.4
        classes = MetadataCatalog.get(cfg.DATASETS.TEST[0]).stuff_classes
        assert len(classes) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 150
        parameter = nn.Parameter(torch.zeros(1))
        scheduler = build_lr_scheduler(cfg, torch.optim.AdamW([parameter], lr=3e-4))
        multiplier = scheduler._multiplier
        assert multiplier(0) == pytest.approx(0, abs=1e-5)
        assert multiplier(0.5 * 1500 / 160000) == pytest.approx(0.5, rel=0.01)
        for done in (1500, 80000, 159999):
            assert multiplier(done / 160000) == pytest.approx(1 - done / 160000)


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
        cfg.MODEL.TRUNK.WEIGHTS, cfg.MODEL.DEVICE = "", "meta"
        with torch.device("meta"):
            model = build_model(cfg)
        net = getattr(model.backbone, "bottom_up", model.backbone).net
        assert net.trunk.config.embed_dim == {"t": 96, "s": 96, "b": 128, "l": 192}[letter]
        assert sum(p.requires_grad for p in net.norms.parameters()) == 2 * features
        adapters = sum(p.numel() for p in net.highway.parameters())
        expected = {"b": 1.181e6, "l": 1.766e6}.get(letter, adapters)
        assert adapters == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("letter", "bl")
def test_lazy_configs(letter, tmp_path):
    """They agree with the YAML of the same name; narrowed, they train for a step."""
    path = FOLDER / f"lazy/cascade_mask_rcnn_e3va_swin_{letter}_3x.py"
    cfg = LazyConfig.load(str(path))
    yaml = load_config(str(FOLDER / "coco" / path.with_suffix(".yaml").name))
    net = cfg.model.backbone.bottom_up.net
    assert (net.net.trunk.variant, net.weights) == (f"swin_{letter}", yaml.MODEL.TRUNK.WEIGHTS)
    assert cfg.train.max_iter == cfg.lr_multiplier.scheduler.num_updates == yaml.SOLVER.MAX_ITER
    assert tuple(cfg.lr_multiplier.scheduler.milestones) == yaml.SOLVER.STEPS
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (1e-4, 0.05)
    assert list(cfg.model.pixel_mean) == yaml.MODEL.PIXEL_MEAN
    assert list(cfg.model.pixel_std) == pytest.approx(yaml.MODEL.PIXEL_STD)

    net.net.trunk.variant, net.weights, net.net.dtype.name = "swin_digits", "", "float32"
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
    stage = model.backbone.bottom_up.net.highway.stages[0]
    assert (decay[stage.b], decay[stage.c], decay[stage.P]) == (0, 0, 0.05)
    assert decay[model.backbone.bottom_up.net.norms[0].weight] == 0
    with torch.no_grad():
        (found,) = model.eval()([batch[0]])
    assert found["instances"].image_size == (batch[0]["height"], batch[0]["width"])


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
