"""The gradient highway: dual low-rank adapters beside a frozen trunk (arXiv 2306.09729, sec. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e3va import ops
from e3va.config import HighwayConfig, SwinConfig
from e3va.ops import reference
from e3va.ops.taps import DEFAULT_TAPS, TAPS

PARAMETERS = ("P", "g", "Q", "b", "U", "g_up", "V", "c")
BIASES = ("b", "c")
OUTPUTS = ("V", "c")
"""Names of a stage's parameters; of its biases; of what writes to the highway, zero at first."""


class Highway(nn.Module):
    """The adapters of all stages of a Swin, all that is trained of an E³VA backbone but its norms.

    Args:
        trunk: architecture of the trunk beside it.
        config: shape of the adapters (default: the paper's).
        taps: how the trunk's taps are kept for backward, one of :data:`e3va.ops.taps.TAPS`.

    Raises:
        ValueError: a stage's channels do not fit the config, or ``taps`` is unknown.
    """

    def __init__(
        self, trunk: SwinConfig, config: HighwayConfig | None = None, taps: str = DEFAULT_TAPS
    ) -> None:
        super().__init__()
        if taps not in TAPS:
            raise ValueError(f"taps must be one of {', '.join(TAPS)}, got {taps!r}")
        self.config = config or HighwayConfig()
        self.stages = nn.ModuleList(
            HighwayStage(adapters, dim, self.config, taps)
            for adapters, dim in zip(trunk.num_taps, trunk.dims, strict=True)
        )


class HighwayStage(nn.Module):
    """The K adapters of one stage, ``A_k(x) = GELU(x·P_k·g_k·Q_k + b_k)·U_k·g'_k·V_k``, stacked.

    ``g`` [K, branches, d, d] and ``g_up`` are the inner kernels of the low-rank branches; they are
    folded into Q and U once per step. V and c are zero at first: the highway then carries the
    trunk's own features.

    Parameters (C channels, α rank, m hidden, d kernel_dim): P [K, C, α], g [K, branches, d, d],
    Q [K, α, m], b [K, m], U [K, m, α], g_up [K, branches, d, d], V [K, α, C], c [C].

    Args:
        adapters: K, two per Swin block.
        channels: C.
        config: shape of the adapters.
        taps: how the taps are kept for backward.
    """

    def __init__(
        self, adapters: int, channels: int, config: HighwayConfig, taps: str = DEFAULT_TAPS
    ) -> None:
        super().__init__()
        self.taps = taps
        rank, hidden = config.rank, config.hidden(channels)
        kernel = (adapters, config.branches, config.kernel_dim, config.kernel_dim)
        self.P = nn.Parameter(torch.empty(adapters, channels, rank))
        self.g = nn.Parameter(torch.empty(kernel))
        self.Q = nn.Parameter(torch.empty(adapters, rank, hidden))
        self.b = nn.Parameter(torch.empty(adapters, hidden))
        self.U = nn.Parameter(torch.empty(adapters, hidden, rank))
        self.g_up = nn.Parameter(torch.empty(kernel))
        self.V = nn.Parameter(torch.empty(adapters, rank, channels))
        self.c = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections that keep the variance, inner kernels the identity, V, b and c zero."""
        for weight in (self.P, self.Q, self.U):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for kernel in (self.g, self.g_up):
            with torch.no_grad():
                kernel.copy_(torch.eye(kernel.shape[-1]))
        for weight in (self.b, self.V, self.c):
            nn.init.zeros_(weight)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Q and U with the inner kernels multiplied in: [K, α, m] and [K, m, α]."""
        taps, branches, d, _ = self.g.shape
        Q = (self.g @ self.Q.view(taps, branches, d, -1)).flatten(1, 2)
        U = self.U.view(taps, -1, branches, d).transpose(1, 2) @ self.g_up
        return Q, U.transpose(1, 2).flatten(2)

    def ride(self) -> StageRide:
        """Begin a pass along the stage, to be handed to the trunk as its epilogue."""
        return StageRide(self)


class StageRide:
    """One pass of the highway along a stage of the trunk.

    As the trunk's epilogue it completes each sub-layer while feeding the next adapter;
    :meth:`arrive` then gives the highway after the stage.
    """

    def __init__(self, stage: HighwayStage) -> None:
        self._stage = stage
        self._Q, self._U = stage.fold()
        # Without a backward to come nothing needs to be made smaller.
        self._taps = stage.taps if torch.is_grad_enabled() else "full"
        # From PyTorch's own generator, so that torch.manual_seed makes a run repeatable.
        self._seed = torch.randint(2**31, (), device="cpu") if self._taps == "int4" else None
        self._x: list[Tensor] = []
        self._scale: list[Tensor] = []
        self._t: list[Tensor] = []
        self._s: list[Tensor] = []

    def __call__(self, x: Tensor, y: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # as a decorator of __call__ it would stop Dynamo 2.14
            k = len(self._x)
            weight, bias, eps = (norm.weight, norm.bias, norm.eps) if norm else (None, None, 0.0)
            adapter = self._stage.P[k], self._Q[k], self._stage.b[k], self._U[k]
            seed = None if self._seed is None else self._seed + k
            y, z, t, s, tap, scale = ops.sublayer_epilogue(
                x, y, weight, bias, eps, *adapter, self._taps, seed
            )
            if self._taps == "full":
                self._x.append(x)
            else:
                self._x.append(tap)
                self._scale.append(scale)
            self._t.append(t)
            self._s.append(s)
        return y, z

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        """Feed the next adapter alone, where another highway's pass completes the sub-layer."""
        k = len(self._x)
        t = x.flatten(0, -2) @ self._stage.P[k].to(x)
        activation = reference.adapter_activation(t, self._Q[k], self._stage.b[k])
        self._x.append(x)
        self._t.append(t)
        self._s.append(activation @ self._U[k].to(x))

    def arrive(self, h: Tensor, y_in: Tensor, y_out: Tensor) -> Tensor:
        """h after the stage, from h before it and the frozen stage's input and output, each
        [B, H, W, C]; see :func:`e3va.ops.highway`."""
        stage = self._stage
        parameters = stage.P, self._Q, stage.b, self._U, stage.V, stage.c
        kept = self._x, self._t, self._s
        return ops.highway(h, y_in, y_out, *kept, *parameters, self._scale, self._taps)
