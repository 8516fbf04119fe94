"""What the kernels cost does not grow unnoticed."""

import pytest
import torch

from tests.ptx import costs

CEILINGS = {
    "sublayer_epilogue full": 346,
    "sublayer_epilogue fp8": 787,
    "sublayer_epilogue int8": 577,
    "sublayer_epilogue int4": 650,
    "adapters full": 148,
    "adapters int8": 156,
    "adapters_backward full": 283,
    "adapters_backward int8": 313,
    "fold": 8800,
    "fold_backward": 25700,
    "tap_gradient fp8": 108,
    "tap_gradient int8": 108,
    "tap_gradient int4": 85,
    "stage_exit_backward": 1008,  # 1004 by Triton 3.8
}
"""Warp instructions without moves, per token (and adapter), of what is folded per adapter: bfloat16
on sm_80, C = 512, rank 16, m = 256."""


def test_instructions_and_sectors(compiler):
    pytest.importorskip("triton", "3.8", reason="the ceilings are of Triton 3.8 and later")
    found = {}
    for kernel, units, counts in costs.measure(compiler, 80, torch.bfloat16, 512, 16, 256):
        found[kernel] = counts.instructions / units
        if kernel.startswith(("sublayer_epilogue", "tap_gradient", "adapters")):
            assert counts.sectors_over_floor <= 1.13, kernel
    assert found.keys() == CEILINGS.keys()
    more = {kernel: n for kernel, n in found.items() if n > CEILINGS[kernel]}
    assert not more
