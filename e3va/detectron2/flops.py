"""What fvcore, which Detectron2's ``analyze_model.py`` counts with, needs to know of E³VA's ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from fvcore.nn.jit_handles import get_shape

NORM = 5
"""Flops for each value of a LayerNorm, as fvcore counts them; a multiplication with the addition
that follows it is one."""

Handle = Callable[[Sequence[Any], Sequence[Any]], int]


def _sublayer_epilogue(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    x, norm_weight, P = (get_shape(inputs[i]) for i in (0, 2, 5))
    tap_is_norm = inputs[6].toIValue() == "norm"
    flops = NORM * prod(x) if norm_weight or (P and tap_is_norm) else 0
    return flops + (prod(x) * P[1] if P else 0)


def _highway(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    y_out, D, Q, V = (get_shape(inputs[i]) for i in (2, 9, 12, 16))
    return prod(y_out[:-1]) * (prod(D or [0]) + 2 * prod(Q) + prod(V))


def _window_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    batch, height, width, channels = get_shape(inputs[0])
    window = inputs[3].toIValue()
    windows = batch * -(-height // window) * -(-width // window)
    return 2 * windows * window**4 * (channels // 3)


def _stage_exit(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    h, reduction, merged = get_shape(inputs[0]), get_shape(inputs[7]), get_shape(outputs[1])
    flops = NORM * prod(h)
    if reduction:
        merged_tokens = prod(merged[:-1])
        flops += NORM * merged_tokens * reduction[1] + merged_tokens * prod(reduction)
    return flops


HANDLES: dict[str, Handle] = {
    "e3va::sublayer_epilogue": _sublayer_epilogue,
    "e3va::highway": _highway,
    "e3va::window_attention": _window_attention,
    "e3va::stage_exit": _stage_exit,
}
"""For ``fvcore.nn.FlopCountAnalysis(...).set_op_handle(**HANDLES)``."""
