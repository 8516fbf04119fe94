"""The gradient highway: dual low-rank adapters beside a frozen trunk (arXiv 2306.09729, sec. 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from e3va import ops
from e3va.config import HighwayConfig
from e3va.ops.functional import project
from e3va.ops.storage import room
from e3va.ops.sublayer_epilogue import TAPPED
from e3va.trunks.base import Transition, TrunkConfig

PARAMETERS = ("P", "D", "gamma", "g", "Q", "b", "U", "g_up", "V", "c")
NO_DECAY = ("gamma", "b", "c")
OUTPUTS = ("V", "c")
"""Names of a stage's parameters; of those that do not decay; of what writes to the highway, zero at
first."""

HEARD = 4
"""Adapters that are heard in full at first. In a stage of more gamma begins at HEARD / K: the state
would otherwise grow by a factor with each, to thousands in one of 36."""

FORM = "form"
"""Name of the buffer that tells how the adapters of a highway are built."""

EPS = 1e-5
"""Of the norm that is tapped after a stage's last sub-layer, as of the trunks' own norms."""


class Highway(nn.Module):
    """The adapters of all stages of a trunk, all that is trained of an E³VA backbone but its norms.

    Its buffer ``form`` (int64 [3]) tells what an adapter taps, the side of its convolution and
    whether there is a state. Weights of another form are refused; those that come without it, and
    without D and gamma, are of the published one.

    Args:
        trunk: architecture of the trunk beside it.
        config: form and shape of the adapters.

    Raises:
        ValueError: a stage's channels do not fit the config.
    """

    form: Tensor

    def __init__(self, trunk: TrunkConfig, config: HighwayConfig | None = None) -> None:
        super().__init__()
        self.config = config or HighwayConfig()
        self.register_buffer(FORM, _form(self.config))
        self.stages = nn.ModuleList(
            HighwayStage(adapters, dim, self.config)
            for adapters, dim in zip(trunk.num_taps, trunk.dims, strict=True)
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if any(name.startswith(f"{prefix}stages.") for name in state_dict):
            told = any(name.endswith((".D", ".gamma")) for name in state_dict)
            untold = self.config if told else self.config.published()
            check_form(state_dict.setdefault(prefix + FORM, _form(untold)), self.config)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_form(form: Tensor, config: HighwayConfig) -> None:
    """Raise ValueError unless ``form``, the buffer of some weights, is that of ``config``."""
    if form.tolist() != _form(config).tolist():
        raise ValueError(
            f"the weights are of a highway with {_describe(form)}, this one has "
            f"{_describe(_form(config))}"
        )


def _form(config: HighwayConfig) -> Tensor:
    return torch.tensor([TAPPED.index(config.tap), config.mixing, config.state], device="cpu")


def _describe(form: Tensor) -> str:
    try:
        tap, mixing, state = form.tolist()
        return f"tap={TAPPED[tap]!r}, mixing={mixing}, state={bool(state)}"
    except (IndexError, TypeError, ValueError):
        return f"a form that this version does not know, {form.tolist()}"


class HighwayStage(nn.Module):
    """The K adapters of one stage, stacked; what they compute stands in :class:`HighwayConfig`.

    ``g`` [K, branches, d, d] and ``g_up`` are the inner kernels of the low-rank branches. V and c
    are zero at first: the highway then carries the trunk's own features. So is D; gamma is one, in
    a deep stage less, see :data:`HEARD`.

    Parameters (C channels, α rank, m hidden, d kernel_dim): P [K, C, α], D [K, α, side, side] or
    None, gamma [K, α] or None, g [K, branches, d, d], Q [K, α, m], b [K, m], U [K, m, α],
    g_up [K, branches, d, d], V [K, α, C], c [C].

    Args:
        adapters: K, one for each sub-layer.
        channels: C.
        config: form and shape of the adapters.
    """

    def __init__(self, adapters: int, channels: int, config: HighwayConfig) -> None:
        super().__init__()
        self.tap = config.tap
        self.storage = config.storage
        rank, hidden, side = config.rank, config.hidden(channels), config.mixing
        kernel = (adapters, config.branches, config.kernel_dim, config.kernel_dim)
        self.P = nn.Parameter(torch.empty(adapters, channels, rank))
        self.D = nn.Parameter(torch.empty(adapters, rank, side, side)) if side else None
        self.gamma = nn.Parameter(torch.empty(adapters, rank)) if config.state else None
        self.g = nn.Parameter(torch.empty(kernel))
        self.Q = nn.Parameter(torch.empty(adapters, rank, hidden))
        self.b = nn.Parameter(torch.empty(adapters, hidden))
        self.U = nn.Parameter(torch.empty(adapters, hidden, rank))
        self.g_up = nn.Parameter(torch.empty(kernel))
        self.V = nn.Parameter(torch.empty(adapters, rank, channels))
        self.c = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections that keep the variance, inner kernels the identity, gamma at most one, D, V,
        b and c zero."""
        for weight in (self.P, self.Q, self.U):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for kernel in (self.g, self.g_up):
            with torch.no_grad():
                kernel.copy_(torch.eye(kernel.shape[-1]))
        for weight in (self.b, self.V, self.c):
            nn.init.zeros_(weight)
        if self.D is not None:
            nn.init.zeros_(self.D)
        if self.gamma is not None:
            nn.init.constant_(self.gamma, min(1.0, HEARD / len(self.gamma)))


