"""Every op in plain PyTorch: the definition that the other backends must match, and the fallback.

Shape letters, here and everywhere: B images, H×W a stage's map, N = B·H·W tokens, C channels,
K taps, α rank (``r`` in code), m hidden width, w window side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from e3va.ops.taps import compress, expand


def sublayer_epilogue(
    x: Tensor,  # [..., C]
    y: Tensor,  # [..., C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
    P: Tensor | None = None,  # [C, r]
    Q: Tensor | None = None,  # [r, m]
    b: Tensor | None = None,  # [m]
    U: Tensor | None = None,  # [m, r]
    taps: str = "full",
    seed: int = 0,
) -> tuple[Tensor, ...]:
    x, y = x.contiguous(), y.contiguous()
    y_out = y + x
    if norm_weight is None:
        z = y.new_empty(0)
    else:
        z = F.layer_norm(y_out, y.shape[-1:], norm_weight.to(y), _to(norm_bias, y), eps)
    if P is None or Q is None or b is None or U is None:
        return y_out, z, *(x.new_empty(0) for _ in range(4))
    t = x.flatten(0, -2) @ P.to(x)
    s = adapter_activation(t, Q, b) @ U.to(x)
    if taps == "full":
        return y_out, z, t, s, x.new_empty(0), x.new_empty(0)
    return y_out, z, t, s, *compress(x, taps, seed)


def adapter_activation(t: Tensor, Q: Tensor, b: Tensor) -> Tensor:
    """a = GELU(t·Q + b): [N, r] → [N, m]."""
    return F.gelu(torch.addmm(b.to(t), t, Q.to(t)))


def highway(
    h_in: Tensor,  # [..., C]
    y_in: Tensor,  # [..., C]
    y_out: Tensor,  # [..., C]
    s: Sequence[Tensor],  # K × [N, r]
    V: Tensor,  # [K, r, C]
    c: Tensor,  # [C]
) -> Tensor:
    # h_in == y_in at initialisation: this order makes h_out == y_out to the last bit.
    h = (h_in - y_in).contiguous().add_(y_out).add_(c.to(y_out)).flatten(0, -2)
    return h.addmm_(torch.cat(list(s), dim=1), V.flatten(0, 1).to(y_out)).view_as(y_out)


def highway_backward(
    G: Tensor,  # [N, C]
    x: Sequence[Tensor],  # K × [N, C], or as stored
    scale: Sequence[Tensor],  # K × [N], or none
    taps: str,
    t: Sequence[Tensor],  # K × [N, r]
    P: Tensor,  # [K, C, r]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    V: Tensor,  # [K, r, C]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rank, channels = V.shape[1:]
    dS = G @ V.flatten(0, 1).to(G).t()  # [N, K·r]
    dP, dQ, db, dU, S = [], [], [], [], []
    for k, (x_k, t_k) in enumerate(zip(x, t, strict=True)):
        dS_k = dS[:, k * rank : (k + 1) * rank]
        U_k, Q_k = U[k].to(G), Q[k].to(G)
        z = torch.addmm(b[k].to(G), t_k, Q_k)
        a = F.gelu(z)
        S.append(a @ U_k)
        dU.append((a.t() @ dS_k).to(U.dtype))
        dz = torch.ops.aten.gelu_backward(dS_k @ U_k.t(), z)
        del z, a
        dQ.append((t_k.t() @ dz).to(Q.dtype))
        db.append(_sum_rows(dz).to(b.dtype))
        if taps != "full":
            x_k = expand(x_k, scale[k], taps, channels, G.dtype)
        dP.append((x_k.t() @ (dz @ Q_k.t())).to(P.dtype))
        del dz
    dV = (torch.cat(S, dim=1).t() @ G).view(-1, rank, channels).to(V.dtype)
    return (
        torch.stack(dP),
        torch.stack(dQ),
        torch.stack(db),
        torch.stack(dU),
        dV,
        _sum_rows(G).to(V.dtype),
    )


def output_norm(
    h: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = norm_parameters(h, weight, bias)
    p, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], weight, bias, eps)
    return p, mean.flatten(), rstd.flatten()


def undo_output_norm(
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


def output_norm_backward(
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


def norm_parameters(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """On a CPU the parameters' dtype is that of the norm's statistics, too: float32 or wider."""
    dtype = h.dtype if h.device.type == "cuda" else torch.promote_types(h.dtype, torch.float32)
    return weight.to(dtype), bias.to(dtype)


def patch_merging(
    h: Tensor,  # [B, H, W, C]
    norm_weight: Tensor,  # [4C]
    norm_bias: Tensor,  # [4C]
    eps: float,
    reduction: Tensor,  # [D, 4C]
) -> Tensor:
    x = gather_2x2(h)
    x = F.layer_norm(x, x.shape[-1:], norm_weight.to(x), norm_bias.to(x), eps)
    return F.linear(x, reduction.to(x))


def patch_merging_backward(
    G: Tensor,  # [B, ceil(H/2), ceil(W/2), D]
    h: Tensor,  # [B, H, W, C]
    norm_weight: Tensor,  # [4C]
    norm_bias: Tensor,  # [4C]
    eps: float,
    reduction: Tensor,  # [D, 4C]
) -> Tensor:
    x = gather_2x2(h)
    normalized_shape = list(x.shape[-1:])
    weight, bias = norm_weight.to(x), norm_bias.to(x)
    _, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        G @ reduction.to(x), x, normalized_shape, mean, rstd, weight, bias, [True, False, False]
    )
    return _scatter_2x2(dx, h)


def gather_2x2(h: Tensor) -> Tensor:
    """[B, H, W, C] → [B, ceil(H/2), ceil(W/2), 4C], missing rows and columns taken as zero."""
    H, W = h.shape[1:3]
    h = F.pad(h, (0, 0, 0, W % 2, 0, H % 2))
    # The order of the four neighbours is Swin's: down first, then right.
    return torch.cat(
        [h[:, 0::2, 0::2], h[:, 1::2, 0::2], h[:, 0::2, 1::2], h[:, 1::2, 1::2]], dim=-1
    )


def _scatter_2x2(dx: Tensor, h: Tensor) -> Tensor:
    B, H, W, C = h.shape
    dh = dx.new_empty(B, H + H % 2, W + W % 2, C)
    for i, (row, column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        dh[:, row::2, column::2] = dx[..., i * C : (i + 1) * C]
    return dh[:, :H, :W].contiguous()


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
