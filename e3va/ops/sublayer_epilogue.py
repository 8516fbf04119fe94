"""``e3va::sublayer_epilogue``: all that follows a frozen sub-layer, in one pass over its output."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from e3va.ops import dispatch
from e3va.ops.checks import (
    check_floating,
    check_frozen,
    check_once,
    check_same_dtype,
    check_shape,
)
from e3va.ops.library import frozen_operator
from e3va.ops.storage import STORAGES, returns_norm, room, stored_channels, stored_dtype

TAPPED = ("output", "norm")
"""What an adapter may read."""


def sublayer_epilogue(
    x: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    P: Tensor | None = None,
    tap: str = "output",
    storage: str = "full",
    seed: Tensor | None = None,
    index: int = 0,
    into: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Residual add, the next LayerNorm, and the projection of one adapter's tap, or of none.

    A fused kernel moves 4·N·C values (x and y read, y' and its norm written), N·α of t, and the
    kept tap.

    Args:
        x: a frozen sub-layer's output before its residual add, [..., C].
        y: the residual stream, [..., C], dtype of ``x``.
        norm_weight, norm_bias: the LayerNorm that the next sub-layer begins with, [C];
            None after a stage's last sub-layer.
        eps: that norm's epsilon.
        P: [C, α], of any floating dtype; computes with it in that of ``x`` or in float32. None (the
            default): no adapter.
        tap: what the adapter reads: "output" (the default), which is ``x``, or "norm", the
            LayerNorm of ``y + x``, without weight and bias where those are None.
        storage: how the tap is to be kept for backward, one of :data:`e3va.ops.storage.STORAGES`.
        seed: of the stochastic rounding of "int4", an int64 []; on the device of ``x`` nothing is
            copied, and a CUDA graph that draws it rounds anew at each replay. Default: 0.
        index: added to it (default 0).
        into: where the adapter's three results go, the last ones below: contiguous, such as slices
            of tensors of a whole stage. Default: new tensors.

    Returns:
        ``y + x`` [..., C]; its LayerNorm [..., C], or an empty tensor without a norm, unless it is
        the tap and to be kept in full; ``t = tap·P`` [N, α], N the product of the leading sizes,
        empty without an adapter. All of the dtype of ``x``. Last the tap as it is to be kept, and
        its scales, as :func:`e3va.ops.storage.compress` makes them; both empty without an adapter,
        and with storage "full", where ``x`` or the LayerNorm itself is kept.

    Raises:
        TypeError: a dtype is not floating, or those of ``x`` and ``y`` differ.
        ValueError: a shape does not fit, a norm is incomplete, ``tap`` or ``storage`` is unknown.
        RuntimeError: a gradient is required; the op is part of the frozen forward.
    """
    check_frozen("sublayer_epilogue", x=x, y=y, norm_weight=norm_weight, norm_bias=norm_bias, P=P)
    check_once(_check, x, y, norm_weight, norm_bias, P, tap, storage, tuple(into))
    if not all(part.is_contiguous() for part in into):
        raise ValueError("into must be contiguous")
    if P is not None and not into:
        into = room(x, P.shape[1], storage)
    arguments = x, y, norm_weight, norm_bias, eps, P, tap, storage, seed, index, list(into)
    y_out, z = _sublayer_epilogue(*arguments)
    t, kept, scale = into or [x.new_empty(0)] * 3
    return y_out, z, t, kept, scale


def _check(
    x: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    P: Tensor | None,
    tap: str,
    storage: str,
    into: Sequence[Tensor],
) -> None:
    check_same_dtype(x=x, y=y)
    if x.dim() < 2:
        raise ValueError(f"x must have at least two dimensions, got {list(x.shape)}")
    check_shape("y", y, *x.shape)
    if tap not in TAPPED:
        raise ValueError(f"tap must be one of {', '.join(TAPPED)}, got {tap!r}")
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    channels = x.shape[-1]
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("a norm is norm_weight and norm_bias together: one of them is None")
    for name, norm in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if norm is not None:
            check_shape(name, norm, channels)
    if P is not None:
        check_floating(P=P)
        check_shape("P", P, channels, -1)
    if P is not None and into:
        # Kernels would write past the end of what is smaller.
        tokens, (t, kept, scale) = x.shape[:-1].numel(), into
        check_shape("into[0]", t, tokens, P.shape[1])
        check_same_dtype(x=x, into=t)
        if storage != "full":
            check_shape("into[1]", kept, tokens, stored_channels(channels, storage))
            check_shape("into[2]", scale, tokens)
            if (kept.dtype, scale.dtype) != (stored_dtype(storage), torch.float32):
                raise TypeError(
                    f"into of {kept.dtype} and {scale.dtype} does not hold a tap as {storage!r}"
                )


@functools.partial(frozen_operator, writes=("into",))
def _sublayer_epilogue(
    x: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    P: Tensor | None,
    tap: str,
    storage: str,
    seed: Tensor | None,
    index: int,
    into: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    arguments = x, y, norm_weight, norm_bias, eps, P, tap, storage, seed, index, into
    y_out, z, *_ = dispatch.run("sublayer_epilogue", x, *arguments)
    return y_out, z


@torch.library.register_fake("e3va::sublayer_epilogue")
def _(x, y, norm_weight, norm_bias, eps, P, tap, storage, seed, index, into):
    z = y.new_empty(y.shape if returns_norm(norm_weight, P, tap, storage) else 0)
    return y.new_empty(y.shape), z
