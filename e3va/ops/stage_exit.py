"""``e3va::stage_exit``: how the highway leaves a stage, to the neck and to the next stage.

Both ways begin at h, and both backwards need it. The neck keeps the normalised map for its own
backward anyway, so only that one is saved, and h is made of it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from e3va.ops import dispatch, functional
from e3va.ops.checks import check_floating, check_shape
from e3va.ops.library import operator


def stage_exit(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    merge_weight: Tensor | None = None,
    merge_bias: Tensor | None = None,
    merge_eps: float = 0.0,
    reduction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output norm of a stage and patch merging (arXiv 2103.14030, sec. 3.1) of one map.

    Merging concatenates 2×2 neighbours, normalises and projects them with the trunk's own frozen
    weights ("inherited" down-sampling, arXiv 2306.09729, sec. 3.3). Gradients flow to ``h``,
    ``weight`` and ``bias``. Saved for backward: p, and mean and inverse deviation of each token;
    h is taken as ``(p - bias) / weight`` un-normalised, to the rounding of p's dtype. A channel
    whose weight is zero, or lost beside its bias in that rounding, counts as its token's mean.

    Args:
        h: the highway, [B, H, W, C].
        weight, bias, eps: of the output norm; [C].
        merge_weight, merge_bias, merge_eps: of the merging's norm, [4C]; None after the last stage.
        reduction: the merging's projection without bias, [D, 4C]; None after the last stage.

    Returns:
        p, the norm of ``h`` [B, H, W, C]; merged [B, ⌈H/2⌉, ⌈W/2⌉, D], an odd H or W being padded
        with zeros, or an empty tensor after the last stage. Both of the dtype of ``h``.

    Raises:
        TypeError: a dtype is not floating.
        ValueError: a shape does not fit, or the merging is incomplete.
    """
    check_floating(h=h, weight=weight, bias=bias)
    check_shape("h", h, -1, -1, -1, -1)
    channels = h.shape[-1]
    check_shape("weight", weight, channels)
    check_shape("bias", bias, channels)
    if merge_weight is not None and merge_bias is not None and reduction is not None:
        check_floating(merge_weight=merge_weight, merge_bias=merge_bias, reduction=reduction)
        check_shape("merge_weight", merge_weight, 4 * channels)
        check_shape("merge_bias", merge_bias, 4 * channels)
        check_shape("reduction", reduction, -1, 4 * channels)
    elif not (merge_weight is merge_bias is reduction is None):
        raise ValueError(
            "merging is merge_weight, merge_bias and reduction together: some of them are None"
        )
    merging = (merge_weight, merge_bias, merge_eps, reduction)
    p, merged, _, _ = torch.ops.e3va.stage_exit(h, weight, bias, eps, *merging)
    return p, merged


@operator
def _stage_exit(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    merge_weight: Tensor | None,
    merge_bias: Tensor | None,
    merge_eps: float,
    reduction: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, merged, and the mean [N] and inverse deviation [N] of each token."""
    with torch.autocast(h.device.type, enabled=False):
        p, mean, rstd = functional.output_norm(h, weight, bias, eps)
        if merge_weight is None or merge_bias is None or reduction is None:
            merged = h.new_empty(0)
        else:
            merged = functional.patch_merging(h, merge_weight, merge_bias, merge_eps, reduction)
    return p, merged, mean, rstd


@_stage_exit.register_fake
def _(h, weight, bias, eps, merge_weight, merge_bias, merge_eps, reduction):
    B, H, W, _ = h.shape
    merged = (0,) if reduction is None else (B, (H + 1) // 2, (W + 1) // 2, reduction.shape[0])
    statistics = h.new_empty(B * H * W, dtype=torch.promote_types(h.dtype, torch.float32))
    return h.new_empty(h.shape), h.new_empty(merged), statistics, statistics.clone()


def _setup_context(ctx, inputs, output):
    _, weight, bias, _, merge_weight, _, ctx.merge_eps, reduction = inputs
    p, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(p, mean, rstd, weight, bias, merge_weight, reduction)


def _backward(ctx, dp, dmerged, *_):
    p, mean, rstd, weight, bias, merge_weight, reduction = ctx.saved_tensors
    dh, dweight, dbias = torch.ops.e3va.stage_exit_backward(
        p.new_zeros(p.shape) if dp is None else dp,
        None if reduction is None else dmerged,
        p,
        mean,
        rstd,
        weight,
        bias,
        merge_weight,
        ctx.merge_eps,
        reduction,
    )
    return dh, dweight, dbias, None, None, None, None, None


_stage_exit.register_autograd(_backward, setup_context=_setup_context)


@operator
def _stage_exit_backward(
    dp: Tensor,
    dmerged: Tensor | None,
    p: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    merge_weight: Tensor | None,
    merge_eps: float,
    reduction: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dweight, dbias)."""
    dgathered = None
    if dmerged is not None and reduction is not None:
        with torch.autocast(p.device.type, enabled=False):
            dgathered = dmerged @ reduction.to(p)
    arguments = dp.to(p), dgathered, p, mean, rstd, weight, bias, merge_weight, merge_eps
    return dispatch.run("stage_exit_backward", p, *arguments)


@_stage_exit_backward.register_fake
def _(dp, dmerged, p, mean, rstd, weight, bias, *merging):
    return p.new_empty(p.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)
