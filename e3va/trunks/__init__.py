"""The trunks: one file a family, and one line here."""

from __future__ import annotations

import dataclasses
from typing import Any

from e3va.trunks import swin as swin
from e3va.trunks.base import FAMILIES, Trunk, TrunkConfig, TrunkFamily
from e3va.trunks.swin import FrozenSwin, Swin, SwinConfig

__all__ = [
    "FAMILIES",
    "FrozenSwin",
    "Swin",
    "SwinConfig",
    "Trunk",
    "family_of",
    "source_of",
    "trunk_config",
]


def family_of(config: TrunkConfig) -> TrunkFamily:
    """The family that an architecture is of.

    Raises:
        TypeError: of none.
    """
    for family in FAMILIES.values():
        if isinstance(config, family.config):
            return family
    kinds = ", ".join(family.config.__name__ for family in FAMILIES.values())
    raise TypeError(f"a trunk's architecture is one of {kinds}, got a {type(config).__name__}")


def source_of(variant: str) -> str | None:
    """Where the pretrained weights of a variant are published; None if they are not."""
    for family in FAMILIES.values():
        if variant in family.sources:
            return family.sources[variant]
    return None


def trunk_config(variant: str, **changes: Any) -> Any:
    """The architecture called ``variant`` ("swin_t", "swin_s", "swin_b", "swin_l", "swin_digits").

    Args:
        variant: its name.
        changes: fields of it to set otherwise, such as ``window_size=12`` for the weights
            pretrained at 384 pixels.

    Raises:
        TypeError: the architecture has no such field.
        ValueError: no such variant; the message lists the known ones.
    """
    known = {name: config for f in FAMILIES.values() for name, config in f.variants.items()}
    if variant not in known:
        raise ValueError(f"unknown trunk variant {variant!r}; known: {', '.join(known)}")
    return dataclasses.replace(known[variant], **changes)
