"""``e3va::sublayer_epilogue``: all that follows a frozen sub-layer, in one pass over its output."""

from __future__ import annotations

import torch
from torch import Tensor

from e3va.ops import dispatch, reference
from e3va.ops.checks import check_floating, check_frozen, check_same_dtype, check_shape

dispatch.register("sublayer_epilogue", "reference")(reference.sublayer_epilogue)


def sublayer_epilogue(
    x: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    P: Tensor | None = None,
    Q: Tensor | None = None,
    b: Tensor | None = None,
    U: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual add, the next LayerNorm, and the low-rank half of one adapter, or of none.

    Args:
        x: the tap, a frozen sub-layer's output before its residual add, [..., C].
        y: the residual stream, [..., C], dtype of ``x``.
        norm_weight, norm_bias: the LayerNorm that the next sub-layer begins with, [C];
            None after a stage's last sub-layer.
        eps: that norm's epsilon.
        P: [C, α]. Q: [α, m]. b: [m]. U: [m, α]. Any floating dtype; computes with them in that of
            ``x`` or in float32. All None (the default): no adapter.

    Returns:
        ``y + x`` [..., C]; its LayerNorm [..., C], or an empty tensor without a norm;
        ``t = x·P`` [N, α]; ``s = GELU(t·Q + b)·U`` [N, α], N the product of the leading sizes;
        both empty without an adapter. All of the dtype of ``x``.

    Raises:
        TypeError: a dtype is not floating, or those of ``x`` and ``y`` differ.
        ValueError: a shape does not fit, or an adapter is incomplete.
        RuntimeError: a gradient is required; the op is part of the frozen forward.
    """
    check_frozen("sublayer_epilogue", x=x, y=y, norm_weight=norm_weight, P=P, Q=Q, b=b, U=U)
    check_same_dtype(x=x, y=y)
    if x.dim() < 2:
        raise ValueError(f"x must have at least two dimensions, got {list(x.shape)}")
    check_shape("y", y, *x.shape)
    channels = x.shape[-1]
    for name, norm in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if norm is not None:
            check_shape(name, norm, channels)
    if P is not None and Q is not None and b is not None and U is not None:
        check_floating(P=P, Q=Q, b=b, U=U)
        check_shape("Q", Q, -1, -1)
        rank, hidden = Q.shape
        check_shape("P", P, channels, rank)
        check_shape("b", b, hidden)
        check_shape("U", U, hidden, rank)
    elif not (P is Q is b is U is None):
        raise ValueError("an adapter is P, Q, b and U together: some of them are None")
    return torch.ops.e3va.sublayer_epilogue(x, y, norm_weight, norm_bias, eps, P, Q, b, U)


@torch.library.custom_op("e3va::sublayer_epilogue", mutates_args=())
def _sublayer_epilogue(
    x: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    P: Tensor | None,
    Q: Tensor | None,
    b: Tensor | None,
    U: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dispatch.run("sublayer_epilogue", x, x, y, norm_weight, norm_bias, eps, P, Q, b, U)


@_sublayer_epilogue.register_fake
def _(x, y, norm_weight, norm_bias, eps, P, Q, b, U):
    low_rank = (0,) if P is None else (x.shape[:-1].numel(), P.shape[1])
    return (
        y.new_empty(y.shape),
        y.new_empty(0) if norm_weight is None else y.new_empty(y.shape),
        x.new_empty(low_rank),
        x.new_empty(low_rank),
    )
