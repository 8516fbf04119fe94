"""What keeping the taps in fewer bits does to AP: the demo's E³VA, over several seeds.

    python -m bench.storage [--storages full int4] [--seeds 0 1 2] [--json FILE]

The default, e3va.ops.storage.DEFAULT_STORAGE, is the smallest whose AP is that of ``full`` to
within the noise of a seed.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from bench.environment import environment, result_file
from e3va.demo.digits import write_digits
from e3va.demo.engines import train_detectron2
from e3va.files import write_json
from e3va.measure import saved_bytes
from e3va.ops.storage import STORAGES


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=400, help="of each (default 400)")
    parser.add_argument("--output", type=Path, default=Path("output/storage"))
    parser.add_argument("--json", type=result_file, help="write the results to this file")
    options = parser.parse_args(arguments)
    coco = write_digits(options.output / "digits", seed=0) / "coco"
    report: dict[str, Any] = {"environment": environment(), "iterations": options.iterations}
    report["seeds"], report["storages"] = options.seeds, {name: {} for name in options.storages}
    for name, result in report["storages"].items():
        result["mask_ap"] = []
        for seed in options.seeds:
            folder = options.output / f"{name}_{seed}"
            overrides = ["MODEL.HIGHWAY.STORAGE", name]
            run = train_detectron2("e3va", coco, folder, options.iterations, seed, overrides)
            result["mask_ap"].append(run.metrics["mask_ap"])
        result["saved_bytes"] = saved_bytes(run.backbone, partial(run.backbone, run.images))
        each = " ".join(f"{ap:5.1f}" for ap in result["mask_ap"])
        mean = statistics.mean(result["mask_ap"])
        print(f"{name:5} mask AP {each}, mean {mean:.1f}; {result['saved_bytes'] / 2**20:.1f} MiB")
        if options.json:
            write_json(options.json, report)
    return report


if __name__ == "__main__":
    main()
