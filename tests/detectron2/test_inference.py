"""Segmentors on windows and at several sizes, and predictions on pictures."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from e3va import cli
from e3va.detectron2 import SemanticInference, Trainer, load_config
from e3va.detectron2.engine import classes_of
from e3va.detectron2.inference import semantic_inference
from tests.detectron2.factories import SEMANTIC, infer


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


def test_predicts_as_it_is_evaluated(semantic, tmp_path):
    """On windows and at several sizes, with the classes that config.yaml knows alone."""
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

    def predict(**more):
        config = yaml.safe_load(cfg.dump())
        for key, value in more.items():
            config["TEST"][key] |= value
        (tmp_path / "out/config.yaml").write_text(yaml.safe_dump(config))
        assert (
            cli.main(["predict", str(tmp_path / "out"), str(image), "--output", str(tmp_path)]) == 0
        )
        with Image.open(tmp_path / "street_classes.png") as file:
            return np.array(file)

    assert classes_of(tmp_path / "out") == ["class 1", "class 2", "class 3"]
    found = predict()
    assert (found == expected["sem_seg"].argmax(0).numpy()).all()
    assert (predict(SLIDE={"WINDOW": 0, "STRIDE": 0}) != found).any()
    assert (predict(AUG={"ENABLED": False}) != found).any()
