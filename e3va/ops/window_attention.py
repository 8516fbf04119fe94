"""``e3va::window_attention``: (shifted) window attention of a frozen block."""

from __future__ import annotations

import torch
from torch import Tensor

from e3va.ops import dispatch
from e3va.ops.checks import (
    check_floating,
    check_frozen,
    check_once,
    check_same_device,
    check_shape,
)
from e3va.ops.library import frozen_operator


def window_attention(
    qkv: Tensor, qkv_bias: Tensor, position_bias: Tensor, window: int, shift: int
) -> Tensor:
    """Multi-head attention within windows of a map (arXiv 2103.14030, eq. 4 and fig. 4).

    The map is padded to whole windows below and right; a padded position has a zero input, so its
    q, k and v are ``qkv_bias``, and it takes part in attention. With a
    shift, windows wrap around and tokens that only the wrap made neighbours do not see each
    other; the shift stays on a map no larger than a window.

    A fused kernel moves 4·N·C values (q, k and v read, the result written): nothing is rolled,
    padded or partitioned.

    Args:
        qkv: projected queries, keys and values, each ``heads × C/heads``, [B, H, W, 3C].
        qkv_bias: bias of that projection, [3C].
        position_bias: table of relative-position biases, [(2·window−1)², heads].
        window: side of a window in tokens.
        shift: cyclic shift of the windows in tokens, in [0, window).

    Returns:
        [B, H, W, C], dtype of ``qkv``.

    Raises:
        TypeError: a dtype is not floating.
        ValueError: a shape does not fit, window or shift is out of range, or the tensors are on
            several devices.
        RuntimeError: a gradient is required; the op is part of the frozen forward.
    """
    check_frozen("window_attention", qkv=qkv, qkv_bias=qkv_bias, position_bias=position_bias)
    arguments = qkv, qkv_bias, position_bias, window, shift
    check_once(_check, *arguments)
    return _window_attention(*arguments)


def _check(qkv: Tensor, qkv_bias: Tensor, position_bias: Tensor, window: int, shift: int) -> None:
    tensors = {"qkv": qkv, "qkv_bias": qkv_bias, "position_bias": position_bias}
    check_floating(**tensors)
    check_same_device(**tensors)
    if window < 1:
        raise ValueError(f"window must be positive, got {window}")
    check_shape("qkv", qkv, -1, -1, -1, -1)
    check_shape("qkv_bias", qkv_bias, qkv.shape[-1])
    check_shape("position_bias", position_bias, (2 * window - 1) ** 2, -1)
    if not position_bias.shape[1] or qkv.shape[-1] % (3 * position_bias.shape[1]):
        raise ValueError(
            f"qkv must hold 3 * heads * head_dim channels, got {qkv.shape[-1]} "
            f"for {position_bias.shape[1]} heads"
        )
    if not 0 <= shift < window:
        raise ValueError(f"shift must be in [0, {window}), got {shift}")


@frozen_operator
def _window_attention(
    qkv: Tensor, qkv_bias: Tensor, position_bias: Tensor, window: int, shift: int
) -> Tensor:
    return dispatch.run("window_attention", qkv, qkv, qkv_bias, position_bias, window, shift)


@torch.library.register_fake("e3va::window_attention")
def _(qkv, qkv_bias, position_bias, window, shift):
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
