"""``e3va::highway`` and ``e3va::highway_backward``: the adapters of one stage, all at once.

All adapters of a stage add into one highway, so they share one output gradient G: the forward ends
with one GEMM, and the backward needs only the taps and what is α wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from e3va.ops import dispatch, functional
from e3va.ops.checks import check_floating, check_once, check_same_dtype, check_shape
from e3va.ops.library import operator
from e3va.ops.storage import STORAGES, stored_channels


def highway(
    h_in: Tensor,
    y_in: Tensor,
    y_out: Tensor,
    taps: Sequence[Tensor] | Tensor,
    t: Tensor,
    P: Tensor,
    g: Tensor,
    Q: Tensor,
    b: Tensor,
    U: Tensor,
    g_up: Tensor,
    V: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    gamma: Tensor | None = None,
    carry: Tensor | None = None,
    scale: Tensor | None = None,
    storage: str = "full",
) -> tuple[Tensor, Tensor | None]:
    """h_out = y_out + (h_in − y_in) + Σ_k s_k·V_k + c (arXiv 2306.09729, eq. 5), where

        u_k = t_k + γ_k ⊙ (carry + Σ_{j<k} s_j),
        s_k = GELU((u_k + D_k ⋆ u_k)·(g_k·Q_k) + b_k)·(U_k·g_up_k),

    and of g_k, g_up_k each branch multiplies its own d of the α rows of Q_k and columns of U_k.
    ``t`` is what :func:`e3va.ops.sublayer_epilogue` made of the taps with *this* P. Gradients go to
    ``h_in``, ``carry`` and to the parameters, through t as a function of the taps; the trunk's
    tensors (y_in, y_out, taps, t) get none. Saved for backward: the taps, u, the carry and the
    parameters. Beside taps in "int4" u is kept in "int8".

    A fused backward reads the taps once and writes nothing wider than α but gradients of
    parameters, the same bits on every run: fixed chunks of rows are summed by themselves, then in
    order.

    Args:
        h_in: the highway before the stage, [B, H, W, C].
        y_in, y_out: the frozen stage's input and output, [B, H, W, C].
        taps: K, each [B, H, W, C], or as :func:`e3va.ops.sublayer_epilogue` keeps them, in one
            tensor [K, N, bytes].
        t: [K, N, α], N = B·H·W.
        P: [K, C, α]. g, g_up: [K, branches, d, d], α = branches·d. Q: [K, α, m]. b: [K, m].
            U: [K, m, α]. V: [K, α, C]. c: [C]. Of one dtype, which their gradients have too; cast
            to that of ``y_out`` to compute.
        D: depth-wise kernels, [K, α, side, side], side odd; None (the default): no mixing.
        gamma: how much of the state an adapter hears, [K, α]; None (the default): no state.
        carry: the state before the stage, [B, H, W, α]; None (the default): zero.
        scale: of taps that are not "full", [K, N].
        storage: how ``taps`` are kept, one of :data:`e3va.ops.storage.STORAGES`.

    Returns:
        The highway after the stage, [B, H, W, C], and the state after it, [B, H, W, α], or None
        without one; dtype of ``y_out``.

    Raises:
        TypeError: dtypes are not floating, or differ within the two groups above.
        ValueError: a shape or the number of taps does not fit, or there is a carry without gamma.
    """
    kept = [taps] if isinstance(taps, Tensor) else list(taps)
    arguments = h_in, y_in, y_out, carry, storage, kept, scale, t
    parameters = P, D, gamma, g, Q, b, U, g_up, V, c
    check_once(_check, *arguments, *parameters)
    h, carry, *_ = torch.ops.e3va.highway(*arguments, *parameters)
    return h, None if gamma is None else carry


def _check(
    h_in: Tensor,
    y_in: Tensor,
    y_out: Tensor,
    carry: Tensor | None,
    storage: str,
    taps: list[Tensor],
    scale: Tensor | None,
    t: Tensor,
    P: Tensor,
    D: Tensor | None,
    gamma: Tensor | None,
    g: Tensor,
    Q: Tensor,
    b: Tensor,
    U: Tensor,
    g_up: Tensor,
    V: Tensor,
    c: Tensor,
) -> None:
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    full = {f"taps[{k}]": v for k, v in enumerate(taps)} if storage == "full" else {}
    maps = {"h_in": h_in, "y_in": y_in, **full}
    check_same_dtype(y_out=y_out, **maps, **_given(carry=carry))
    check_floating(t=t)
    check_same_dtype(P=P, g=g, Q=Q, b=b, U=U, g_up=g_up, V=V, c=c, **_given(D=D, gamma=gamma))
    check_shape("P", P, -1, -1, -1)
    check_shape("Q", Q, len(P), -1, -1)
    adapters, channels, rank = P.shape
    hidden = Q.shape[-1]
    check_shape("y_out", y_out, -1, -1, -1, channels)
    for name, tensor in maps.items():
        check_shape(name, tensor, *y_out.shape)
    tokens = y_out.shape[:-1].numel()
    check_shape("t", t, adapters, tokens, rank)
    if (scale is None) != (storage == "full"):
        without = "without" if scale is None else "with"
        raise ValueError(f"taps kept as {storage!r} come {without} a scale")
    if scale is None:
        if len(taps) != adapters:
            raise ValueError(f"P holds {adapters} adapters, got {len(taps)} taps")
    else:
        check_shape("taps", taps[0], adapters, tokens, stored_channels(channels, storage))
        check_shape("scale", scale, adapters, tokens)
    check_shape("Q", Q, adapters, rank, hidden)
    check_shape("g", g, adapters, -1, -1, -1)
    branches, side = g.shape[1:3]
    if branches * side != rank:
        raise ValueError(
            f"g must have {rank} rows in all kernels of a tap, as P has columns, "
            f"got {branches} kernels of {side}"
        )
    for name, kernel in (("g", g), ("g_up", g_up)):
        check_shape(name, kernel, adapters, branches, side, side)
    check_shape("b", b, adapters, hidden)
    check_shape("U", U, adapters, hidden, rank)
    check_shape("V", V, adapters, rank, channels)
    check_shape("c", c, channels)
    if D is not None:
        check_shape("D", D, adapters, rank, D.shape[-1], D.shape[-1])
        if D.shape[-1] % 2 == 0:
            raise ValueError(f"D must have an odd side, got {D.shape[-1]}")
    if gamma is not None:
        check_shape("gamma", gamma, adapters, rank)
    if carry is not None:
        check_shape("carry", carry, *y_out.shape[:-1], rank)
        if gamma is None:
            raise ValueError("a carry is heard through gamma, which is None")


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@operator
def _highway(
    h_in: Tensor,
    y_in: Tensor,
    y_out: Tensor,
    carry: Tensor | None,
    storage: str,
    taps: Sequence[Tensor],
    scale: Tensor | None,
    t: Tensor,
    P: Tensor,
    D: Tensor | None,
    gamma: Tensor | None,
    g: Tensor,
    Q: Tensor,
    b: Tensor,
    U: Tensor,
    g_up: Tensor,
    V: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h_out; the state after the stage [B, H, W, α], if any; u [K, N, α] as it is kept, and in int8
    its scales [K, N]."""
    rows = t.to(y_out)
    before = None if carry is None else carry.flatten(0, -2)
    weights, size = (D, gamma, g, Q, b, U, g_up), y_out.shape[1:3]
    kept = "int8" if storage == "int4" else "full"
    S, after, u, u_scale = dispatch.run("adapters", y_out, rows, before, *weights, size, kept)
    with torch.autocast(y_out.device.type, enabled=False):
        h = functional.highway(h_in, y_in, y_out, S, V, c)
    if gamma is not None:
        after = after.view(*y_out.shape[:-1], P.shape[2])
    elif kept == "full":
        u = rows.clone() if rows is t else rows
    return h, after, u, u_scale


