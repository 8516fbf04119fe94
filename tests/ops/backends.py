"""Which backend a test of an op asks for."""

import pytest

from e3va import native


def backend_of(name: str) -> str:
    """What to hand to ``e3va.backend``; skips only what could not be built."""
    if name == "reference":
        return name
    left_out = native.build_info().left_out.get("C++")
    if left_out:
        pytest.skip(f"compiled kernels left untested: {left_out}")
    return "native,reference"
