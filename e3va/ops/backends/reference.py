"""Every op in plain PyTorch: the definition that the other backends must match, and the fallback.

Shape letters: see :mod:`e3va.ops.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from e3va.ops.backends.registry import register
from e3va.ops.functional import (
    fold,
    fold_backward,
    gather_2x2,
    norm_parameters,
    over_tokens,
    project,
    wide,
)
from e3va.ops.storage import compress, expand, keep, kept_in_full, room


@register("sublayer_epilogue", "reference")
def sublayer_epilogue(
    x: Tensor,  # [..., C]
    y: Tensor,  # [..., C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
    P: Tensor | None = None,  # [C, r]
    tap: str = "output",
    storage: str = "full",
    seed: Tensor | None = None,
    index: int = 0,
    into: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    x, y = x.contiguous(), y.contiguous()
    y_out, z = y + x, x.new_empty(0)
    if not into:
        into = [x.new_empty(0)] * 3 if P is None else room(x, P.shape[1], storage)
    t, kept, scale = into
    if norm_weight is not None or (P is not None and tap == "norm"):
        z = F.layer_norm(y_out, y.shape[-1:], _to(norm_weight, y), _to(norm_bias, y), eps)
    if P is not None:
        tapped = x if tap == "output" else z
        project(tapped, P, t)
        if storage != "full":
            compress(tapped, storage, index if seed is None else seed + index, (kept, scale))
            z = z if norm_weight is not None else x.new_empty(0)
    return y_out, z, t, kept, scale


@register("adapters", "reference")
def adapters(
    t: Tensor,  # [K, N, r]
    carry: Tensor | None,  # [N, r]
    D: Tensor | None,  # [K, r, side, side]
    gamma: Tensor | None,  # [K, r]
    g: Tensor,  # [K, branches, d, d]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    g_up: Tensor,  # [K, branches, d, d]
    size: tuple[int, int],
    storage: str = "full",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S [N, K·r]; the state after the stage [N, r]; u [K, N, r] as it is to be kept, and its scales
    [K, N], if any: "full" or "int8". What there is not is empty; so is u where it is t, in full."""
    Q, U = fold(g, Q, U, g_up)
    S, u, c = [], [], None
    if gamma is not None:
        c = wide(t.new_zeros(t.shape[1:]) if carry is None else carry)
    for k, t_k in enumerate(t):
        if c is not None and gamma is not None:
            t_k = (wide(t_k) + gamma[k].to(c) * c).to(t)
            u.append(t_k)
        mixed = t_k if D is None else mix(t_k, D[k], size)
        s = adapter_activation(mixed, Q[k], b[k]) @ U[k].to(t)
        S.append(s)
        if c is not None:
            c = c + s
    after = t.new_empty(0) if c is None else c.to(t)
    read = torch.stack(u) if u else t if storage != "full" else t.new_empty(0)
    return torch.cat(S, dim=1), after, *keep(read, storage)


@register("adapters_backward", "reference")
def adapters_backward(
    dS: Tensor,  # [N, K·r]
    dcarry: Tensor | None,  # [N, r]
    u: Tensor,  # [K, N, r]
    scale: Tensor | None,  # [K, N], of u in int8
    D: Tensor | None,  # [K, r, side, side]
    gamma: Tensor | None,  # [K, r]
    g: Tensor,  # [K, branches, d, d]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    g_up: Tensor,  # [K, branches, d, d]
    size: tuple[int, int],
) -> tuple[Tensor, ...]:
    """S, dt [K, N, r], the gradient of the state before the stage [N, r], and those of D, g, Q, b,
    U and g_up, in float32 or wider; of what there is not, nothing."""
    u = kept_in_full(u, scale, dS)
    K, rank, _ = Q.shape
    Q_in, U_in = Q, U
    Q, U = fold(g, Q, U, g_up)
    S, dt, dcarry_in, dD, dQ, db, dU = _adapters_backward_outputs(dS, u, D, gamma, Q, b, U)
    dc = None
    if gamma is not None:
        dc = wide(u.new_zeros(u.shape[1:]) if dcarry is None else dcarry)
    for k in reversed(range(K)):
        columns = slice(k * rank, (k + 1) * rank)
        ds = dS[:, columns] if dc is None else (dS[:, columns] + dc).to(dS)
        mixed = u[k] if D is None else mix(u[k], D[k], size)
        Q_k, U_k = Q[k].to(u), U[k].to(u)
        z = torch.addmm(b[k].to(u), mixed, Q_k)
        a = F.gelu(z)
        S[:, columns] = a @ U_k
        dU[k] = over_tokens(a, ds)
        dz = torch.ops.aten.gelu_backward(ds @ U_k.t(), z)
        del z, a
        dQ[k] = over_tokens(mixed, dz)
        db[k] = _sum_rows(dz)
        du = dz @ Q_k.t()
        del dz
        if D is not None:
            du, dD[k] = _mix_backward(du, u[k], D[k], size)
        dt[k] = du
        if dc is not None and gamma is not None:
            dc = dc + gamma[k].to(dc) * du
    if dc is not None:
        dcarry_in.copy_(dc)
    dg, dQ, dU, dg_up = fold_backward(dQ, dU, g, Q_in, U_in, g_up)
    return S, dt, dcarry_in, dD, dg, dQ, db, dU, dg_up