class StageRide:
    """One pass of the highway along a stage of the trunk.

    As the trunk's epilogue it completes each sub-layer while projecting its tap down;
    :meth:`arrive` then gives the highway after the stage.

    Args:
        stage: the adapters.
        before: the pass along the stage before, whose noise goes on (default: it begins here).
    """

    def __init__(self, stage: HighwayStage, before: StageRide | None = None) -> None:
        self._stage = stage
        self.tap = stage.tap
        # Without a backward to come nothing needs to be made smaller.
        self._storage = stage.storage if torch.is_grad_enabled() else "full"
        self._seed: Tensor | None = before._seed if before else None
        self._first: int = before._first + len(before._stage.P) if before else 0
        self._full: list[Tensor] = []  # taps that are kept as they are
        self._room: tuple[Tensor, ...] = ()  # t, taps and scales, of all sub-layers
        self._slices: list[Any] = []  # k, P, t, tap, scale of each that is to come

    def _begin(self, x: Tensor) -> None:
        """Make room for what sub-layers give whose outputs are like x."""
        P = self._stage.P.to(x.dtype)  # cast once for all
        self._room = room(x, P.shape[2], self._storage, len(P))
        parts = (v.unbind() for v in (P, *self._room))
        numbers = range(self._first, self._first + len(P))
        self._slices = list(zip(numbers, *parts, strict=True))
        if self._storage == "int4" and self._seed is None:
            # From PyTorch's own generator: torch.manual_seed makes a run repeatable.
            self._seed = torch.randint(2**31, (), device=x.device)

    def __call__(self, x: Tensor, y: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # as a decorator of __call__ it would stop Dynamo 2.14
            if not self._room:
                self._begin(x)
            weight, bias, eps = (norm.weight, norm.bias, norm.eps) if norm else (None, None, EPS)
            k, P, *into = self._slices.pop(0)
            y, z, *_ = ops.sublayer_epilogue(
                x, y, weight, bias, eps, P, self.tap, self._storage, self._seed, k, into
            )
            if self._storage == "full":
                self._full.append(x if self.tap == "output" else z)
        return y, z

    @torch.no_grad()
    def follow(self, x: Tensor, z: Tensor) -> None:
        """Take the next tap alone, from the sub-layer's output and the norm after it, where another
        highway's pass completes the sub-layer."""
        if not self._room:
            self._begin(x)
        _, P, t, *_ = self._slices.pop(0)
        tap = x if self.tap == "output" else z
        self._full.append(tap)
        project(tap, P, t)

    def arrive(
        self, h: Tensor, y_in: Tensor, y_out: Tensor, carry: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The highway and the state after the stage, from those before it (no state: zero) and the
        frozen stage's input and output, each [B, H, W, C]; see :func:`e3va.ops.highway`."""
        stage = self._stage
        t, kept, scale = self._room
        return ops.highway(
            h,
            y_in,
            y_out,
            self._full if self._storage == "full" else kept,
            t,
            *(stage.P, stage.g, stage.Q, stage.b, stage.U, stage.g_up, stage.V, stage.c),
            D=stage.D,
            gamma=stage.gamma,
            carry=carry,
            scale=None if self._storage == "full" else scale,
            storage=self._storage,
        )


class HighwayPass:
    """One pass of a highway along a whole trunk, as its companion.

    Args:
        highway: the highway.
        norms: the output norms of the stages.

    Attributes:
        maps: the normalised highway after each stage so far, [B, H, W, C].
    """

    def __init__(self, highway: Highway, norms: nn.ModuleList) -> None:
        self.maps: list[Tensor] = []
        self._highway = highway
        self._norms = norms
        self._ride: StageRide | None = None
        self._h: Tensor | None = None
        self._carry: Tensor | None = None

    def epilogue(self, stage: int) -> StageRide:
        adapters: Any = self._highway.stages[stage]
        self._ride = StageRide(adapters, self._ride)
        return self._ride

    def arrive(
        self, stage: int, y_in: Tensor, y_out: Tensor, transition: Transition | None
    ) -> None:
        assert self._ride is not None
        norm: Any = self._norms[stage]
        h = y_in if self._h is None else self._h
        h, carry = self._ride.arrive(h, y_in, y_out, self._carry)
        if transition is None:
            p, _ = ops.stage_exit(h, norm.weight, norm.bias, norm.eps)
        else:
            p, self._h = transition.exit(h, norm)
            self._carry = None if carry is None else transition.pool(carry)
        self.maps.append(p)
