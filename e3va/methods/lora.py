"""LoRA (arXiv 2106.09685), by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from e3va.backbone import Backbone
from e3va.config import check_positive_int
from e3va.methods.registry import Method, register_method
from e3va.methods.tuned import TunedBackbone
from e3va.trunks.base import TrunkConfig


@register_method("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """Products of low rank are added to the q and v of every block; no dropout.

    Attributes:
        rank: of the products (default 64).
        scale: of what they add (default 1).
    """

    rank: int = 64
    scale: float = 1.0

    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        check_positive_int("rank", self.rank)
        backbone = TunedBackbone(trunk, dtype)
        stages = [backbone.trunk.qkv(stage) for stage in range(len(trunk.dims))]
        if not all(stages):
            raise ValueError(f"method 'lora' knows no q and v in a {type(backbone.trunk).__name__}")
        backbone.adapters = nn.ModuleList(
            LoRAStage(layers, self.rank, self.scale) for layers in stages
        )
        return backbone


class LoRAStage(nn.Module):
    """LoRA on the q and v of every block of a stage."""

    def __init__(self, layers: Sequence[nn.Linear], rank: int, scale: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_LoRA(qkv, rank, scale) for qkv in layers)


class _LoRA(nn.Module):
    """Adds LoRA's share to the q and v that a fused ``qkv`` puts out, whenever it runs."""

    def __init__(self, qkv: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("method 'lora' needs PEFT: pip install 'e3va[peft]'") from error
        self.q, self.v = (nn.Linear(qkv.in_features, qkv.in_features) for _ in range(2))
        alpha: Any = scale * rank
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q", "v"])
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
