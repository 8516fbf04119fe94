"""How Detectron2 trains here: checkpoints, resuming, accumulation, averaging, several processes."""

import argparse
import logging
import math
import re

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

import torch.distributed as dist
from detectron2.data import DatasetCatalog
from detectron2.engine import launch
from detectron2.modeling import build_backbone, build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import train_net
from e3va import SwinConfig, trunk_config
from e3va.detectron2 import (
    SafeCheckpointer,
    Trainer,
    WeightAverage,
    load_config,
    register_coco_json,
)
from e3va.detectron2.checkpoint import frozen_names
from e3va.detectron2.train import build_optimizer, distribute
from e3va.trunks import FrozenSwin
from e3va.trunks.swin import SWIN_VARIANTS
from e3va.weights import save_trunk, trunk_hash
from tests import libraries
from tests.test_detectron2 import DIGITS, overrides, write_coco
from tests.test_detectron2_tracks import SEMANTIC, VOC, registered, write_maps, write_voc

TRUNK = "backbone.bottom_up.swin.trunk."
PACKAGED = "e3va://swin_digits.safetensors"

# Its loss is a mean over images, and all the 1023 anchors of SAME_SIZE are sampled: so the loss of
# a batch is the mean of those of its parts, and nothing is random.
AVERAGEABLE = [
    *("MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.E3VA.TAPS", "full"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 1023, "MODEL.RPN.POSITIVE_FRACTION", 1.0),
    # Under AdamW rounding decides the direction of a gradient near zero.
    *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.01, "SOLVER.IMS_PER_BATCH", 4),
]
SAME_SIZE = [(64, 64)] * 5
ITERATIONS = 2
TWO = ("SOLVER.IMS_PER_BATCH", 2)


def configure(folder, *more, sizes=None):
    """The digits config over the packaged trunk, on a tiny data set, with nothing to evaluate on
    and KEY, VALUE overrides."""
    train = write_coco(folder / "data", sizes=sizes)
    cfg = load_config(DIGITS, overrides(folder, train, "MODEL.E3VA.WEIGHTS", PACKAGED, *more))
    register_coco_json(cfg)
    cfg.DATASETS.TEST = ()
    return cfg


@pytest.fixture
def tiny(tmp_path):
    return lambda *more, **options: configure(tmp_path, *more, **options)


def boxes(folder):
    """Of a tiny tree, with nothing to evaluate on."""
    key = "DATASETS.VOC_TREE"
    return {f"{key}.ROOT": str(write_voc(folder / "voc")), f"{key}.TEST_SPLIT": ""}


def maps(folder):
    key = "DATASETS.SEMANTIC_MAPS"
    root = str(write_maps(folder / "maps"))
    return {f"{key}.ROOT": root, f"{key}.TEST_SPLIT": "", f"{key}.CLASSES": []}


