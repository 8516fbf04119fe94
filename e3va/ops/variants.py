"""What each op's kernels are compiled and chosen for, and small inputs of every kind.

A variant holds all of an op's arguments that shape a kernel, and not how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from e3va.ops.functional import output_norm
from e3va.ops.storage import STORAGES, compress, expand, keep

SEED = 5  # of int4
RARELY = 0.01


class Draw:
    """Normal random numbers on the CPU, repeatable, without touching PyTorch's own generator."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self._dtype = dtype
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """A map, in the dtype of maps."""
        return self.weight(*shape).to(self._dtype)

    def weight(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A parameter, in float32."""
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return drawn * scale

    def maybe(self, there: bool, *shape: int, scale: float = 1.0) -> Tensor | None:
        """A parameter, or None."""
        return self.weight(*shape, scale=scale) if there else None


class WindowAttention(NamedTuple):
    """Of :func:`e3va.ops.window_attention`."""

    head_dim: int
    heads: int
    window: int
    shifted: bool

    @classmethod
    def of(cls, qkv: Tensor, bias: Tensor, table: Tensor, window: int, shift: int) -> Self:
        heads = table.shape[1]
        return cls(qkv.shape[-1] // 3 // heads, heads, window, shift > 0)

    def arguments(self, draw: Draw, B: int, H: int, W: int) -> tuple[Any, ...]:
        channels = 3 * self.heads * self.head_dim
        qkv_bias, table = draw(channels), draw((2 * self.window - 1) ** 2, self.heads)
        shift = self.window // 2 if self.shifted else 0
        return draw(B, H, W, channels), qkv_bias, table, self.window, shift


class SublayerEpilogue(NamedTuple):
    """Of :func:`e3va.ops.sublayer_epilogue`; ``norm``: dtype of the norm's weights, None: there are
    none; ``rank`` 0: no adapter."""

    channels: int
    norm: str | None
    rank: int
    tap: str
    storage: str

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        x, weight, (P, tap, storage) = arguments[0], arguments[2], arguments[5:8]
        norm = None if weight is None else str(weight.dtype).removeprefix("torch.")
        return cls(x.shape[-1], norm, 0 if P is None else P.shape[1], tap, storage)

    def arguments(self, draw: Draw, B: int, H: int, W: int) -> tuple[Any, ...]:
        C, rank = self.channels, self.rank
        x, y = (draw(B, H, W, C) for _ in range(2))
        norm: list[Tensor | None] = [None, None]
        if self.norm:
            norm = [draw.weight(C).to(getattr(torch, self.norm)) for _ in range(2)]
        P = draw.maybe(rank > 0, C, rank, scale=C**-0.5)
        return x, y, *norm, 1e-5, P, self.tap, self.storage, torch.tensor(SEED, device="cpu")


class Adapters(NamedTuple):
    """Of the adapters of a stage; ``side`` 0: no mixing; ``carry``: whether a state arrives;
    ``storage``: how u is kept."""

    adapters: int
    branches: int
    rank: int
    hidden: int
    side: int
    state: bool
    carry: bool
    storage: str

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        return cls._of(arguments[1], arguments[2:6], arguments[-1])

    @classmethod
    def _of(cls, carry: Tensor | None, weights: tuple[Any, ...], storage: str) -> Self:
        D, gamma, g, Q = weights
        K, rank, hidden = Q.shape
        side = 0 if D is None else D.shape[-1]
        state = gamma is not None, carry is not None
        return cls(K, g.shape[1], rank, hidden, side, *state, storage)

    def arguments(self, draw: Draw, B: int, H: int, W: int) -> tuple[Any, ...]:
        t = draw(self.adapters, B * H * W, self.rank)
        carry = draw(B * H * W, self.rank) if self.carry else None
        return t, carry, *self._weights(draw), (H, W), self.storage

    def _weights(self, draw: Draw) -> tuple[Tensor | None, ...]:
        K, branches, rank, hidden, side = self[:5]
        D = draw.maybe(side > 0, K, rank, side, side, scale=1 / max(side, 1))
        # As highways begin: a state of many adapters, all heard in full, would grow without end.
        gamma = draw.maybe(self.state, K, rank, scale=min(1.0, 4 / K))
        d = rank // branches
        identity = torch.eye(d, device="cpu")
        g, g_up = (identity + draw.weight(K, branches, d, d, scale=0.3 * d**-0.5) for _ in range(2))
        Q = draw.weight(K, rank, hidden, scale=rank**-0.5)
        U = draw.weight(K, hidden, rank, scale=hidden**-0.5)
        return D, gamma, g, Q, draw.weight(K, hidden), U, g_up


class AdaptersBackward(Adapters):
    """Of their backward; ``carry``: whether the state's gradient arrives."""

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        storage = "full" if arguments[3] is None else "int8"
        return cls._of(arguments[1], arguments[4:8], storage)

    def arguments(self, draw: Draw, B: int, H: int, W: int) -> tuple[Any, ...]:
        u, carry, *rest, _ = super().arguments(draw, B, H, W)
        kept = keep(u, self.storage) if self.storage != "full" else (u, None)
        return draw(B * H * W, self.adapters * self.rank), carry, *kept, *rest


class TapGradient(NamedTuple):
    """Of the gradient of a stage's P."""

    adapters: int
    channels: int
    rank: int
    storage: str

    @classmethod
    def of(cls, taps: Any, scale: Tensor | None, storage: str, dt: Tensor, channels: int) -> Self:
        return cls(len(dt), channels, dt.shape[-1], storage)

    def arguments(self, draw: Draw, B: int, H: int, W: int) -> tuple[Any, ...]:
        tokens = B * H * W
        taps: Any = [draw(tokens, self.channels) for _ in range(self.adapters)]
        scale = None
        if self.storage != "full":
            kept = (compress(value, self.storage, SEED) for value in taps)
            taps, scale = map(torch.stack, zip(*kept, strict=True))
        return taps, scale, self.storage, draw(self.adapters, tokens, self.rank), self.channels


class StageExitBackward(NamedTuple):
    """Of what leaves a stage; ``merging``: whether a gradient comes back from the next one."""

    channels: int
    merging: bool

    @classmethod
    def of(cls, dp: Tensor, dgathered: Tensor | None, *arguments: Any) -> Self:
        return cls(dp.shape[-1], dgathered is not None)

    def arguments(self, draw: Draw, B: int, H: int, W: int) -> tuple[Any, ...]:
        C = self.channels
        h, dp = draw(B, H, W, C), draw(B, H, W, C)
        # Near one and zero, for 16 bits to say what h was.
        weight, bias = 1 + draw.weight(C, scale=0.3), draw.weight(C, scale=0.3)
        p, mean, rstd = output_norm(h, weight, bias, 1e-5)
        merge: list[Tensor | None] = [None, None]
        if self.merging:
            merge = [draw(B, -(-H // 2), -(-W // 2), 4 * C), draw.weight(4 * C)]
        return dp, merge[0], p, mean, rstd, weight, bias, merge[1], 1e-5


Variant = WindowAttention | SublayerEpilogue | Adapters | TapGradient | StageExitBackward

VARIANTS: dict[str, type[Variant]] = {
    "window_attention": WindowAttention,
    "sublayer_epilogue": SublayerEpilogue,
    "adapters": Adapters,
    "adapters_backward": AdaptersBackward,
    "tap_gradient": TapGradient,
    "stage_exit_backward": StageExitBackward,
}
"""Of each op."""


def compared(
    variant: Variant, arguments: tuple[Any, ...], found: Any, exact: Any
) -> list[tuple[Tensor, Tensor]]:
    """Pairs that should be equal, of an op's results and the exact ones; on the CPU.

    Codes round what may itself be rounded in another way: those of a tap are held against codes of
    the same tap as the op has it.
    """
    if isinstance(found, Tensor):
        return [(found.cpu(), exact)]
    found = [value.cpu() for value in found]
    if type(variant) is Adapters and variant.storage != "full":
        values, expected = (
            expand(
                codes.flatten(0, 1), scale.flatten(), variant.storage, variant.rank, torch.float64
            )
            for codes, scale in (found[2:], exact[2:])
        )
        step = exact[3].double().flatten()[:, None]
        expected = _but_for_a_step(values, expected, step)
        return [*zip(found[:2], exact[:2], strict=True), (values, expected)]
    if not isinstance(variant, SublayerEpilogue) or not variant.rank or variant.storage == "full":
        return list(zip(found, exact, strict=True))
    y, z, t, codes, scale = found
    tap = arguments[0]
    if variant.tap == "norm":
        tap = z if variant.norm else F.layer_norm(y, y.shape[-1:], eps=arguments[4])
    again, again_scale = compress(tap, variant.storage, SEED)
    values = expand(codes, scale, variant.storage, variant.channels, torch.float32)
    expected = expand(again, again_scale, variant.storage, variant.channels, torch.float32)
    if variant.tap == "norm" and not variant.norm:  # which is not returned
        step = again_scale[:, None] + expected.abs() / 8
        expected = _but_for_a_step(values, expected, step)
    return [*zip((y, z, t), exact[:3], strict=True), (values, expected)]


def _but_for_a_step(values: Tensor, expected: Tensor, step: Tensor) -> Tensor:
    """``expected``, and ``values`` where they are a step off: the last bit of what was rounded, not
    known here, may decide a code, now and then."""
    off = (values - expected).abs()
    apart = off > step / 2
    if apart.float().mean() > RARELY:
        return expected
    return torch.where(apart & (off <= 1.01 * step), values, expected)


def examples() -> Iterator[tuple[str, Variant]]:
    """(op, variant) of what backbones are made of, at their least and at a large width."""
    for window in (7, 12):
        for shifted in (False, True):
            yield "window_attention", WindowAttention(32, 4, window, shifted)
    for channels in (96, 1536):
        yield "sublayer_epilogue", SublayerEpilogue(channels, "float32", 0, "output", "full")
        for storage in STORAGES:
            yield "sublayer_epilogue", SublayerEpilogue(channels, "float32", 16, "output", storage)
        for norm, storage in (
            ("float32", "full"),
            ("float32", "int4"),
            (None, "full"),
            (None, "int4"),
        ):
            yield "sublayer_epilogue", SublayerEpilogue(channels, norm, 16, "norm", storage)
    yield "sublayer_epilogue", SublayerEpilogue(96, "bfloat16", 16, "norm", "int4")
    for shape in (
        (4, 1, 16, 48, 0, False, False, "full"),
        (4, 2, 16, 48, 0, False, False, "int8"),
        (4, 2, 16, 48, 3, True, False, "full"),
        (36, 2, 16, 48, 3, True, True, "int8"),
    ):
        yield "adapters", Adapters(*shape)
        yield "adapters_backward", AdaptersBackward(*shape)
    for storage in STORAGES:
        yield "tap_gradient", TapGradient(4, 96, 16, storage)
    yield "tap_gradient", TapGradient(4, 512, 16, "int4")
    for channels, merging in ((96, True), (768, True), (1536, False)):
        yield "stage_exit_backward", StageExitBackward(channels, merging)
