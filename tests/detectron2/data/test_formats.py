"""The table of formats."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.config import get_cfg

from e3va.detectron2 import add_e3va_config, config, data, register_datasets
from e3va.detectron2.data.catalog import DatasetFormat, register


def test_a_row_is_all_that_a_format_needs(monkeypatch):
    """It brings its section of the config, its data, and what scores them."""
    given = []
    row = DatasetFormat(
        section="POINTS",
        defaults={"ROOT": "", "NAMES": []},
        given_by=("ROOT",),
        register=given.append,
        evaluators={"points": lambda cfg, name: f"{cfg.DATASETS.POINTS.ROOT} of {name}"},
    )
    for module in (config, data):
        monkeypatch.setattr(module, "FORMATS", (*data.FORMATS, row))
    cfg = get_cfg()
    add_e3va_config(cfg)
    register_datasets(cfg)
    assert not given
    cfg.merge_from_list(["DATASETS.POINTS.ROOT", "there", "DATASETS.POINTS.NAMES", ["a"]])
    assert row.defaults == {"ROOT": "", "NAMES": []}
    register_datasets(cfg)
    assert given == [cfg]
    register(cfg, "TEST", "points", list, evaluator_type="points")
    assert cfg.DATASETS.TEST == ("points",)
    assert data.build_evaluator(cfg, "points") == "there of points"

    cfg.DATASETS.VOC_TREE.ROOT = "here"
    with pytest.raises(ValueError, match=r"VOC_TREE and DATASETS\.POINTS are both given"):
        register_datasets(cfg)