def train(cfg, *, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


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


# Checkpoints


def read(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("method", ["e3va", "frozen"])
def test_checkpoints_leave_the_frozen_trunk_out(tmp_path, tiny, method):
    trainer = train(tiny("MODEL.TUNING.METHOD", method, "SOLVER.MAX_ITER", 1))
    saved = read(tmp_path / "out/model_final.pth")
    model = trainer.model.state_dict()
    assert saved["model"].keys() == {name for name in model if not name.startswith(TRUNK)}
    trunk = trainer.model.backbone.bottom_up.swin.trunk
    assert saved["trunk"] == {"hash": trunk_hash(trunk), "source": PACKAGED}

    other = Trainer(tiny("MODEL.TUNING.METHOD", method))
    other.checkpointer.load(str(tmp_path / "out/model_final.pth"), checkpointables=[])
    assert_same(dict(other.model.state_dict()), dict(model))


def test_full_tuning_keeps_everything(tmp_path, tiny):
    trainer = train(tiny("MODEL.TUNING.METHOD", "full", "SOLVER.MAX_ITER", 1))
    saved = read(tmp_path / "out/model_final.pth")
    assert_same(dict(saved["model"]), dict(trainer.model.state_dict()))
    assert "trunk" not in saved


def test_a_trunk_that_no_file_brings_is_kept(tmp_path, tiny):
    """Random weights, and those of a full checkpoint that are not those of MODEL.E3VA.WEIGHTS."""
    random = Trainer(tiny("MODEL.E3VA.WEIGHTS", ""))
    random.checkpointer.save("random")
    saved = read(tmp_path / "out/random.pth")
    assert_same(dict(saved["model"]), dict(random.model.state_dict()))
    assert "trunk" not in saved

    trainer = Trainer(tiny())
    trainer.checkpointer.load(str(tmp_path / "out/random.pth"), checkpointables=[])
    assert_same(dict(trainer.model.state_dict()), dict(random.model.state_dict()))
    trainer.checkpointer.save("again")
    assert_same(dict(read(tmp_path / "out/again.pth")["model"]), dict(saved["model"]))


def test_a_trunk_that_timm_brings(tmp_path, tiny, monkeypatch):
    """Its checkpoints name it as the config does, and know its weights in whatever file."""
    timm = pytest.importorskip("timm")
    swin = libraries.build("timm", trunk_config("swin_digits"), (224, 224))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: swin)
    trainer = Trainer(tiny("MODEL.E3VA.WEIGHTS", "timm:swin_mine"))
    trainer.checkpointer.save("mine")
    trunk = trainer.model.backbone.bottom_up.swin.trunk
    path = tmp_path / "out/mine.pth"
    assert read(path)["trunk"] == {"hash": trunk_hash(trunk), "source": "timm:swin_mine"}

    save_file(swin.state_dict(), tmp_path / "mine.safetensors")
    for weights in ("timm:swin_mine", tmp_path / "mine.safetensors"):
        other = Trainer(tiny("MODEL.E3VA.WEIGHTS", weights))
        other.checkpointer.load(str(path), checkpointables=[])
        assert_same(state(other.model), state(trainer.model))
    with pytest.raises(ValueError, match=r"set MODEL.E3VA.WEIGHTS to .* timm:swin_mine"):
        Trainer(tiny()).checkpointer.load(str(path))


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path, tiny, monkeypatch):
    trainer = Trainer(tiny())
    trainer.checkpointer.save("mine")
    before = (tmp_path / "out/mine.pth").read_bytes()

    def crash(data, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(torch, "save", crash)
        trainer.checkpointer.save("mine")
    assert (tmp_path / "out/mine.pth").read_bytes() == before
    assert trainer.checkpointer.get_checkpoint_file() == str(tmp_path / "out/mine.pth")
    trainer.checkpointer.save("mine")
    assert {f.name for f in (tmp_path / "out").glob("*mine*")} == {"mine.pth"}


def test_a_checkpoint_over_another_trunk(tmp_path, tiny):
    trainer = Trainer(tiny())
    trainer.checkpointer.save("mine")
    config = trainer.model.backbone.bottom_up.swin.trunk.config
    save_trunk(FrozenSwin(config), tmp_path / "other.safetensors")
    for method in ("e3va", "full"):
        for weights in ("", tmp_path / "other.safetensors"):
            other = Trainer(tiny("MODEL.E3VA.WEIGHTS", weights, "MODEL.TUNING.METHOD", method))
            before = state(other.model)
            with pytest.raises(
                ValueError, match=r"frozen trunk .*: set MODEL.E3VA.WEIGHTS to .*e3va://"
            ):
                other.checkpointer.load(str(tmp_path / "out/mine.pth"))
            assert_same(before, state(other.model))
    SafeCheckpointer(Trainer(tiny("MODEL.TUNING.METHOD", "full")).model).load(
        str(tmp_path / "out/mine.pth")
    )


def test_a_trunk_trained_in_part(tmp_path, tiny):
    """Its trained weights are saved, and what is frozen stays where it came from."""

    def biases_alone():
        model = build_model(tiny("MODEL.TUNING.METHOD", "full"))
        trunk = model.backbone.bottom_up.swin.trunk
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        (tmp_path / "out").mkdir(exist_ok=True)
        return model, SafeCheckpointer(model, str(tmp_path / "out"), trunk_source=PACKAGED)

    model, checkpointer = biases_alone()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    checkpointer.save("biases")
    trunk = [n for n in read(tmp_path / "out/biases.pth")["model"] if n.startswith(TRUNK)]
    assert trunk
    assert all(name.endswith("bias") for name in trunk)

    other, checkpointer = biases_alone()
    checkpointer.load(str(tmp_path / "out/biases.pth"))
    assert_same(state(other), state(model))
    frozen = Trainer(tiny())
    frozen.checkpointer.load(str(tmp_path / "out/biases.pth"), checkpointables=[])
    frozen.checkpointer.save("with its own trunk")
    assert [n for n in read(tmp_path / "out/with its own trunk.pth")["model"] if TRUNK in n]


# Resuming


@pytest.mark.parametrize(
    "more",
    [
        ("SOLVER.EMA.DECAY", 0.9, "SOLVER.ACCUMULATE", 2),
        ("SEED", -1, "DATALOADER.NUM_WORKERS", 2, "DATALOADER.ASPECT_RATIO_GROUPING", False),
        # All of Mask R-CNN takes half a minute in float16 on a CPU.
        ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16", *AVERAGEABLE, *TWO),
        ("MODEL.TUNING.METHOD", "full", "MODEL.E3VA.DROP_PATH_RATE", 0.5),
    ],
    ids=["e3va", "unseeded", "float16", "full"],
)
def test_resuming_repeats_the_uninterrupted_run(tmp_path, tiny, more):
    random = ["INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", (40, 48, 64)]
    cfg = tiny("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, *random, *more)
    assert_resumes(cfg, tmp_path / "out")


@pytest.mark.parametrize("track", ["boxes", "maps"])
def test_resuming_on_boxes_and_maps(tmp_path, track):
    """RetinaNet's running mean goes on too; crops and colours are drawn again."""
    random = {"INPUT.RANDOM_FLIP": "horizontal", "INPUT.MIN_SIZE_TRAIN": (40, 48, 64)}
    periods = {"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 3, "SOLVER.WARMUP_ITERS": 0}
    if track == "boxes":
        cfg = registered(VOC, tmp_path, **random, **periods, **boxes(tmp_path))
    else:
        random |= {"INPUT.COLOR_JITTER": 0.5, "INPUT.CROP.ENABLED": True}
        random |= {"INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [32, 32]}
        cfg = registered(SEMANTIC, tmp_path, **random, **periods, **maps(tmp_path))
    assert_resumes(cfg, tmp_path / "out")


def assert_resumes(cfg, out):
    """From half-way on, to the same checkpoint."""
    train(cfg)
    wanted = read(out / "model_final.pth")
    half = read(out / "model_0000002.pth")
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").write_text("model_0000002.pth")

    seed_all_rng(99)
    train(cfg, resume=True)
    resumed = read(out / "model_final.pth")
    assert_same(wanted, resumed)
    assert any(not torch.equal(v, half["model"][n]) for n, v in resumed["model"].items())


def test_batches_depend_on_neither_workers_nor_processes(tiny, monkeypatch):
    cfg = tiny("INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", (40, 48, 64))
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False

    def samples(count, start=0):
        loader = Trainer.build_train_loader(cfg)
        loader.start = start
        iterator = iter(loader)
        return [(s["file_name"], s["image"]) for _ in range(count) for s in next(iterator)]

    def assert_equal(a, b):
        for (name, image), (other, pixels) in zip(a, b, strict=True):
            assert name == other
            assert torch.equal(image, pixels)

    alone = samples(6)
    assert len({image.shape for _, image in alone}) > 4  # they are augmented
    cfg.DATALOADER.NUM_WORKERS = 2
    assert_equal(samples(3, start=3), alone[6:])
    cfg.DATALOADER.NUM_WORKERS = 0
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        assert_equal(samples(6), alone[rank::2])


def test_wide_and_high_images_apart(tiny):
    """As ASPECT_RATIO_GROUPING wants it, by default; all are seen."""
    iterator = iter(Trainer.build_train_loader(tiny()))
    seen = [[(s["width"] > s["height"], s["file_name"]) for s in next(iterator)] for _ in range(9)]
    assert all(len({wide for wide, _ in batch}) == 1 for batch in seen)
    assert len({name for batch in seen for _, name in batch}) == 3


def test_images_of_unknown_size(tiny, monkeypatch):
    cfg = tiny()
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    for record in records:
        del record["width"], record["height"]
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: records)
    iterator = iter(Trainer.build_train_loader(cfg))
    names = [s["file_name"] for _ in range(3) for s in next(iterator)]
    assert len(set(names[:3])) == len(set(names[3:])) == 3


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (["MODEL.TUNING.METHOD", "frozen"], [], "48 tensors are trained now that were not then"),
        (["MODEL.TUNING.METHOD", "full"], [], "no longer trained"),
        ([], ["MODEL.TUNING.METHOD", "full"], "trained now that were not then.*no longer trained"),
        ([], ["MODEL.E3VA.KERNEL_DIM", 8], "32 tensors are of another shape"),
        ([], ["SOLVER.OPTIMIZER", "SGD"], "it was ADAMW, now it is SGD"),
        ([], ["SOLVER.HIGHWAY_LR_RATIO", 1.0], "grouped otherwise"),
    ],
    ids=["frozen to e3va", "full to e3va", "e3va to full", "kernel", "optimizer", "groups"],
)
def test_resuming_with_something_else_to_train(tiny, caplog, then, now, message):
    ema = ["SOLVER.EMA.DECAY", 0.5]
    before = train(tiny("SOLVER.MAX_ITER", 2, *ema, *then))
    cfg = tiny("SOLVER.MAX_ITER", 4, *ema, *now)
    after = Trainer(cfg)
    fresh = state(after.model)
    after.resume_or_load(resume=True)
    (warning,) = (
        r.getMessage()
        for r in caplog.records
        if r.levelno == logging.WARNING and r.name == "e3va.detectron2.train"
    )
    assert "The optimizer starts afresh at iteration 2: " in warning
    assert re.search(message, warning)
    assert after.start_iter == 2
    assert not after.optimizer.state_dict()["state"]
    old = before.model.state_dict()
    for name, value in after.model.state_dict().items():
        fits = name in old and old[name].shape == value.shape
        if not name.endswith("weight_hash"):
            assert torch.equal(value, old[name] if fits else fresh[name]), name

    rates = [group["lr"] for group in after.optimizer.param_groups]
    factor = 0.5 * (1 + math.cos(math.pi * 2 / 4))
    highest = [group["lr"] for group in build_optimizer(cfg, after.model).param_groups]
    assert rates == pytest.approx([factor * rate for rate in highest])
    after.train()
    assert after.iter == 4
    assert after.average.state_dict().keys() == {
        n for n, p in after.model.named_parameters() if p.requires_grad
    }


# Steps


def moves(cfg, iterations=1):
    """How the trained parameters move in a few iterations from weights that are always the same."""
    torch.manual_seed(3)
    trainer = Trainer(cfg)
    for stage in trainer.model.backbone.bottom_up.swin.highway.stages:
        nn.init.normal_(stage.V, std=0.02)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    sizes = []
    trainer.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    trainer.max_iter = iterations
    trainer.train()
    return {n: p.detach() - before[n] for n, p in trained.items()}, sizes


def assert_close(a, b, relative):
    """Two moves of weights agree, or to two roundings of a weight near one."""
    for name in a:
        allowed = max(relative * a[name].abs().max(), 2.5e-7)
        assert (a[name] - b[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("clip", ["full_model", "norm"])
def test_accumulation_changes_nothing_but_memory(tiny, clip):
    more = [*AVERAGEABLE, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip]
    more += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01]
    wanted, sizes = moves(tiny(*more, sizes=SAME_SIZE))
    assert sizes == [4]
    for parts in (2, 4):
        got, sizes = moves(tiny(*more, "SOLVER.ACCUMULATE", parts, sizes=SAME_SIZE))
        assert sizes == [4 // parts] * parts
        assert_close(wanted, got, 1e-3)


def test_accumulation_in_float16(tiny):
    """Gradients are unscaled once, before they are clipped."""
    amp = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"]
    clip = ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.1]
    cfg = tiny(*AVERAGEABLE, *amp, *clip, "SOLVER.ACCUMULATE", 2, sizes=SAME_SIZE)
    trainer = Trainer(cfg)
    trainer._trainer._scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    norms = []

    def keep_norm(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(nn.utils.get_total_norm(gradients).item())

    trainer.optimizer.register_step_post_hook(keep_norm)
    trainer.max_iter = 2
    trainer.train()
    assert norms == pytest.approx([0.1, 0.1], rel=1e-3)


@pytest.mark.parametrize(("batch", "parts"), [(4, 3), (4, 8), (4, 0)])
def test_batches_that_do_not_divide(tiny, batch, parts):
    with pytest.raises(ValueError, match=rf"IMS_PER_BATCH \(4\) must be a multiple .*\({parts}\)"):
        Trainer(tiny("SOLVER.IMS_PER_BATCH", batch, "SOLVER.ACCUMULATE", parts))


@pytest.mark.parametrize("name", ["WarmupCosineLR", "WarmupMultiStepLR"])
def test_schedules(tiny, name):
    more = ["SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.MAX_ITER", 10, "SOLVER.WARMUP_ITERS", 2]
    more += ["SOLVER.STEPS", (5, 8), "SOLVER.BASE_LR", 1.0, "SOLVER.WARMUP_FACTOR", 0.0]
    cfg = tiny(*more, "SOLVER.OPTIMIZER", "SGD")
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    if name == "WarmupCosineLR":
        wanted = [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
        warm = wanted[2] / 2  # to the cosine at the end of the warm-up
    else:
        wanted = [1.0] * 5 + [0.1] * 3 + [0.01] * 2
        warm = 0.5
    assert rates == pytest.approx([0.0, warm, *wanted[2:]])


def test_synchronised_norms_build(tiny):
    model = build_model(tiny("MODEL.FPN.NORM", "SyncBN"))
    assert [m for m in model.backbone.modules() if isinstance(m, nn.SyncBatchNorm)]


@pytest.mark.parametrize("method", ["e3va", "frozen"])
def test_compiled_trunk(tiny, monkeypatch, method):
    """The same features and gradients, in one graph. The graph is run as it is: to generate code
    for it takes a minute."""
    compile = torch.compile
    compiled = []

    def in_one_graph(function, **options):
        compiled.append(function)
        return compile(function, **options, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", in_one_graph)
    monkeypatch.setitem(SWIN_VARIANTS, "swin_pico", SwinConfig(32, (1, 2), (1, 2)))
    more = ["MODEL.TUNING.METHOD", method, "MODEL.E3VA.VARIANT", "swin_pico"]
    more += ["MODEL.E3VA.WEIGHTS", "", "MODEL.BACKBONE.NAME", "build_e3va_swin_backbone"]
    image = torch.randn(1, 3, 32, 64)
    outputs = []
    for switch in (False, True):
        torch.manual_seed(1)
        backbone = build_backbone(tiny(*more, "MODEL.E3VA.COMPILE", switch)).train()
        torch.manual_seed(2)
        maps = backbone(image)
        if maps["p0"].requires_grad:
            sum(p.sin().mean() for p in maps.values()).backward()
        gradients = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
        outputs.append({n: p.detach() for n, p in maps.items()} | gradients)
        assert len(compiled) == switch
    assert outputs[0].keys() == outputs[1].keys()
    assert_close(*outputs, 1e-4)


# Averaged weights


def test_average(tiny):
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, 0.5)
    wanted = None
    for iteration in range(12):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2))
        average.update(iteration)
        decay = min(0.5, (1 + iteration) / (10 + iteration))
        own = model.weight.detach().clone()
        wanted = own if wanted is None else decay * wanted + (1 - decay) * own
    assert average.state_dict().keys() == {"weight"}
    torch.testing.assert_close(average.state_dict()["weight"], wanted)
    with average.applied():
        assert torch.equal(model.weight, average.state_dict()["weight"])
    assert torch.equal(model.weight, own)
    with pytest.raises(ValueError, match=r"SOLVER.EMA.DECAY must be in \[0, 1\), got 1.5"):
        Trainer(tiny("SOLVER.EMA.DECAY", 1.5))


def test_averaged_weights_are_evaluated_and_saved(tmp_path, monkeypatch):
    path = write_coco(tmp_path / "data")
    opts = overrides(tmp_path, path, "MODEL.E3VA.WEIGHTS", PACKAGED, "SOLVER.EMA.DECAY", 0.9)
    tested = []

    def test(cfg, model):
        tested.append(state(model))
        return {}

    monkeypatch.setattr(Trainer, "test", staticmethod(test))

    def run(**options):
        defaults = {"eval_only": False, "resume": False, "config_file": DIGITS}
        train_net.main(argparse.Namespace(**{"opts": opts, **defaults, **options}))

    run()
    saved = read(tmp_path / "out/model_final.pth")
    trained = saved["ema"].keys()
    assert trained <= saved["model"].keys()
    assert all(torch.equal(tested[0][n], saved["ema"][n]) for n in trained)
    assert any(not torch.equal(saved["model"][n], saved["ema"][n]) for n in trained)

    final = ["MODEL.WEIGHTS", str(tmp_path / "out/model_final.pth")]
    run(eval_only=True, resume=True)
    run(eval_only=True, opts=opts + final)
    run(eval_only=True, opts=[*opts, *final, "SOLVER.EMA.DECAY", "0.0"])
    for own in tested[1:3]:
        assert_same(own, tested[0])
    assert all(torch.equal(tested[3][n], v) for n, v in saved["model"].items())


# Several processes


def exchange(cfg):
    """Train as one of however many processes, unless the trunk is random: how the weights move, and
    the bytes that DDP sends, of what is trained, outside of the frozen trunk, or all."""
    seed_all_rng(3 + comm.get_rank())
    broadcast, reduced = [], []
    send = dist._broadcast_coalesced

    def count(group, tensors, *args):
        broadcast.extend(t.nbytes for t in tensors)
        send(group, tensors, *args)

    def reduce(sizes, bucket):
        sizes.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    dist._broadcast_coalesced = count
    trainer = Trainer(cfg)
    dist._broadcast_coalesced = send
    model = trainer.model
    if isinstance(model, DistributedDataParallel):
        assert not model.find_unused_parameters
        model.register_comm_hook(reduced, reduce)
        model = model.module
    # RetinaNet divides by a running mean of each process's own foreground: here, by what it begins
    # with.
    model._ema_update = lambda name, value, first: first
    before = state(model)
    if cfg.MODEL.E3VA.WEIGHTS:
        trainer.train()
    parameters = dict(model.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    frozen = frozen_names(model)
    return {
        "before": before,
        "moves": {n: v - before[n] for n, v in model.state_dict().items() if n in trained},
        "broadcast": sum(broadcast),
        "reduced": sum(reduced),
        "trained": sum(parameters[name].nbytes for name in trained),
        "outside": sum(p.nbytes for n, p in parameters.items() if n not in frozen),
        "all": sum(p.nbytes for p in parameters.values()),
    }


def in_process(folder, more):
    """All the kinds of training that :func:`test_two_processes` compares."""
    own = folder / f"{comm.get_world_size()}-{comm.get_rank()}"
    cfg = configure(own, *more, sizes=SAME_SIZE)
    results = {}
    for name, parts, weights in (("whole", 1, PACKAGED), ("parts", 2, PACKAGED), ("random", 1, "")):
        cfg.SOLVER.ACCUMULATE, cfg.MODEL.E3VA.WEIGHTS = parts, weights
        results[name] = exchange(cfg)
    recipe = {"MODEL.E3VA.WEIGHTS": PACKAGED, "MODEL.E3VA.TAPS": "full", "SOLVER.OPTIMIZER": "SGD"}
    recipe |= {"SOLVER.BASE_LR": 0.1, "SOLVER.WARMUP_ITERS": 0, "SOLVER.MAX_ITER": ITERATIONS}
    # The loss of boxes is a sum over images: its mean over processes is that over parts.
    parts = {"SOLVER.ACCUMULATE": 2 // comm.get_world_size()}
    norm = {"MODEL.SEM_SEG_HEAD.NORM": "naiveSyncBN", "MODEL.UPERNET.DROPOUT": 0.0}
    results["boxes"] = exchange(registered(VOC, own, **recipe, **parts, **boxes(own)))
    results["maps"] = exchange(registered(SEMANTIC, own, **recipe, **norm, **maps(own)))
    torch.save(results, own.with_suffix(".pt"))


def test_two_processes(tmp_path):
    """They do what one does, and send each other the trained parameters' gradients alone."""
    more = [*AVERAGEABLE, "SOLVER.MAX_ITER", ITERATIONS, "DATALOADER.ASPECT_RATIO_GROUPING", False]
    launch(in_process, 2, dist_url="auto", args=(tmp_path, more))
    in_process(tmp_path, more)
    one, *two = (read(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for results in two:
        for name in ("whole", "parts", "boxes", "maps"):
            result, alone = results[name], one["whole" if name == "parts" else name]
            assert_same(result["before"], alone["before"])
            assert_same(result["moves"], two[0][name]["moves"])
            assert_close(alone["moves"], result["moves"], 1e-3)
            assert result["reduced"] == ITERATIONS * result["trained"]
            assert result["broadcast"] == result["outside"]
        # That which differs between the processes has to be sent.
        assert_same(results["random"]["before"], two[0]["random"]["before"])
        assert results["random"]["broadcast"] == results["random"]["all"]


def test_synchronised_norms_of_processes_on_cpus(tiny, monkeypatch):
    """PyTorch's need GPUs, Detectron2's own do not (see above)."""
    model = build_model(tiny("MODEL.FPN.NORM", "SyncBN"))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"SyncBN .* backbone\.\w+\.norm .* to naiveSyncBN"):
        distribute(model)
