"""How far `e3va plan` is from real steps.

    python -m bench.plan [--json FILE]

Ten small steps of detectors, methods, sizes and batches that nothing was adjusted by: what is
traced on shapes, and the live bytes at the peak of the same step as Detectron2's trainer takes it,
with its arithmetic, weights and the optimizer's state included (e3va.measure.step_split). Weights
are random.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench.environment import environment, result_file
from bench.step import MIB
from bench.train_step import CONFIGS
from e3va.files import write_json
from e3va.measure import step_split


class Case(NamedTuple):
    """A step: a config, the method, the size of its images, how many there are at once, and how
    many in all (more: in parts); overrides."""

    config: str
    method: str
    size: tuple[int, int]
    images: int
    batch: int
    overrides: tuple[Any, ...] = ()


FEW = "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64
FLOAT32 = "SOLVER.AMP.ENABLED", False
GROUPS = "MODEL.SEM_SEG_HEAD.NORM", "GN"

CASES = (
    Case("coco/mask_rcnn_e3va_swin_t_1x", "e3va", (224, 320), 1, 1, FEW),
    Case("coco/mask_rcnn_e3va_swin_t_1x", "lora", (192, 256), 1, 2, (*FEW, *FLOAT32)),
    Case("coco/mask_rcnn_e3va_swin_s_1x", "full", (160, 256), 1, 1, (*FEW, *FLOAT32)),
    Case("coco/cascade_mask_rcnn_e3va_swin_t_1x", "e3va", (192, 320), 2, 2, (*FEW, *FLOAT32)),
    Case("coco/cascade_mask_rcnn_e3va_swin_t_1x", "frozen", (256, 256), 1, 1, FEW),
    Case("voc/faster_rcnn_e3va_swin_b", "e3va", (160, 224), 1, 1, FEW),
    Case("voc/retinanet_e3va_swin_b", "adaptformer", (192, 288), 1, 1, FLOAT32),
    Case("voc/retinanet_e3va_swin_b", "e3va", (160, 352), 2, 4, FLOAT32),
    Case("ade20k/upernet_e3va_swin_b", "e3va", (128, 192), 1, 1, (*GROUPS, *FLOAT32)),
    Case("ade20k/upernet_e3va_swin_b", "norm", (160, 128), 2, 2, FLOAT32),
)


def settings(case: Case) -> Any:
    """The config of a case."""
    from e3va.detectron2 import load_config

    own = "MODEL.TUNING.METHOD", case.method, "SOLVER.IMS_PER_BATCH", case.batch
    more = ["MODEL.TRUNK.WEIGHTS", "", "MODEL.DEVICE", "cpu", *own, *case.overrides]
    return load_config(str(CONFIGS / f"{case.config}.yaml"), more)


def real_split(cfg: Any, images: int, size: tuple[int, int]) -> dict[str, int]:
    """The bytes of a real step of ``cfg`` of so many images at once, in parts where they are fewer
    than the configured batch; see :func:`e3va.measure.step_split`."""
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    from e3va.detectron2.budget import sample_batch
    from e3va.detectron2.config import dtype_of
    from e3va.detectron2.solver import build_optimizer, steps_early
    from e3va.detectron2.step import StepTrainer

    torch.manual_seed(1)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    parts = 2 if images < cfg.SOLVER.IMS_PER_BATCH else 1
    batch = sample_batch(cfg, *size) * images * parts
    amp = cfg.SOLVER.AMP
    dtype = dtype_of("SOLVER.AMP.DTYPE", amp.DTYPE) if amp.ENABLED else None
    how = {"dtype": dtype, "accumulate": parts, "early": steps_early(cfg)}
    trainer = StepTrainer(model, itertools.repeat(batch), optimizer, **how)
    trainer.iter = 0
    with EventStorage():
        return step_split(model, trainer.run_step, optimizer)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=result_file, help="write the results to this file, as they come"
    )
    options = parser.parse_args(arguments)

    from e3va.detectron2.budget import Setup

    results: list[dict[str, Any]] = []
    report = {"environment": environment(), "cases": results}
    for case in tqdm(CASES, unit="step", disable=None):
        cfg = settings(case)
        planned = sum(Setup(cfg).split(case.images, case.size).values())
        real = sum(real_split(cfg, case.images, case.size).values())
        results.append({**case._asdict(), "planned_bytes": planned, "real_bytes": real})
        if options.json:
            write_json(options.json, report)
        print(
            f"{case.config} {case.method}: planned {planned / MIB:.1f} MiB, "
            f"real {real / MIB:.1f} MiB, {planned / real - 1:+.2%}",
            flush=True,
        )
        gc.collect()  # models have cycles
    return report


if __name__ == "__main__":
    main()
