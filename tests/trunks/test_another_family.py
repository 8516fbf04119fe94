"""A trunk of another kind, three stages of convolutions: what it costs is this one file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import e3va
from e3va.methods import METHODS
from e3va.trunks.base import (
    FAMILIES,
    Epilogue,
    Frozen,
    Linear,
    Transition,
    Trunk,
    TrunkFamily,
    layer_norm,
    register_family,
)


@dataclass(frozen=True)
class ConvConfig:
    dims: tuple[int, ...] = (16, 24, 40)
    depth: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))  # JSON hands over a list

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(4 * 2**stage for stage in range(len(self.dims)))

    @property
    def num_taps(self) -> tuple[int, ...]:
        return (2 * self.depth,) * len(self.dims)


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.linear = Linear(dim, dim)


class Conv(Trunk):
    def __init__(self, config: ConvConfig, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        dims = config.dims
        self.patch = nn.Conv2d(3, dims[0], 4, 4)
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim) for _ in range(config.depth)) for dim in dims
        )
        self.downs = nn.ModuleList(map(Linear, dims[:-1], dims[1:]))

    def storage_dtype(self) -> torch.dtype:
        return self.patch.weight.dtype

    def embed(self, image: Tensor) -> Tensor:
        image = F.pad(image, (0, -image.shape[-1] % 4, 0, -image.shape[-2] % 4))
        weight, bias = self.patch.weight.to(image), self.patch.bias.to(image)
        return F.conv2d(image, weight, bias, stride=4).permute(0, 2, 3, 1).contiguous()

    def stage(self, stage: int, y: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        complete = epilogue or self._residual
        blocks = self.blocks(stage)
        z = layer_norm(y, blocks[0].norm1)
        for block, after in zip(blocks, [*(b.norm1 for b in blocks[1:]), None], strict=True):
            weight, bias = block.conv.weight.to(z), block.conv.bias.to(z)
            x = F.conv2d(z.movedim(-1, 1), weight, bias, padding=1, groups=len(weight))
            y, z = complete(x.movedim(1, -1).contiguous(), y, block.norm2)
            y, z = complete(F.gelu(block.linear(z)), y, after)
        return y

    @staticmethod
    def _residual(x: Tensor, y: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        return y + x, y if norm is None else layer_norm(y + x, norm)

    def transition(self, stage: int) -> Transition | None:
        return Down(self.downs[stage]) if stage < len(self.downs) else None

    def blocks(self, stage: int) -> Sequence[nn.Module]:
        return self.stages[stage]


class FrozenConv(Frozen, Conv):
    pass


class Down(Transition):
    def __init__(self, linear: nn.Module) -> None:
        self.linear = linear

    def __call__(self, y: Tensor) -> Tensor:
        return self.linear(self.pool(y))

    def exit(self, h: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return layer_norm(h, norm), self(h)

    def pool(self, carry: Tensor) -> Tensor:
        pooled = F.avg_pool2d(carry.movedim(-1, 1), 2, ceil_mode=True)
        return pooled.movedim(1, -1).contiguous()


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    return dict(state) if "patch.weight" in state else None


def config_of(state: Mapping[str, Tensor]) -> ConvConfig:
    dims = {n.split(".")[1]: len(w) for n, w in state.items() if n.endswith(".0.norm1.weight")}
    return ConvConfig(tuple(dims.values()), sum(n.startswith("stages.0.") for n in state) // 8)


@pytest.fixture
def family():
    yield register_family(
        TrunkFamily(
            name="conv",
            config=ConvConfig,
            variants={"conv_s": ConvConfig()},
            trainable=Conv,
            frozen=FrozenConv,
            translate=translate,
            config_of=config_of,
            describe=str,
            marks=("patch.weight",),
        )
    )
    del FAMILIES["conv"]


@pytest.fixture
def weights(family, tmp_path):
    torch.manual_seed(0)
    trunk = Conv(family.variants["conv_s"])
    e3va.save_trunk(trunk, tmp_path / "conv.safetensors")
    return tmp_path / "conv.safetensors"


def image(dtype=torch.float32):
    return torch.randn(2, 3, 37, 51, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"lora"}))
def test_every_method_tunes_it_and_its_adapter_opens(method, weights, tmp_path):
    backbone = e3va.build_backbone(method, e3va.trunk_config("conv_s"))
    e3va.load_trunk(backbone.trunk, weights)
    plain = [layer_norm(y, nn.LayerNorm(y.shape[-1])) for y in e3va.open_trunk(weights)(image())]
    maps = backbone(image())
    for got, expected in zip(maps.values(), plain, strict=True):
        torch.testing.assert_close(got, expected.movedim(-1, 1))

    trained = [p for p in backbone.parameters() if p.requires_grad]
    if trained:
        sum(m.square().mean() for m in maps.values()).backward()
        torch.optim.SGD(trained, lr=0.1).step()
    e3va.save_adapter(backbone, tmp_path / "adapter")
    opened = e3va.open_backbone(tmp_path / "adapter", weights)
    for got, expected in zip(opened(image()).values(), backbone(image()).values(), strict=True):
        torch.testing.assert_close(got, expected)


def test_lora_says_that_it_has_no_attention(family):
    with pytest.raises(ValueError, match="'lora' knows no q and v in a Conv"):
        e3va.build_backbone("lora", e3va.trunk_config("conv_s"))


def test_the_frozen_one_equals_the_trainable_one(weights):
    trunk = e3va.open_trunk(weights)
    assert isinstance(trunk, FrozenConv)
    trainable = Conv(trunk.config)
    trainable.load_state_dict(trunk.state_dict(), strict=False)
    for got, expected in zip(trunk(image()), trainable(image()), strict=True):
        torch.testing.assert_close(got, expected)