def _adapters_backward_outputs(
    dS: Tensor, u: Tensor, D: Tensor | None, gamma: Tensor | None, *weights: Tensor
) -> tuple[Tensor, ...]:
    """Room for S [N, K·r], dt [K, N, r] and dcarry_in [N, r] in the dtype of dS, and for dD and the
    gradients of the folded Q, of b and of the folded U in float32 or wider; of what there is not,
    nothing."""
    sums = torch.promote_types(dS.dtype, torch.float32)
    return (
        torch.empty_like(dS),
        torch.empty_like(u),
        u.new_empty(0 if gamma is None else u.shape[1:]),
        *(u.new_empty(0 if w is None else w.shape, dtype=sums) for w in (D, *weights)),
    )


@register("tap_gradient", "reference")
def tap_gradient(
    taps: Sequence[Tensor] | Tensor,  # K × [N, C], or as kept, [K, N, bytes]
    scale: Tensor | None,  # [K, N]
    storage: str,
    dt: Tensor,  # [K, N, r]
    channels: int,
) -> Tensor:
    dP = dt.new_empty(len(dt), channels, dt.shape[2], dtype=wide(dt[:0]).dtype)
    for k, (tap_k, dt_k) in enumerate(zip(taps, dt, strict=True)):
        if scale is not None:
            tap_k = expand(tap_k, scale[k], storage, channels, dt.dtype)
        dP[k] = over_tokens(tap_k, dt_k)
    return dP


def adapter_activation(t: Tensor, Q: Tensor, b: Tensor) -> Tensor:
    """a = GELU(t·Q + b): [N, r] → [N, m]."""
    return F.gelu(torch.addmm(b.to(t), t, Q.to(t)))


