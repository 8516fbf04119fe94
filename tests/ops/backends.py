"""Which backend a test of an op asks for."""

import pytest

from e3va import native


def backend_of(name: str) -> str:
    """What to hand to ``e3va.backend``.

    "native" leaves float64 to the reference; the test is skipped only where it was not built.
    """
    if name != "native":
        return name
    left_out = native.build_info().left_out.get("C++")
    if left_out:
        pytest.skip(f"compiled kernels left untested: {left_out}")
    return "native,reference"
