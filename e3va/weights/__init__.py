"""Pretrained trunks: files read without executing pickles, timm's by name, and their names
translated to ours by the trunk's family."""

from e3va.weights.loading import (
    check_weights,
    convert_weights,
    load_trunk,
    open_trunk,
    save_trunk,
    trunk_hash,
)
from e3va.weights.reading import State, read_weights, resolve

__all__ = [
    "State",
    "check_weights",
    "convert_weights",
    "load_trunk",
    "open_trunk",
    "read_weights",
    "resolve",
    "save_trunk",
    "trunk_hash",
]
