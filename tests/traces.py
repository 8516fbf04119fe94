"""What is traced on shapes alone, beside what a real step takes."""

import pytest

from e3va.measure import SPLIT


def assert_near(traced, real):
    """The same but for chance: how many of a handful of regions are positive, and so the heads; and
    which level's losses are at the peak."""
    assert traced.keys() == set(SPLIT)
    for part in ("trunk_weights", "other_weights", "optimizer"):
        assert traced[part] == real[part]
    assert traced["heads"] == pytest.approx(real["heads"], rel=0.3, abs=2**16)
    chance = real["heads"] - traced["heads"]
    assert sum(traced.values()) == pytest.approx(sum(real.values()) - chance, rel=0.05)
    assert traced["backbone_saved"] == pytest.approx(real["backbone_saved"], rel=0.05, abs=2**16)
