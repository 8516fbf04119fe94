"""How the ops become operators of PyTorch, ``torch.ops.e3va.<name>``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What each operator runs."""

_LIBRARY = torch.library.Library("e3va", "FRAGMENT")


def operator(function: Callable[..., Any]) -> Any:
    """Register ``function``, annotated, under its name without underscores; autograd and a fake are
    registered with what is returned. It must return new tensors and change none."""
    name = function.__name__.strip("_")
    FUNCTIONS[name] = function
    return torch.library.custom_op(f"e3va::{name}", mutates_args=())(function)


def frozen_operator(function: Callable[..., Any], writes: Sequence[str] = ()) -> Any:
    """The same for what has no backward, called in a third of the time: without ``custom_op``'s
    autograd and checks of results, which take longer than a small kernel. A fake is registered by
    ``torch.library.register_fake``. ``writes``: the arguments that it writes to."""
    name = function.__name__.strip("_")
    FUNCTIONS[name] = function
    schema = torch.library.infer_schema(function, mutates_args=writes)
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)

    @functools.cache
    def uncompiled() -> Callable[..., Any]:
        return torch.compiler.disable(function)

    def run(*arguments: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # nobody compiles, and to import it takes seconds
            return function(*arguments)
        return uncompiled()(*arguments)  # called between two graphs it must not become a third

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.e3va, name).default
