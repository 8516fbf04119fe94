"""``e3va::sublayer_epilogue``: all that follows a frozen sub-layer, in one pass over its output."""

from __future__ import annotations

import torch
from torch import Tensor

from e3va.ops import dispatch, reference
from e3va.ops.checks import check_floating, check_frozen, check_same_dtype, check_shape
from e3va.ops.taps import TAPS, stored_channels, stored_dtype

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
    taps: str = "full",
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Residual add, the next LayerNorm, and the low-rank half of one adapter, or of none.

    A fused kernel moves 4·N·C values (x and y read, y' and its norm written), 2·N·α of t and s, and
    the kept tap; nothing of width m.

    Args:
        x: the tap, a frozen sub-layer's output before its residual add, [..., C].
        y: the residual stream, [..., C], dtype of ``x``.
        norm_weight, norm_bias: the LayerNorm that the next sub-layer begins with, [C];
            None after a stage's last sub-layer.
        eps: that norm's epsilon.
        P: [C, α]. Q: [α, m]. b: [m]. U: [m, α]. Any floating dtype; computes with them in that of
            ``x`` or in float32. All None (the default): no adapter.
        taps: how the tap is to be kept for backward, one of :data:`e3va.ops.taps.TAPS`.
        seed: an integer, [] on the CPU, of the stochastic rounding of "int4"; default: 0.

    Returns:
        ``y + x`` [..., C]; its LayerNorm [..., C], or an empty tensor without a norm;
        ``t = x·P`` [N, α]; ``s = GELU(t·Q + b)·U`` [N, α], N the product of the leading sizes;
        both empty without an adapter. All of the dtype of ``x``. Last the tap as it is to be kept,
        and its scales, as :func:`e3va.ops.taps.compress` makes them; both empty without an adapter,
        and with taps "full", where ``x`` itself is kept.

    Raises:
        TypeError: a dtype is not floating, or those of ``x`` and ``y`` differ.
        ValueError: a shape does not fit, an adapter or a norm is incomplete, ``taps`` is unknown.
        RuntimeError: a gradient is required; the op is part of the frozen forward.
    """
    norms = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_frozen("sublayer_epilogue", x=x, y=y, **norms, P=P, Q=Q, b=b, U=U)
    check_same_dtype(x=x, y=y)
    if x.dim() < 2:
        raise ValueError(f"x must have at least two dimensions, got {list(x.shape)}")
    check_shape("y", y, *x.shape)
    if taps not in TAPS:
        raise ValueError(f"taps must be one of {', '.join(TAPS)}, got {taps!r}")
    channels = x.shape[-1]
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("a norm is norm_weight and norm_bias together: one of them is None")
    for name, norm in norms.items():
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
    return torch.ops.e3va.sublayer_epilogue(
        x, y, norm_weight, norm_bias, eps, P, Q, b, U, taps, seed
    )


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
    taps: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    number = 0 if seed is None else int(seed.item())
    return dispatch.run(
        "sublayer_epilogue", x, x, y, norm_weight, norm_bias, eps, P, Q, b, U, taps, number
    )


@_sublayer_epilogue.register_fake
def _(x, y, norm_weight, norm_bias, eps, P, Q, b, U, taps, seed):
    tokens, channels = x.shape[:-1].numel(), x.shape[-1]
    low_rank = (0,) if P is None else (tokens, P.shape[1])
    if P is None or taps == "full":
        tap, scale = x.new_empty(0), x.new_empty(0)
    else:
        tap = x.new_empty(tokens, stored_channels(channels, taps), dtype=stored_dtype(taps))
        scale = x.new_empty(tokens, dtype=torch.float32)
    return (
        y.new_empty(y.shape),
        y.new_empty(0) if norm_weight is None else y.new_empty(y.shape),
        x.new_empty(low_rank),
        x.new_empty(low_rank),
        tap,
        scale,
    )
