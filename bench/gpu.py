"""All that a GPU is to show, in one run: correctness of every kernel, then its speed.

    python -m bench.gpu [--json FILE] [--plot FILE]

The correctness is what ``e3va selftest`` tells; then the kernels are measured, whether "auto" would
choose them or not. Without a GPU it is a dry run of tiny shapes on the CPU, with the backends that
run there. The run goes on after a wrong result and fails at its end.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from tqdm import tqdm

import e3va
from bench import kernels
from bench.environment import picture_file, result_file
from e3va.ops import trial


def checks(device: torch.device) -> list[dict[str, Any]]:
    """Every kernel that there is here, with its relative error against float64."""
    found = []
    for op, backend, dtype, variant, verdict in tqdm(trial.selftest(device), unit="kernel"):
        shown = {"op": op, "backend": backend, "dtype": dtype, "variant": trial.fields(variant)}
        found.append(shown | verdict._asdict())
        if not verdict.right:
            tqdm.write(f"WRONG {backend} {dtype} {op}, {shown['variant']}: {verdict.describe()}")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=result_file, help="write the results to this file, as they come"
    )
    parser.add_argument(
        "--plot", type=picture_file, default=str(kernels.PLOT), help="of the ratios"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = ["--seconds", "1", "--dtypes", "bf16", "--plot", str(options.plot)]
    if options.json:
        speed += ["--json", str(options.json)]
    if device.type == "cpu":
        print("no GPU: a dry run of tiny shapes")
        speed = [*speed, "--tiny", "--seconds", "0"]
    checked = checks(device)
    wrong = sum(not check["right"] for check in checked)
    print(f"{len(checked) - wrong} of {len(checked)} kernels are right")
    with e3va.backend("triton,native,reference"):
        kernels.main(speed, checks=checked)
    if wrong:
        sys.exit(f"{wrong} kernels are wrong")


if __name__ == "__main__":
    main()
