"""What is tried where the CPU stands for a GPU, and functions for its kernels."""

import torch

from e3va.ops import dispatch
from e3va.ops.backends import reference
from e3va.ops.variants import Draw, SublayerEpilogue

CPU = torch.device("cpu")
OP = "sublayer_epilogue"
VARIANT = SublayerEpilogue(40, "float32", 5, "norm", "int4")


def arguments(dtype=torch.float32, variant=VARIANT):
    return variant.arguments(Draw(dtype, seed=1), 2, 3, 5)


def right(*arguments):
    right.runs += 1
    return reference.sublayer_epilogue(*arguments)


right.runs = 0


def wrong_here(at):
    """The reference with one wrong value in one of its results."""

    def run(*arguments):
        results = reference.sublayer_epilogue(*arguments)
        if results[at].numel():
            results[at].flatten()[-1] += 3
        return results

    return run


def raising(error):
    def run(*arguments):
        raise error

    return run


def chosen():
    return dispatch.explain(OP, CPU, torch.float32, arguments())


def files(tmp_path):
    return sorted((tmp_path / "e3va").glob("*.json"))
