"""``e3va::highway`` and ``e3va::highway_backward``: the adapters of one stage, all at once.

All adapters of a stage add into one highway, so they share one output gradient G: the forward is
one GEMM, and the backward needs only t and the taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from e3va.ops import dispatch, reference
from e3va.ops.checks import check_floating, check_same_dtype, check_shape
from e3va.ops.taps import TAPS, compress, expand, stored_channels

dispatch.register("highway_backward", "reference")(reference.highway_backward)


def highway(
    h_in: Tensor,
    y_in: Tensor,
    y_out: Tensor,
    x: Sequence[Tensor],
    t: Sequence[Tensor],
    s: Sequence[Tensor],
    P: Tensor,
    Q: Tensor,
    b: Tensor,
    U: Tensor,
    V: Tensor,
    c: Tensor,
    scale: Sequence[Tensor] = (),
    taps: str = "full",
) -> Tensor:
    """h_out = y_out + (h_in − y_in) + Σ_k s_k·V_k + c (arXiv 2306.09729, eq. 5).

    ``t`` and ``s`` are what :func:`e3va.ops.sublayer_epilogue` made of ``x`` with *these* P, Q, b
    and U. Gradients go to ``h_in`` and to P, Q, b, U, V, c, through t and s as functions of the
    taps; the trunk's tensors (y_in, y_out, x, t, s) get none. Saved for backward: x, t and the
    parameters. Beside taps in "int4" t would be a fifth of it, and is kept in "int8".

    A fused backward reads the taps and t once and G twice, and writes gradients of parameters
    alone, the same bits on every run: fixed chunks of rows are summed by themselves, then in order.

    Args:
        h_in: the highway before the stage, [..., C].
        y_in, y_out: the frozen stage's input and output, [..., C].
        x: K taps, each [..., C], or as :func:`e3va.ops.sublayer_epilogue` returns them to be kept.
        t, s: K each, [N, α], N the product of the leading sizes.
        P: [K, C, α]. Q: [K, α, m]. b: [K, m]. U: [K, m, α]. V: [K, α, C]. c: [C]. Of one dtype,
            which their gradients have too; cast to that of ``y_out`` to compute.

        scale: K scales, [N] each, of taps that are not "full".
        taps: how ``x`` is kept, one of :data:`e3va.ops.taps.TAPS`.

    Returns:
        The highway after the stage, [..., C], dtype of ``y_out``.

    Raises:
        TypeError: dtypes are not floating, or differ within the two groups above.
        ValueError: a shape or the number of taps does not fit.
    """
    if taps not in TAPS:
        raise ValueError(f"taps must be one of {', '.join(TAPS)}, got {taps!r}")
    full = {f"x[{k}]": v for k, v in enumerate(x)} if taps == "full" else {}
    check_same_dtype(y_out=y_out, h_in=h_in, y_in=y_in, **full)
    check_floating(**{f"t[{k}]": v for k, v in enumerate(t)})
    check_same_dtype(P=P, Q=Q, b=b, U=U, V=V, c=c)
    check_shape("P", P, -1, -1, -1)
    check_shape("Q", Q, len(P), -1, -1)
    adapters, channels, rank = P.shape
    hidden = Q.shape[-1]
    if not len(x) == len(t) == len(s) == adapters:
        raise ValueError(f"P holds {adapters} adapters, got {len(x)} x, {len(t)} t and {len(s)} s")
    check_shape("y_out", y_out, *y_out.shape[:-1], channels)
    for name, tensor in (("h_in", h_in), ("y_in", y_in), *full.items()):
        check_shape(name, tensor, *y_out.shape)
    tokens = y_out.shape[:-1].numel()
    if len(scale) != (0 if taps == "full" else adapters):
        raise ValueError(f"{adapters} taps {taps!r} do not go with {len(scale)} scales")
    for k, scale_k in enumerate(scale):
        check_shape(f"x[{k}]", x[k], tokens, stored_channels(channels, taps))
        check_shape(f"scale[{k}]", scale_k, tokens)
    for k in range(adapters):
        check_shape(f"t[{k}]", t[k], tokens, rank)
        check_shape(f"s[{k}]", s[k], tokens, rank)
    check_shape("Q", Q, adapters, rank, hidden)
    check_shape("b", b, adapters, hidden)
    check_shape("U", U, adapters, hidden, rank)
    check_shape("V", V, adapters, rank, channels)
    check_shape("c", c, channels)
    lists = (list(values) for values in (x, scale, t, s))
    h, _, _ = torch.ops.e3va.highway(h_in, y_in, y_out, taps, *lists, P, Q, b, U, V, c)
    return h


@torch.library.custom_op("e3va::highway", mutates_args=())
def _highway(
    h_in: Tensor,
    y_in: Tensor,
    y_out: Tensor,
    taps: str,
    x: Sequence[Tensor],
    scale: Sequence[Tensor],
    t: Sequence[Tensor],
    s: Sequence[Tensor],
    P: Tensor,
    Q: Tensor,
    b: Tensor,
    U: Tensor,
    V: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """h_out; beside int4 taps also t in int8 [K, N, α] and its scales [K, N]."""
    with torch.autocast(y_out.device.type, enabled=False):
        h = reference.highway(h_in, y_in, y_out, s, V, c)
    if taps != "int4" or not t:
        return h, h.new_empty(0), h.new_empty(0)
    kept, scales = compress(torch.stack(list(t)), "int8", seed=0)
    return h, kept.view(len(t), *t[0].shape), scales.view(len(t), -1)


@_highway.register_fake
def _(h_in, y_in, y_out, taps, x, scale, t, s, P, Q, b, U, V, c):
    h = y_out.new_empty(y_out.shape)
    if taps != "int4" or not t:
        return h, h.new_empty(0), h.new_empty(0)
    shape = len(t), *t[0].shape
    return h, h.new_empty(shape, dtype=torch.int8), h.new_empty(shape[:2], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    _, _, _, ctx.taps, x, scale, t, _, P, Q, b, U, V, _ = inputs
    _, t_kept, t_scale = output
    ctx.mark_non_differentiable(t_kept, t_scale)
    t = (t_kept, t_scale) if ctx.taps == "int4" else t
    ctx.save_for_backward(P, Q, b, U, V, *x, *scale, *t)


def _backward(ctx, G, *_):
    P, Q, b, U, V, *saved = ctx.saved_tensors
    K = len(P)
    x, saved = saved[:K], saved[K:]
    scale, t = ([], saved) if ctx.taps == "full" else (saved[:K], saved[K:])
    grads = torch.ops.e3va.highway_backward(G, ctx.taps, x, scale, t, P, Q, b, U, V)
    nothing = ([None] * len(values) for values in (x, scale, x, x))
    return G, None, None, None, *nothing, *grads


_highway.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("e3va::highway_backward", mutates_args=())
def _highway_backward(
    G: Tensor,
    taps: str,
    x: Sequence[Tensor],
    scale: Sequence[Tensor],
    t: Sequence[Tensor],
    P: Tensor,
    Q: Tensor,
    b: Tensor,
    U: Tensor,
    V: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dP, dQ, db, dU, dV, dc) from G [..., C], the K taps x [..., C], or as stored, and K t
    [N, α], or as :func:`_highway` keeps them; shapes and dtype of the parameters, accumulated in
    fp32 or wider. Has no backward of its own."""
    x = [x_k.flatten(0, -2) for x_k in x]
    if taps == "int4":
        kept, scales = t
        rows = expand(kept.flatten(0, 1), scales.flatten(), "int8", kept.shape[-1], G.dtype)
        t = rows.view(kept.shape).unbind(0)
    return dispatch.run("highway_backward", G, G.flatten(0, -2), x, scale, taps, t, P, Q, b, U, V)


@_highway_backward.register_fake
def _(G, taps, x, scale, t, P, Q, b, U, V):
    return (*(p.new_empty(p.shape) for p in (P, Q, b, U, V)), V.new_empty(V.shape[-1]))
