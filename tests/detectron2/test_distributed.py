"""Several processes."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

import torch.distributed as dist
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from e3va.checkpoint import frozen_names
from e3va.detectron2 import Trainer
from e3va.detectron2.step import distribute
from tests.detectron2.factories import (
    AVERAGEABLE,
    PACKAGED,
    SAME_SIZE,
    SEMANTIC,
    VOC,
    assert_close,
    assert_same,
    maps_only,
    packaged,
    read,
    registered,
    state,
    voc_only,
)

ITERATIONS = 2


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
    if cfg.MODEL.TRUNK.WEIGHTS:
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
    cfg = packaged(own, *more, sizes=SAME_SIZE)
    results = {}
    for name, parts, weights in (("whole", 1, PACKAGED), ("parts", 2, PACKAGED), ("random", 1, "")):
        cfg.SOLVER.ACCUMULATE, cfg.MODEL.TRUNK.WEIGHTS = parts, weights
        results[name] = exchange(cfg)
    recipe = {
        "MODEL.TRUNK.WEIGHTS": PACKAGED,
        "MODEL.HIGHWAY.STORAGE": "full",
        "SOLVER.OPTIMIZER": "SGD",
    }
    recipe |= {"SOLVER.BASE_LR": 0.1, "SOLVER.WARMUP_ITERS": 0, "SOLVER.MAX_ITER": ITERATIONS}
    # The loss of boxes is a sum over images: its mean over processes is that over parts.
    parts = {"SOLVER.ACCUMULATE": 2 // comm.get_world_size()}
    # Pooled to one value of an image, Detectron2's norm takes the variance of two nearly equal
    # numbers as E[x²] − E[x]²: of its last digits, which sums of other orders do not share.
    norm = {"MODEL.SEM_SEG_HEAD.NORM": "naiveSyncBN", "MODEL.UPERNET.POOL_SCALES": [2, 3, 6]}
    norm["MODEL.UPERNET.DROPOUT"] = 0.0
    results["boxes"] = exchange(registered(VOC, own, **recipe, **parts, **voc_only(own)))
    results["maps"] = exchange(registered(SEMANTIC, own, **recipe, **norm, **maps_only(own)))
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


def test_synchronised_norms_of_processes_on_cpus(packaged, monkeypatch):
    """PyTorch's need GPUs, Detectron2's own do not (see above)."""
    model = build_model(packaged("MODEL.FPN.NORM", "SyncBN"))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"SyncBN .* backbone\.\w+\.norm .* to naiveSyncBN"):
        distribute(model)
