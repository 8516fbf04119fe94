"""Detectron2's FPN, none of whose weights are kept in two precisions."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import Conv2d
from detectron2.modeling import FPN
from torch import Tensor, nn


class LeanFPN(FPN):
    """Detectron2's ``FPN``, its convolutions :class:`LeanConv2d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, part in self.named_children():
            for conv in part.modules() if name != "bottom_up" else ():
                if type(conv) in (nn.Conv2d, Conv2d):
                    LeanConv2d.adopt(conv)


class LeanConv2d(Conv2d):
    """Detectron2's ``Conv2d``. Under autocast it casts its weight anew for the backward, where
    autocast would keep the copy from the forward on. The same bits, if it is used once in a step;
    used more often, it sums its gradients in the weight's precision."""

    @classmethod
    def adopt(cls, conv: nn.Conv2d) -> None:
        """Make one of ``conv``, in place: its weights stay, whoever holds it."""
        for name in ("norm", "activation"):  # which a plain convolution has not
            setattr(conv, name, getattr(conv, name, None))
        conv.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] → [B, D, H', W']."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        x = x.to(torch.get_autocast_dtype(device))
        how = self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        x = _Convolution.apply(x, self.weight, self.bias, how)
        for then in (self.norm, self.activation):
            x = x if then is None else then(x)
        return x


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.how = None if bias is None else bias.shape, how
        bias = None if bias is None else bias.to(x.dtype)
        return torch.convolution(x, weight.to(x.dtype), bias, *how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (G,), (x, weight) = grads, ctx.saved_tensors
        dx, dW, db = torch.ops.aten.convolution_backward(
            G, x, weight.to(G.dtype), ctx.bias, *ctx.how, ctx.needs_input_grad[:3]
        )
        dW, db = (None if d is None else d.to(weight.dtype) for d in (dW, db))
        return dx, dW, db, None
