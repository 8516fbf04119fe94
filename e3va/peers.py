"""The published ways to tune a Swin that E³VA is compared with: baselines, in plain PyTorch.

Some train weights that the network has (:func:`trained_weights`), the others adapters beside frozen
ones (:func:`build_adapters`). An adapter sits after a sub-layer of a block: from the sub-layer's
output x and the residual stream y, both [B, H, W, C], it makes what is added to y instead of x. At
first that is x itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va.config import SwinConfig
from e3va.trunk import Epilogue, Linear, Swin

PEERS = ("bitfit", "norm", "partial1", "adapter", "adaptformer", "lora", "lorand", "mona")

HIDDEN = 64
"""Hidden width of the bottlenecks, and rank of LoRA."""


def trained_weights(method: str, trunk: Swin, norms: nn.ModuleList) -> Iterator[nn.Parameter]:
    """The weights of the network itself that ``method``, one of :data:`PEERS`, trains.

    Args:
        method: "bitfit": every bias, the relative-position biases too; "norm": every LayerNorm;
            "partial1": the last block. The others train none.
        trunk: the Swin.
        norms: its output norms.
    """
    network = nn.ModuleList((trunk, norms))
    if method == "bitfit":
        for name, parameter in network.named_parameters():
            if name.endswith((".bias", ".relative_position_bias_table")):
                yield parameter
    elif method == "norm":
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                yield from module.parameters()
    elif method == "partial1":
        last: Any = trunk.layers[-1]
        yield from last.blocks[-1].parameters()


def build_adapters(method: str, trunk: Swin) -> nn.ModuleList:
    """What ``method``, one of :data:`PEERS`, adds to ``trunk``: its adapters by stage, or nothing.

    Those of "lora" come into effect by this; the others by the epilogue that :func:`ride` makes.

    Raises:
        ImportError: "lora" without PEFT.
    """
    if method == "lora":
        return nn.ModuleList(LoRAStage(stage) for stage in trunk.layers)
    kinds: dict[str, tuple[Callable[[int], nn.Module], ...]] = {
        "adapter": (Adapter, Adapter),
        "adaptformer": (_Skip, AdaptFormer),
        "lorand": (LoRand, LoRand),
        "mona": (Mona, Mona),
    }
    if method not in kinds:
        return nn.ModuleList()
    config: SwinConfig = trunk.config
    return nn.ModuleList(
        nn.ModuleList(kind(dim) for _ in range(depth) for kind in kinds[method])
        for dim, depth in zip(config.dims, config.depths, strict=True)
    )


def ride(adapters: nn.Module) -> Epilogue | None:
    """The epilogue of one pass through a stage with these ``adapters``; None if it needs none."""
    if not isinstance(adapters, nn.ModuleList):
        return None
    remaining = iter(adapters)

    def complete(x: Tensor, y: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        y = y + next(remaining)(x, y)
        return y, y if norm is None else _layer_norm(y, norm)

    return complete


class Adapter(nn.Module):
    """Houlsby's: ``x + W₂·GELU(W₁·x)``.

    Args:
        dim: C.
        hidden: width between the projections W₁ and W₂.
        linear: class of the projections.
    """

    def __init__(
        self, dim: int, hidden: int = HIDDEN, linear: Callable[[int, int], nn.Module] = Linear
    ) -> None:
        super().__init__()
        self.down = linear(dim, hidden)
        self.dropout = nn.Dropout(0.1)
        self.up = _zero(linear(hidden, dim))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.up(self.dropout(F.gelu(self.down(x))))


class AdaptFormer(Adapter):
    """Parallel to the MLP, from the residual stream before its norm: ``x + 0.1·W₂·ReLU(W₁·y)``."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 0.1 * self.up(self.dropout(F.relu(self.down(y))))


class LoRand(Adapter):
    """Houlsby's adapter with hidden width C/2 and projections of low rank."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim // 2, LowRank)


class LowRank(nn.Module):
    """``x·Σᵢ Aᵢ·gᵢ·Bᵢ + bias``: [..., C] → [..., m].

    Parameters (d kernel_dim): reduce, the Aᵢ side by side [C, branches·d]; kernel, the gᵢ
    [branches, d, d]; weight, the Bᵢ below each other [branches·d, m]; bias [m].
    """

    def __init__(self, dim: int, out: int, branches: int = 2, kernel_dim: int = 8) -> None:
        super().__init__()
        rank = branches * kernel_dim
        self.reduce = nn.Parameter(torch.randn(dim, rank) * dim**-0.5)
        self.kernel = nn.Parameter(torch.eye(kernel_dim).repeat(branches, 1, 1))
        self.weight = nn.Parameter(torch.randn(rank, out) * rank**-0.5)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(0, self.kernel.shape[:2])
        weight = (self.kernel @ weight).flatten(0, 1)
        return x @ self.reduce.to(x) @ weight.to(x) + self.bias.to(x)


class Mona(nn.Module):
    """A bottleneck with depth-wise convolutions, from the stream after the residual add, y + x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = _ScaledNorm(dim)
        self.down = Linear(dim, HIDDEN)
        self.convs = nn.ModuleList(_DepthWise(HIDDEN, kernel_size) for kernel_size in (3, 5, 7))
        self.mix = Linear(HIDDEN, HIDDEN)  # the 1×1 convolution
        self.up = _zero(Linear(HIDDEN, dim))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        t = self.down(self.norm(y + x))
        image = t.permute(0, 3, 1, 2)
        filtered = torch.stack([conv(image) for conv in self.convs]).mean(0)
        t = t + filtered.permute(0, 2, 3, 1)
        t = t + self.mix(t)
        return x + self.up(F.gelu(t))


class _ScaledNorm(nn.LayerNorm):
    """``LN(x)·γ + x·γₓ``. One module, so that optimizers see its scales as a norm's."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.gamma = nn.Parameter(torch.ones(dim))
        self.gamma_x = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return _layer_norm(x, self) * self.gamma.to(x) + x * self.gamma_x.to(x)


class _DepthWise(nn.Conv2d):
    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return self._conv_forward(x, self.weight.to(x), self.bias.to(x))


class _Skip(nn.Module):
    """Stands where a sub-layer has no adapter."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x


class LoRAStage(nn.Module):
    """PEFT's LoRA of rank 64, scale 1 and no dropout on the q and v of every block of a stage."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_LoRA(block.attn.qkv) for block in stage.blocks)


class _LoRA(nn.Module):
    """Adds LoRA's share to the q and v that a fused ``qkv`` puts out, whenever it runs."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("method 'lora' needs PEFT: pip install 'e3va[peft]'") from error
        self.q, self.v = (nn.Linear(qkv.in_features, qkv.in_features) for _ in range(2))
        config = LoraConfig(r=HIDDEN, lora_alpha=HIDDEN, target_modules=["q", "v"])
        inject_adapter_in_model(config, self)
        layers: list[Any] = [self.q, self.v]
        for layer in layers:
            layer.base_layer = _Zero()  # qkv itself computes that part
            layer.cast_input_dtype_enabled = False  # PEFT would compute in that of the weights
        qkv.register_forward_hook(self._add)

    def _add(self, qkv: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        (z,) = args
        q, k, v = output.chunk(3, dim=-1)
        half = z.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(z.device.type, z.dtype if half else None, enabled=half):
            return torch.cat((q + self.q(z), k, v + self.v(z)), dim=-1)


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def _zero(layer: nn.Module) -> nn.Module:
    """``layer``, of which nothing comes at first."""
    for name in ("weight", "bias"):
        nn.init.zeros_(layer.get_parameter(name))
    return layer


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x), norm.bias.to(x), norm.eps)
