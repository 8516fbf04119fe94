"""What a user may choose of the highway."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from e3va.ops.storage import DEFAULT_STORAGE, STORAGES
from e3va.ops.sublayer_epilogue import TAPPED


def check_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


MIXING = (0, 3, 5, 7)
"""Sides of the kernels that an adapter may look around with; 0: it does not."""


@dataclass(frozen=True)
class HighwayConfig:
    """Form and shape of the dual low-rank adapters of the gradient highway.

    Adapter k of a stage reads a tap, looks around in its low rank, hears what the adapters before
    it said, and adds ``s_k @ V_k`` to the highway:

        u_k = tap_k @ P_k + γ_k * e,  s_k = GELU((u_k + D_k ⋆ u_k) @ Q_k + b_k) @ U_k,  e += s_k

    with P [C, α], D [α, side, side] a depth-wise convolution over the map, Q [α, m], U [m, α],
    V [α, C], rank ``α = branches * kernel_dim`` and hidden width ``m = hidden_ratio * C``. The
    published form (arXiv 2306.09729, sec. 3) taps outputs, with neither D nor e: see
    :meth:`published`.

    Attributes:
        branches: low-rank branches summed in each projection. Default 2 (the paper's).
        kernel_dim: side of each branch's inner kernel g. Default 8 (the paper's).
        hidden_ratio: m / C, in (0, 1]. Default 0.5 (the paper's).
        tap: "output", a frozen sub-layer's output before its residual add (the paper's), or "norm"
            (the default), what the next sub-layer reads: the norm of the residual stream.
        mixing: side of the convolution D, 3 (the default), 5 or 7; 0: none (the paper's).
        state: whether there is a state e, which travels from stage to stage by 2×2 mean pooling
            (default); False: none (the paper's).
        storage: how the trunk's taps are kept for backward: "full", "fp8", "int8" or "int4" (the
            default); no part of the form.

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
    storage: str = DEFAULT_STORAGE

    def __post_init__(self) -> None:
        check_positive_int("branches", self.branches)
        check_positive_int("kernel_dim", self.kernel_dim)
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
        if self.storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {self.storage!r}")

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