def mix(
    u: Tensor,  # [N, r]
    D: Tensor,  # [r, side, side]
    size: tuple[int, int],
) -> Tensor:
    """u + D ⋆ u, a depth-wise convolution over the map that ends with zeros: [N, r]."""
    image = _channels_first(u, size)
    kernel = D.to(image)[:, None]
    mixed = image + F.conv2d(image, kernel, padding=D.shape[-1] // 2, groups=len(D))
    return mixed.permute(0, 2, 3, 1).reshape(u.shape).to(u)


def _mix_backward(
    dmixed: Tensor,  # [N, r]
    u: Tensor,  # [N, r]
    D: Tensor,  # [r, side, side]
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    G, image = _channels_first(dmixed, size), _channels_first(u, size)
    kernel, pad = D.to(image)[:, None], [D.shape[-1] // 2] * 2
    du, dD, _ = torch.ops.aten.convolution_backward(
        G, image, kernel, None, [1, 1], pad, [1, 1], False, [0, 0], len(D), [True, True, False]
    )
    du = (du + G).permute(0, 2, 3, 1).reshape(u.shape).to(u)
    return du, dD[:, 0]


def _channels_first(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, r] → [B, r, H, W], in float32 or wider."""
    H, W = size
    return wide(rows).reshape(len(rows) // (H * W), H, W, rows.shape[1]).permute(0, 3, 1, 2)


@register("stage_exit_backward", "reference")
def stage_exit_backward(
    dp: Tensor,  # [B, H, W, C]
    dgathered: Tensor | None,  # [B, ceil(H/2), ceil(W/2), 4C]
    p: Tensor,  # [B, H, W, C]
    mean: Tensor,  # [N]
    rstd: Tensor,  # [N]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    merge_weight: Tensor | None,  # [4C]
    merge_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    h = _undo_output_norm(p, mean, rstd, weight, bias)
    dh, dweight, dbias = _output_norm_backward(dp, h, mean, rstd, weight, bias)
    if dgathered is not None and merge_weight is not None:
        dh += _gathered_backward(dgathered, h, merge_weight, merge_eps)
    return dh, dweight, dbias


def _undo_output_norm(
    p: Tensor,  # [..., C]
    mean: Tensor,  # [N]
    rstd: Tensor,  # [N]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
) -> Tensor:
    rows, weight, bias = p.flatten(0, -2).to(mean.dtype), weight.to(mean), bias.to(mean)
    # A weight so small beside its bias that p, as rounded, tells nothing of the channel.
    lost = weight.abs() <= torch.finfo(p.dtype).eps * bias.abs() + torch.finfo(p.dtype).tiny
    normal = (rows - bias) * torch.where(lost, 0.0, 1 / weight)
    limit = p.shape[-1] ** 0.5  # of a normalised value
    rows = normal.clamp(-limit, limit) / rstd[:, None] + mean[:, None]
    return rows.to(p.dtype).view_as(p)


def _output_norm_backward(
    dp: Tensor,  # [..., C]
    h: Tensor,  # [..., C]
    mean: Tensor,  # [N]
    rstd: Tensor,  # [N]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
) -> tuple[Tensor, Tensor, Tensor]:
    dp = dp.to(h)
    statistics = (v.view(*h.shape[:-1], 1) for v in (mean, rstd))
    weight_h, bias_h = norm_parameters(h, weight, bias)
    # Of 16-bit values PyTorch sums the gradients of parameters in 16 bits, on a CPU.
    exact = h.device.type == "cuda" or h.dtype == mean.dtype
    dh, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dp, h, h.shape[-1:], *statistics, weight_h, bias_h, [True, exact, exact]
    )
    if not exact:
        dweight, dbias = (mean.new_zeros(h.shape[-1]) for _ in range(2))
        rows = dp.flatten(0, -2), h.flatten(0, -2), mean[:, None], rstd[:, None]
        for dp_i, h_i, mean_i, rstd_i in zip(*(v.split(256) for v in rows), strict=True):
            dweight += (dp_i * ((h_i - mean_i) * rstd_i)).sum(0)
            dbias += _sum_rows(dp_i)
    return dh, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _gathered_backward(
    dgathered: Tensor,  # [B, ceil(H/2), ceil(W/2), 4C]
    h: Tensor,  # [B, H, W, C]
    norm_weight: Tensor,  # [4C]
    eps: float,
) -> Tensor:
    x, weight = gather_2x2(h), norm_weight.to(h)
    shape = list(x.shape[-1:])
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, None, eps)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dgathered, x, shape, mean, rstd, weight, None, [True, False, False]
    )
    H, W = h.shape[1:3]
    neighbours = dx.unflatten(-1, (2, 2, -1)).permute(0, 1, 4, 2, 3, 5)
    return neighbours.flatten(3, 4).flatten(1, 2)[:, :H, :W]


@register("window_attention", "reference")
def window_attention(
    qkv: Tensor,  # [B, H, W, 3C]
    qkv_bias: Tensor,  # [3C]
    position_bias: Tensor,  # [(2w-1)², heads]
    window: int,
    shift: int,
) -> Tensor:
    B, H, W, C3 = qkv.shape
    C, heads = C3 // 3, position_bias.shape[1]
    tokens = window * window
    rows, columns = -(-H // window), -(-W // window)
    pad_bottom, pad_right = rows * window - H, columns * window - W
    if pad_bottom or pad_right:
        # Outside the map the normalised input is zero, so its projection is the bias alone.
        padded = qkv_bias.to(qkv).expand(B, rows * window, columns * window, C3).clone()
        padded[:, :H, :W] = qkv
        qkv = padded
    if shift:
        qkv = qkv.roll((-shift, -shift), dims=(1, 2))
    q, k, v = (
        qkv.view(B, rows, window, columns, window, 3, heads, C // heads)
        .permute(5, 0, 1, 3, 6, 2, 4, 7)
        .reshape(3, B * rows * columns, heads, tokens, C // heads)
    )
    bias = position_bias.to(qkv)[relative_position_index(window, qkv.device)].permute(2, 0, 1)
    if shift:
        bias = bias + shift_mask(rows, columns, window, shift, bias)[:, None]
        bias = bias.repeat(B, 1, 1, 1)  # [B·windows, heads, w², w²]
    attention = (q * (C // heads) ** -0.5) @ k.transpose(-2, -1) + bias
    out = (
        (attention.softmax(-1) @ v)
        .view(B, rows, columns, heads, window, window, C // heads)
        .permute(0, 1, 4, 2, 5, 3, 6)
        .reshape(B, rows * window, columns * window, C)
    )
    if shift:
        out = out.roll((shift, shift), dims=(1, 2))
    return out[:, :H, :W].contiguous()


def relative_position_index(window: int, device: torch.device) -> Tensor:
    """Row of the position-bias table for each pair of a window's tokens: [w², w²]."""
    axis = torch.arange(window, device=device)
    row, column = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    down = row[:, None] - row + window - 1
    right = column[:, None] - column + window - 1
    return down * (2 * window - 1) + right


def shift_mask(rows: int, columns: int, window: int, shift: int, like: Tensor) -> Tensor:
    """-100 between tokens that are neighbours only by the cyclic shift: [windows, w², w²]."""

    def regions(windows: int) -> Tensor:
        position = torch.arange(windows * window, device=like.device)
        last = windows * window
        return (position >= last - window).long() + (position >= last - shift).long()

    region = regions(rows)[:, None] * 3 + regions(columns)
    region = (
        region.view(rows, window, columns, window).permute(0, 2, 1, 3).reshape(-1, window * window)
    )
    return (region[:, None, :] != region[:, :, None]).to(like.dtype) * -100.0


def _sum_rows(x: Tensor) -> Tensor:
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.sum(0, dtype=accumulator)


def _to(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like)
