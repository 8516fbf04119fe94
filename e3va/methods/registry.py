"""The tuning methods by name: each a config dataclass that builds its backbone."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch

from e3va.backbone import Backbone
from e3va.trunks.base import TrunkConfig


class Method(abc.ABC):
    """A way to tune a backbone: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    trains_trunk: ClassVar[bool] = False
    """Whether all weights of the trunk are trained, so that it is always stored in float32."""

    free: ClassVar[frozenset[str]] = frozenset()
    """Options in which an adapter and the backbone that it is loaded into may differ."""

    @abc.abstractmethod
    def build(self, trunk: TrunkConfig, dtype: torch.dtype) -> Backbone:
        """The backbone, with random weights.

        Args:
            trunk: architecture of the trunk.
            dtype: what the weights of it that stay frozen are stored in.
        """


METHODS: dict[str, type[Method]] = {}
"""The methods that there are, by name."""

M = TypeVar("M", bound=type[Method])


def register_method(name: str) -> Callable[[M], M]:
    """Decorates the dataclass of the method called ``name``."""

    def register(method: M) -> M:
        method.name = name
        METHODS[name] = method
        return method

    return register


def options_of(method: str) -> dict[str, Any]:
    """The options of a method, with their defaults.

    Raises:
        ValueError: no such method; the message lists them.
    """
    if method not in METHODS:
        raise ValueError(f"unknown tuning method {method!r}; known: {', '.join(METHODS)}")
    kind: Any = METHODS[method]
    return {field.name: field.default for field in dataclasses.fields(kind)}


def build_backbone(
    method: str, trunk: TrunkConfig, *, dtype: torch.dtype = torch.float32, **options: Any
) -> Backbone:
    """The backbone of a tuning method, with random weights.

    Args:
        method: one of :data:`METHODS`.
        trunk: architecture of the trunk, see :func:`e3va.trunk_config`.
        dtype: storage of the trunk's weights that stay frozen (default float32).
        options: of the method, see :func:`options_of`.

    Raises:
        ImportError: "lora" without PEFT.
        TypeError: the method has no such option; the message names those that it has. Or an option
            is of another type.
        ValueError: no such method, an option is out of range, or ``dtype`` is given where all of
            the trunk is trained.
    """
    known = options_of(method)
    if unknown := options.keys() - known.keys():
        raise TypeError(
            f"method {method!r} has no option {', '.join(sorted(unknown))}; it has "
            f"{', '.join(known) or 'none'}"
        )
    kind: Any = METHODS[method]
    if kind.trains_trunk and dtype != torch.float32:
        raise ValueError(
            f"method {method!r} trains the trunk, which is stored in float32, not {dtype}"
        )
    built = kind(**options)
    backbone = built.build(trunk, dtype)
    backbone.method = backbone.method or built
    return backbone
