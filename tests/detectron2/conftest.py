"""Configs on tiny data sets; the functions behind them are in ``factories.py``."""

from functools import partial

import pytest


@pytest.fixture
def tiny(tmp_path):
    """Makes the digits config over a random trunk on tiny data, with KEY, VALUE overrides."""
    from tests.detectron2 import factories

    return partial(factories.tiny, tmp_path)


@pytest.fixture
def packaged(tmp_path):
    """The same over the trunk that ships with the package, with nothing to evaluate on."""
    from tests.detectron2 import factories

    return partial(factories.packaged, tmp_path)


@pytest.fixture
def voc(tmp_path):
    """Makes the digits config of boxes on a tiny tree."""
    from tests.detectron2 import factories

    return partial(factories.voc, tmp_path)


@pytest.fixture
def semantic(tmp_path):
    """Makes the digits config of semantic maps on tiny ones."""
    from tests.detectron2 import factories

    return partial(factories.semantic, tmp_path)
