"""``e3va::patch_merging``: the frozen down-sampling that trunk and highway share."""

from __future__ import annotations

import torch
from torch import Tensor

from e3va.ops import reference
from e3va.ops.checks import check_floating, check_shape


def patch_merging(
    h: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, reduction: Tensor
) -> Tensor:
    """Concatenate 2×2 neighbours, normalise, project (Swin, arXiv 2103.14030, sec. 3.1).

    Gradients flow to ``h`` alone: the weights are frozen ("inherited" down-sampling,
    arXiv 2306.09729, sec. 3.3). Only ``h`` is saved for backward; the concatenation and the
    norm's statistics are computed again.

    Args:
        h: [B, H, W, C]; an odd H or W is padded with zeros.
        norm_weight, norm_bias: [4C].
        eps: the norm's epsilon.
        reduction: projection without bias, [D, 4C].

    Returns:
        [B, ceil(H/2), ceil(W/2), D], dtype of ``h``.

    Raises:
        TypeError: a dtype is not floating.
        ValueError: a shape does not fit.
    """
    check_floating(h=h, norm_weight=norm_weight, norm_bias=norm_bias, reduction=reduction)
    check_shape("h", h, -1, -1, -1, -1)
    check_shape("norm_weight", norm_weight, 4 * h.shape[-1])
    check_shape("norm_bias", norm_bias, 4 * h.shape[-1])
    check_shape("reduction", reduction, -1, 4 * h.shape[-1])
    return torch.ops.e3va.patch_merging(h, norm_weight, norm_bias, eps, reduction)


@torch.library.custom_op("e3va::patch_merging", mutates_args=())
def _patch_merging(
    h: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, reduction: Tensor
) -> Tensor:
    return reference.patch_merging(h, norm_weight, norm_bias, eps, reduction)


@_patch_merging.register_fake
def _(h, norm_weight, norm_bias, eps, reduction):
    B, H, W, _ = h.shape
    return h.new_empty(B, (H + 1) // 2, (W + 1) // 2, reduction.shape[0])


def _setup_context(ctx, inputs, output):
    h, norm_weight, norm_bias, ctx.eps, reduction = inputs
    ctx.save_for_backward(h, norm_weight, norm_bias, reduction)


def _backward(ctx, G):
    h, norm_weight, norm_bias, reduction = ctx.saved_tensors
    dh = torch.ops.e3va.patch_merging_backward(G, h, norm_weight, norm_bias, ctx.eps, reduction)
    return dh, None, None, None, None


_patch_merging.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("e3va::patch_merging_backward", mutates_args=())
def _patch_merging_backward(
    G: Tensor, h: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, reduction: Tensor
) -> Tensor:
    return reference.patch_merging_backward(G, h, norm_weight, norm_bias, eps, reduction)


@_patch_merging_backward.register_fake
def _(G, h, norm_weight, norm_bias, eps, reduction):
    return h.new_empty(h.shape)
