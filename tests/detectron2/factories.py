"""Tiny data sets, configs and trainers, and how they are compared."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from e3va.detectron2 import Trainer, load_config, register_coco_json, register_datasets
from e3va.detectron2.inference import semantic_inference

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "detectron2_configs"
DIGITS = str(FOLDER / "digits/mask_rcnn_e3va.yaml")
VOC = str(FOLDER / "digits/retinanet_e3va.yaml")
SEMANTIC = str(FOLDER / "digits/upernet_e3va.yaml")
PACKAGED = "e3va://swin_digits.safetensors"
CLASSES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}]

# The narrowest that every config can be made, but for its detector, its recipe and its precision.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.TRUNK.VARIANT": "swin_digits",
    "MODEL.TRUNK.WEIGHTS": "",
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

# Its loss is a mean over images, and all the 1023 anchors of SAME_SIZE are sampled: so the loss of
# a batch is the mean of those of its parts, and nothing is random.
AVERAGEABLE = [
    *("MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.HIGHWAY.STORAGE", "full"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 1023, "MODEL.RPN.POSITIVE_FRACTION", 1.0),
    # Under AdamW rounding decides the direction of a gradient near zero.
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.01, "SOLVER.IMS_PER_BATCH", 4),
]

SAME_SIZE = [(64, 64)] * 5
TWO = ("SOLVER.IMS_PER_BATCH", 2)


def flat(values: dict) -> list:
    return [item for pair in values.items() for item in pair]


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


def overrides(folder: Path, train: Path, *more: object, test: Path | None = None) -> list[str]:
    values = {
        "OUTPUT_DIR": folder / "out",
        "DATASETS.COCO_JSON.TRAIN_JSON": train,
        "DATASETS.COCO_JSON.TRAIN_IMAGES": "",
        "DATASETS.COCO_JSON.TEST_JSON": test or train,
        "DATASETS.COCO_JSON.TEST_IMAGES": "",
        "MODEL.TRUNK.WEIGHTS": "",
        "MODEL.DEVICE": "cpu",
        "INPUT.MASK_FORMAT": "polygon",
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 3,
        "SOLVER.WARMUP_ITERS": 0,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    }
    return [str(v) for pair in values.items() for v in pair] + [str(v) for v in more]


def registered(path: str, folder: Path, **more):
    overrides = {**SMALL, "OUTPUT_DIR": str(folder / "out"), **more}
    cfg = load_config(str(path), flat(overrides))
    register_datasets(cfg)
    return cfg


def tiny(folder, *more: object):
    """The digits config over a random trunk, on a tiny data set, with KEY, VALUE overrides."""
    cfg = load_config(DIGITS, overrides(folder, write_coco(folder / "data"), *more))
    register_coco_json(cfg)
    return cfg


def packaged(folder, *more, sizes=None):
    """The same over the trunk that ships with the package, with nothing to evaluate on."""
    train = write_coco(folder / "data", sizes=sizes)
    cfg = load_config(DIGITS, overrides(folder, train, "MODEL.TRUNK.WEIGHTS", PACKAGED, *more))
    register_coco_json(cfg)
    cfg.DATASETS.TEST = ()
    return cfg


def voc(folder, root=None, classes=(), **more):
    """The digits config of boxes on the tree at ``root``, or on a tiny one."""
    section = "DATASETS.VOC_TREE"
    given = {f"{section}.ROOT": str(root or write_voc(folder / "voc"))}
    return registered(VOC, folder, **given, **{f"{section}.CLASSES": classes}, **more)


def semantic(folder, root=None, classes=(), **more):
    """The digits config of semantic maps on those at ``root``, or on tiny ones."""
    section = "DATASETS.SEMANTIC_MAPS"
    given = {f"{section}.ROOT": str(root or write_maps(folder / "maps"))}
    return registered(SEMANTIC, folder, **given, **{f"{section}.CLASSES": classes}, **more)


def voc_only(folder):
    """Of a tiny tree, with nothing to evaluate on."""
    key = "DATASETS.VOC_TREE"
    return {f"{key}.ROOT": str(write_voc(folder / "voc")), f"{key}.TEST_SPLIT": ""}


def maps_only(folder):
    key = "DATASETS.SEMANTIC_MAPS"
    root = str(write_maps(folder / "maps"))
    return {f"{key}.ROOT": root, f"{key}.TEST_SPLIT": "", f"{key}.CLASSES": []}


def step(trainer):
    with EventStorage(0) as storage:
        trainer.iter = 0
        trainer.run_step()
    return storage.latest()


def train(cfg, *, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def moves(cfg, iterations=1):
    """How the trained parameters move in a few iterations from weights that are always the same."""
    torch.manual_seed(3)
    trainer = Trainer(cfg)
    for stage in trainer.model.backbone.bottom_up.net.highway.stages:
        nn.init.normal_(stage.V, std=0.02)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    sizes = []
    trainer.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    trainer.max_iter = iterations
    trainer.train()
    return {n: p.detach() - before[n] for n, p in trained.items()}, sizes


def infer(trainer):
    cfg = trainer.cfg
    (sample,) = next(iter(trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    model = semantic_inference(cfg, trainer.model).eval()
    with torch.no_grad():
        (output,) = model([sample])
    trainer.model.train()
    return sample, output


def read(path):
    return torch.load(path, weights_only=True)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    """Two trees of dictionaries, lists, tensors and numbers are equal to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_close(a, b, relative):
    """Two moves of weights agree, or to four roundings of a weight near one: one in each step of
    each."""
    for name in a:
        allowed = max(relative * a[name].abs().max(), 5e-7)
        assert (a[name] - b[name]).abs().max() <= allowed, name


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
