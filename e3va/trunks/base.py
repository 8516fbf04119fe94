"""What a trunk is: a backbone of stages whose sub-layers write to a residual stream.

Maps are [B, H, W, C] throughout.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from e3va import ops

WEIGHT_HASH = "weight_hash"
"""Name of the buffer that tells which weights a frozen trunk has."""

Epilogue = Callable[[Tensor, Tensor, "nn.LayerNorm | None"], tuple[Tensor, Tensor]]
"""What completes a sub-layer: (x, y, norm) → (y', norm(y')), where x is the sub-layer's output
(a *tap*), y the residual stream and norm the LayerNorm that the next sub-layer begins with (None
after a stage's last one, whose second result is not used)."""


class TrunkConfig(Protocol):
    """Architecture of a trunk: a frozen dataclass that JSON can hold.

    Attributes:
        dims: channels C of each stage.
        strides: pixels of the image for each token of a stage, along each side.
        num_taps: taps K of each stage, the outputs of its sub-layers.
    """

    @property
    def dims(self) -> tuple[int, ...]: ...

    @property
    def strides(self) -> tuple[int, ...]: ...

    @property
    def num_taps(self) -> tuple[int, ...]: ...


class Transition(abc.ABC):
    """The way from one stage to the next, with the trunk's own weights."""

    @abc.abstractmethod
    def __call__(self, y: Tensor) -> Tensor:
        """Down-sampling [B, H, W, C] → [B, H', W', C'], differentiable in ``y``."""

    @abc.abstractmethod
    def exit(self, h: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The two ways that a highway leaves a stage by: ``norm(h)``, and ``h`` down-sampled with
        the same frozen weights (arXiv 2306.09729, sec. 3.3)."""

    @abc.abstractmethod
    def pool(self, carry: Tensor) -> Tensor:
        """The state of a highway [B, H, W, α] as the next stage's map [B, H', W', α]."""


class Companion(Protocol):
    """What goes along with an image through a trunk, see :meth:`Trunk.drive`."""

    def epilogue(self, stage: int) -> Epilogue | None:
        """What completes the sub-layers of the stage that begins; None: the trunk itself."""

    def arrive(
        self, stage: int, y_in: Tensor, y_out: Tensor, transition: Transition | None
    ) -> None:
        """Told of each stage's input and output, and of the way on (None after the last)."""


class Trunk(nn.Module, abc.ABC):
    """A network of stages, without output norms or head.

    Computes in the dtype of the image, whatever that of the weights; :meth:`drive` chooses it.

    Args:
        config: the architecture.
        drop_path: stochastic depth rate of the last block, in training (default 0).
    """

    precision: str | None = None
    """What :func:`e3va.precision.quantize_trunk` made of its weights; None: nothing."""

    def __init__(self, config: Any, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config

    @abc.abstractmethod
    def storage_dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in."""

    @abc.abstractmethod
    def embed(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] → the first stage's input, in the image's dtype.

        Raises:
            ValueError: the image has another shape.
        """

    @abc.abstractmethod
    def stage(self, stage: int, y: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        """One stage: [B, H, W, C] → [B, H, W, C]. ``epilogue`` completes each sub-layer; default:
        residual add."""

    @abc.abstractmethod
    def transition(self, stage: int) -> Transition | None:
        """The way from ``stage`` to the next; None after the last."""

    @abc.abstractmethod
    def blocks(self, stage: int) -> Sequence[nn.Module]:
        """The blocks of a stage, in order; each has as many sub-layers."""

    def qkv(self, stage: int) -> Sequence[nn.Linear]:
        """The layers of a stage that put out query, key and value side by side."""
        return ()

    def compute_dtype(self, device_type: str) -> torch.dtype:
        """Autocast's dtype where autocast is enabled, else that of the weights."""
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.storage_dtype()

    def drive(self, image: Tensor, companion: Companion) -> None:
        """Take an image [B, 3, H, W], normalised, any H and W ≥ 1, through all stages.

        Computes in the autocast dtype under autocast, else in the dtype of the weights.
        """
        device = image.device.type
        x = image.to(self.compute_dtype(device))
        with torch.autocast(device, enabled=False):
            y = self.embed(x)
            for stage in range(len(self.config.dims)):
                y_in, y = y, self.stage(stage, y, companion.epilogue(stage))
                transition = self.transition(stage)
                companion.arrive(stage, y_in, y, transition)
                if transition:
                    y = self._pass_on(transition, y)

    def _pass_on(self, transition: Transition, y: Tensor) -> Tensor:
        return transition(y)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Image [B, 3, H, W], normalised → each stage's output [B, H, W, C]."""
        outputs = Outputs()
        self.drive(image, outputs)
        return outputs.maps


class Outputs:
    """A companion that keeps each stage's output.

    Args:
        epilogues: each stage's (default: the trunk's own).
    """

    def __init__(self, epilogues: list[Epilogue | None] | None = None) -> None:
        self.maps: list[Tensor] = []
        self._epilogues = epilogues

    def epilogue(self, stage: int) -> Epilogue | None:
        return self._epilogues[stage] if self._epilogues else None

    def arrive(
        self, stage: int, y_in: Tensor, y_out: Tensor, transition: Transition | None
    ) -> None:
        self.maps.append(y_out)


class Frozen(Trunk):
    """Mixed into a family's trunk, before it: it only ever runs forward, without autograd.

    Its parameters require no gradient and its :meth:`train` does nothing. Its buffer
    ``weight_hash`` (uint8 [32]) is the SHA-256 of the weights as their file had them, or zero where
    that is not known; see :func:`e3va.weights.trunk_hash`.

    Args:
        config: the architecture.
        dtype: the dtype that its weights are stored in (default float32).

    Raises:
        TypeError: ``dtype`` is not floating.
    """

    weight_hash: Tensor

    def __init__(self, config: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, got {dtype}")
        self.register_buffer(WEIGHT_HASH, torch.zeros(32, dtype=torch.uint8))
        self.to(dtype)
        self.requires_grad_(False)
        super().train(False)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Weights that come without their hash leave it unknown, rather than that of the old ones.
        if any(prefix + name in state_dict for name, _ in self.named_parameters()):
            if self.precision is not None:
                raise RuntimeError(
                    f"the trunk's weights are quantised to {self.precision}: load them before"
                )
            state_dict.setdefault(prefix + WEIGHT_HASH, torch.zeros_like(self.weight_hash))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        return self

    @torch.no_grad()
    def embed(self, image: Tensor) -> Tensor:
        return super().embed(image)  # type: ignore[safe-super]

    @torch.no_grad()
    def stage(self, stage: int, y: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        return super().stage(stage, y, epilogue or residual)  # type: ignore[safe-super]

    @torch.no_grad()
    def _pass_on(self, transition: Transition, y: Tensor) -> Tensor:
        return super()._pass_on(transition, y)


def residual(x: Tensor, y: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
    """The epilogue that only adds, fused."""
    weight, bias, eps = (norm.weight, norm.bias, norm.eps) if norm else (None, None, 0.0)
    y, z, *_ = ops.sublayer_epilogue(x, y, weight, bias, eps)
    return y, z


@dataclass(frozen=True)
class TrunkFamily:
    """All that the rest of the package has to know of a kind of trunk.

    Attributes:
        name: such as "swin".
        config: the dataclass of its architectures, a :class:`TrunkConfig`.
        variants: architectures by name.
        trainable: its trunk; frozen: the same with :class:`Frozen` mixed in.
        translate: the weights of a trunk in a file's tensors, under our names; None where no
            format that this family is published in is recognised.
        config_of: the architecture that the shapes of a trunk's weights, under our names, speak of.
        describe: an architecture in words.
        marks: name endings by which its published formats are recognised, for messages.
        sources: where the pretrained weights of a variant are published.
        no_decay: names of parameters that weight decay must spare, beside norms and biases.
        is_quantizable: whether a linear layer, by its name in the trunk, may be stored in 8 bits.
    """

    name: str
    config: type
    variants: Mapping[str, Any]
    trainable: type[Trunk]
    frozen: type[Any]
    translate: Callable[[Mapping[str, Tensor]], dict[str, Tensor] | None]
    config_of: Callable[[Mapping[str, Tensor]], Any]
    describe: Callable[[Any], str]
    marks: tuple[str, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    no_decay: frozenset[str] = frozenset()
    is_quantizable: Callable[[str], bool] = lambda name: False


FAMILIES: dict[str, TrunkFamily] = {}
"""The families that there are, by name."""


def register_family(family: TrunkFamily) -> TrunkFamily:
    """Make ``family`` known to the rest of the package."""
    FAMILIES[family.name] = family
    return family


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``norm(x)``, computed in the dtype of ``x``."""
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x), norm.bias.to(x), norm.eps)


QUANTISED_VALUES = 2**22
"""Of its result that a quantised layer computes at once: torchao's has several copies of them, in
32 bits."""


class Linear(nn.Linear):
    """A linear layer with bias that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        weight, bias = self.weight.to(x), self.bias.to(x)
        if not is_traceable_wrapper_subclass(weight):
            return F.linear(x, weight, bias)
        rows = max(1, QUANTISED_VALUES // self.out_features)
        if x.shape[:-1].numel() <= rows:
            return F.linear(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for part, of in zip(
            x.flatten(0, -2).split(rows), out.flatten(0, -2).split(rows), strict=True
        ):
            of.copy_(F.linear(part, weight, bias))
        return out
