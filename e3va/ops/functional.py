"""What the ops compute in plain PyTorch on every backend, and what their backends share.

Shape letters, here and everywhere: B images, H×W a stage's map, N = B·H·W tokens, C channels,
K taps, α rank (``r`` in code), m hidden width, w window side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def project(tapped: Tensor, P: Tensor, t: Tensor) -> None:
    """Write t [N, r], what an adapter reads of a tap [..., C]."""
    torch.mm(tapped.flatten(0, -2), P.to(tapped), out=t)


def fold(
    g: Tensor,  # [K, branches, d, d]
    Q: Tensor,  # [K, r, m]
    U: Tensor,  # [K, m, r]
    g_up: Tensor,  # [K, branches, d, d]
) -> tuple[Tensor, Tensor]:
    """Q and U with the inner kernels multiplied in, each branch's by its own."""
    adapters, branches, d, _ = g.shape
    Q = (g @ Q.view(adapters, branches, d, -1)).flatten(1, 2)
    U = U.view(adapters, -1, branches, d).transpose(1, 2) @ g_up
    return Q, U.transpose(1, 2).flatten(2)


def fold_backward(
    dQ: Tensor,  # [K, r, m], of what fold returns
    dU: Tensor,  # [K, m, r]
    g: Tensor,
    Q: Tensor,
    U: Tensor,
    g_up: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of g, Q, U and g_up, in the dtype of dQ."""
    adapters, branches, d, _ = g.shape
    g, Q, U, g_up = (v.to(dQ) for v in (g, Q, U, g_up))
    dQ, Q = (v.view(adapters, branches, d, -1) for v in (dQ, Q))
    dU, U = (v.view(adapters, -1, branches, d).transpose(1, 2) for v in (dU, U))
    dU_in = (dU @ g_up.mT).transpose(1, 2).flatten(2)
    return dQ @ Q.mT, (g.mT @ dQ).flatten(1, 2), dU_in, U.mT @ dU


def highway(
    h_in: Tensor,  # [..., C]
    y_in: Tensor,  # [..., C]
    y_out: Tensor,  # [..., C]
    S: Tensor,  # [N, K·r]
    V: Tensor,  # [K, r, C]
    c: Tensor,  # [C]
) -> Tensor:
    # h_in == y_in at initialisation: this order makes h_out == y_out to the last bit.
    h = (h_in - y_in).contiguous().add_(y_out).add_(c).flatten(0, -2)
    return h.addmm_(S, V.flatten(0, 1).to(y_out)).view_as(y_out)


def pool_2x2(c: Tensor) -> Tensor:
    """Means of 2×2 neighbours, at an odd end of those that there are: [B, H, W, r] →
    [B, ⌈H/2⌉, ⌈W/2⌉, r]. Its backward needs nothing."""
    for axis in (1, 2):
        if c.shape[axis] % 2:
            c = torch.cat([c, c.narrow(axis, -1, 1)], dim=axis)
    return c.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))


def output_norm(
    h: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = norm_parameters(h, weight, bias)
    p, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], weight, bias, eps)
    return p, mean.flatten(), rstd.flatten()


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


def gather_2x2(h: Tensor) -> Tensor:
    """[B, H, W, C] → [B, ceil(H/2), ceil(W/2), 4C], missing rows and columns taken as zero."""
    H, W = h.shape[1:3]
    if H % 2 or W % 2:
        h = F.pad(h, (0, 0, 0, W % 2, 0, H % 2))
    # The order of the four neighbours: down first, then right.
    return h.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)


def over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """Σ aᵀ·b over the tokens, [N, p] and [N, q] → [p, q], in float32 or wider: where losses are
    scaled, a sum of many tokens leaves what float16 holds."""
    if a.device.type == "cuda" and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    if a.dtype != torch.float16:
        return wide(a.t() @ b)
    total = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float32)
    for a_i, b_i in zip(a.split(1024), b.split(1024), strict=True):
        total.addmm_(a_i.float().t(), b_i.float())
    return total


def wide(x: Tensor) -> Tensor:
    """In float32 or wider: what is summed along the adapters of a stage, and around a token."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
