"""What a user may choose: the Swin variant of the trunk and the shape of the highway."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


def _check_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class SwinConfig:
    """Architecture of a Swin Transformer (arXiv 2103.14030, table 7).

    Attributes:
        embed_dim: channels C of stage 0; stage s has ``embed_dim * 2**s``.
        depths: Swin blocks per stage. Every second block shifts its windows.
        num_heads: attention heads per stage; must divide the stage's channels.
        window_size: side of an attention window in tokens.
        mlp_ratio: hidden width of the MLP over C.

    Raises:
        TypeError: a field is not an integer (``mlp_ratio``: a number).
        ValueError: a field is out of range, or heads do not divide the channels.
    """

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "num_heads", tuple(self.num_heads))
        for name in ("embed_dim", "window_size"):
            _check_positive_int(name, getattr(self, name))
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ValueError(
                "depths and num_heads must be non-empty and of one length, got "
                f"{self.depths} and {self.num_heads}"
            )
        for depth in self.depths:
            _check_positive_int("depths", depth)
        for dim, heads in zip(self.dims, self.num_heads, strict=True):
            _check_positive_int("num_heads", heads)
            if dim % heads:
                raise ValueError(
                    f"num_heads must divide the channels of its stage: {heads} does not divide "
                    f"{dim} (embed_dim={self.embed_dim}, num_heads={self.num_heads})"
                )
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels C of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(self.num_stages))

    @property
    def num_taps(self) -> tuple[int, ...]:
        """Taps K of each stage: the outputs of W-MSA and MLP of each block."""
        return tuple(2 * depth for depth in self.depths)


SWIN_VARIANTS: dict[str, SwinConfig] = {
    "swin_t": SwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": SwinConfig(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": SwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    # 2.3 M parameters; its weights ship with the package (e3va/demo).
    "swin_digits": SwinConfig(32, (2, 2, 2, 2), (1, 2, 4, 8)),
}


def swin_config(variant: str, window_size: int = 7) -> SwinConfig:
    """The architecture called ``variant`` ("swin_t", "swin_s", "swin_b", "swin_l",
    "swin_digits"), with windows of ``window_size`` (default 7; 12 for the 384-pixel weights).

    Raises:
        ValueError: no such variant; the message lists the known ones.
    """
    if variant not in SWIN_VARIANTS:
        raise ValueError(f"unknown Swin variant {variant!r}; known: {', '.join(SWIN_VARIANTS)}")
    return dataclasses.replace(SWIN_VARIANTS[variant], window_size=window_size)


TAPPED = ("output", "norm")
"""What an adapter may read."""

MIXING = (0, 3, 5, 7)
"""Sides of the kernels that an adapter may look around with; 0: it does not."""


@dataclass(frozen=True)
class HighwayConfig:
    """Form and shape of the dual low-rank adapters of the gradient highway.

    Adapter k of a stage reads a tap, looks around in its low rank, hears what the adapters before
    it said, and adds ``s_k @ V_k`` to the highway:

        u_k = tap_k @ P_k + γ_k * c,  s_k = GELU((u_k + D_k ⋆ u_k) @ Q_k + b_k) @ U_k,  c += s_k

    with P [C, α], D [α, side, side] a depth-wise convolution over the map, Q [α, m], U [m, α],
    V [α, C], rank ``α = branches * kernel_dim`` and hidden width ``m = hidden_ratio * C``. The
    published form (arXiv 2306.09729, sec. 3) taps outputs, with neither D nor c: see
    :meth:`published`.

    Attributes:
        branches: low-rank branches summed in each projection. Default 2 (the paper's).
        kernel_dim: side of each branch's inner kernel g. Default 8 (the paper's).
        hidden_ratio: m / C, in (0, 1]. Default 0.5 (the paper's).
        tap: "output", a frozen sub-layer's output before its residual add (the paper's), or "norm"
            (the default), what the next sub-layer reads: the norm of the residual stream.
        mixing: side of the convolution D, 3 (the default), 5 or 7; 0: none (the paper's).
        state: whether there is a state c, which travels from stage to stage by 2×2 mean pooling
            (default); False: none (the paper's).

    Raises:
        TypeError: ``branches`` or ``kernel_dim`` is not an integer, ``hidden_ratio`` no number, or
            ``state`` no bool.
        ValueError: a value is out of range.
    """

    branches: int = 2
    kernel_dim: int = 8
    hidden_ratio: float = 0.5
    tap: str = "norm"
    mixing: int = 3
    state: bool = True

    def __post_init__(self) -> None:
        _check_positive_int("branches", self.branches)
        _check_positive_int("kernel_dim", self.kernel_dim)
        if not isinstance(self.hidden_ratio, int | float):
            raise TypeError(f"hidden_ratio must be a number, got {self.hidden_ratio!r}")
        if not 0 < self.hidden_ratio <= 1:
            raise ValueError(f"hidden_ratio must be in (0, 1], got {self.hidden_ratio}")
        if self.tap not in TAPPED:
            raise ValueError(f"tap must be one of {', '.join(TAPPED)}, got {self.tap!r}")
        if self.mixing not in MIXING or type(self.mixing) is not int:
            sides = ", ".join(map(str, MIXING))
            raise ValueError(f"mixing must be one of {sides}, got {self.mixing!r}")
        if not isinstance(self.state, bool):
            raise TypeError(f"state must be True or False, got {self.state!r}")

    def published(self) -> HighwayConfig:
        """The same shape in the published form."""
        return dataclasses.replace(self, tap="output", mixing=0, state=False)

    @property
    def rank(self) -> int:
        """α, the rank of both factorisations."""
        return self.branches * self.kernel_dim

    def hidden(self, channels: int) -> int:
        """m, the adapter's hidden width beside a stage of C = ``channels``.

        Raises:
            ValueError: ``hidden_ratio * channels`` is no whole number, or the rank exceeds C.
        """
        hidden = self.hidden_ratio * channels
        if abs(hidden - round(hidden)) > 1e-6 * channels or hidden < 1:
            raise ValueError(
                f"hidden_ratio {self.hidden_ratio} of {channels} channels is {hidden}, "
                "not a whole number: choose a ratio that divides every stage's channels"
            )
        if self.rank > channels:
            raise ValueError(
                f"rank branches * kernel_dim = {self.branches} * {self.kernel_dim} = {self.rank} "
                f"exceeds the stage's {channels} channels: it would not be low-rank"
            )
        return round(hidden)
