"""The configs on real images, where there are any."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.data import DatasetCatalog, MetadataCatalog

from e3va.detectron2 import Trainer, load_config, register_coco_json, register_datasets
from tests.detectron2.factories import (
    DIGITS,
    FOLDER,
    ROOT,
    SMALL,
    detections,
    flat,
    infer,
    overrides,
    score,
    step,
)


@pytest.mark.parametrize(("name", "classes"), [("nuclei", 1), ("microcontrollers", 6)])
def test_real_images(real_data, tmp_path, monkeypatch, name, classes):
    monkeypatch.setenv("E3VA_DATA", str(real_data))
    path = ROOT / f"detectron2_configs/real/{name}_mask_rcnn_e3va.yaml"
    keys = ["MODEL.TRUNK.WEIGHTS", "", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]
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