@_highway.register_fake
def _(h_in, y_in, y_out, carry, storage, taps, scale, t, P, D, gamma, g, Q, b, U, g_up, V, c):
    rows, state = y_out.shape[:-1], gamma is not None
    h = y_out.new_empty(y_out.shape)
    after = y_out.new_empty((*rows, P.shape[2]) if state else 0)
    coded = storage == "int4"
    u = h.new_empty(t.shape, dtype=torch.int8 if coded else h.dtype)
    return h, after, u, h.new_empty(t.shape[:2] if coded else 0, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    _, _, _, carry, ctx.storage, taps, scale, _, *parameters, _ = inputs
    _, _, kept, kept_scale = output
    ctx.mark_non_differentiable(kept, kept_scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(carry, kept, kept_scale, *parameters, scale, *taps)


def _backward(ctx, G, dcarry, *_):
    carry, kept, kept_scale, P, D, gamma, g, Q, b, U, g_up, V, scale, *taps = ctx.saved_tensors
    nothing = [None] * len(taps), None, None
    if gamma is None:
        dcarry = None  # of nothing
    if G is None and dcarry is None:
        return *[None] * 5, *nothing, *[None] * 10
    if G is None:
        G = dcarry.new_zeros(*dcarry.shape[:-1], V.shape[-1])
    dbefore, dP, dD, dgamma, *grads = torch.ops.e3va.highway_backward(
        *(G, carry, dcarry, ctx.storage, taps, scale, kept, kept_scale),
        *(P, D, gamma, g, Q, b, U, g_up, V),
    )
    return (
        G,
        None,
        None,
        None if carry is None else dbefore,
        None,
        *nothing,
        dP,
        None if D is None else dD,
        None if gamma is None else dgamma,
        *grads,
    )


_highway.register_autograd(_backward, setup_context=_setup_context)


@operator
def _highway_backward(
    G: Tensor,
    carry: Tensor | None,
    dcarry: Tensor | None,
    storage: str,
    taps: Sequence[Tensor],
    scale: Tensor | None,
    kept: Tensor,
    kept_scale: Tensor,
    P: Tensor,
    D: Tensor | None,
    gamma: Tensor | None,
    g: Tensor,
    Q: Tensor,
    b: Tensor,
    U: Tensor,
    g_up: Tensor,
    V: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dcarry before the stage, dP, dD, dgamma, dg, dQ, db, dU, dg_up, dV, dc) from G [B, H, W, C],
    the carry, the gradient of the state after the stage, and what :func:`_highway` keeps; shapes
    and dtype of the parameters, empty where there is none, accumulated in fp32 or wider. Has no
    backward."""
    with torch.autocast(G.device.type, enabled=False):
        rows = G.flatten(0, -2)
        after = None if dcarry is None else dcarry.flatten(0, -2)
        dS = rows @ V.flatten(0, 1).to(G).t()  # [N, K·α]
        u = kept, kept_scale if storage == "int4" else None
        arguments = dS, after, *u, D, gamma, g, Q, b, U, g_up, G.shape[1:3]
        S, dt, dbefore, dD, *sums = dispatch.run("adapters_backward", G, *arguments)
        dgamma = G.new_empty(0) if gamma is None else _gamma_gradient(carry, S, dt)
        dV = functional.over_tokens(S, rows).view(V.shape).to(V)
        del S, dS
        flat = taps[0] if storage != "full" else [tap_k.flatten(0, -2) for tap_k in taps]
        dP = dispatch.run("tap_gradient", G, flat, scale, storage, dt, G.shape[-1])
        if gamma is not None:
            dbefore = dbefore.view(*G.shape[:-1], P.shape[2])
        dc = rows.sum(0, dtype=torch.promote_types(G.dtype, torch.float32))
        return dbefore, *(value.to(P) for value in (dP, dD, dgamma, *sums)), dV, dc.to(V)


def _gamma_gradient(carry: Tensor | None, S: Tensor, dt: Tensor) -> Tensor:
    """Σ dt_k ⊙ (carry + Σ_{j<k} s_j) over the tokens, [K, α]: what an adapter heard is summed anew,
    from the first on. Taken from the state after the stage, as rounded, by subtraction, it would be
    lost in that rounding where a stage has many adapters."""
    K, tokens, rank = dt.shape
    first = dt.new_zeros(tokens, rank) if carry is None else carry.flatten(0, -2)
    heard = torch.cat([first, S[:, :-rank]], 1).view(tokens, K, rank)
    heard = heard.cumsum(1, dtype=torch.promote_types(S.dtype, torch.float32))
    return heard.mul_(dt.transpose(0, 1)).sum(0)


@_highway_backward.register_fake
def _(G, carry, dcarry, storage, taps, scale, kept, kept_scale, P, D, gamma, *weights):
    dbefore = G.new_empty(0 if gamma is None else (*G.shape[:-1], P.shape[2]))
    parameters = (P.new_empty(0 if p is None else p.shape) for p in (P, D, gamma, *weights))
    return dbefore, *parameters, P.new_empty(P.shape[1])
