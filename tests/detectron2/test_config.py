"""Config keys: those that there are, those that there are not, and Detectron2's own."""

import importlib
import sys

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from detectron2.config import get_cfg

from e3va.detectron2 import add_e3va_config, load_config
from e3va.detectron2.budget import Setup
from e3va.detectron2.config import _FORMER, method_options, translated
from e3va.detectron2.engine import open_setup
from e3va.measure import bottom_up
from e3va.methods import METHODS, options_of
from tests.detectron2.factories import DIGITS


def test_bad_config_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="--config-file"):
        load_config("")
    typo = tmp_path / "typo.yaml"
    typo.write_text("VERSION: 2\nMODEL:\n  TRUNK:\n    VARIAN: swin_t\n")
    with pytest.raises(KeyError, match="VARIAN"):
        load_config(str(typo))
    code = tmp_path / "code.yaml"
    code.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n")
    with pytest.raises(Exception, match="python/object/apply"):
        load_config(str(code))
    assert not (tmp_path / "ran").exists()


def test_a_mistyped_key_is_told_the_closest_one():
    for typo in ("solver.max_iter", "SOLVER.MAXITER"):
        with pytest.raises(KeyError, match=rf"unknown key {typo}: did you mean SOLVER\.MAX_ITER\?"):
            load_config(DIGITS, [typo, 5])
    with pytest.raises(KeyError, match=r"unknown key xyz'$"):
        load_config(DIGITS, ["xyz", 5])


def test_former_names_of_keys(tmp_path, caplog):
    """In files, in those that they are based on, and on the command line: the last one counts."""
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("VERSION: 2\nMODEL:\n  E3VA:\n    VARIANT: swin_t\n    TAPS: fp8\n")
    more = "MODEL:\n  E3VA:\n    STATE: False\n  TRUNK:\n    VARIANT: swin_s\n"
    own.write_text(f"_BASE_: base.yaml\nVERSION: 2\n{more}")
    cfg = load_config(str(own), ["MODEL.E3VA.TAPS", "int8", "MODEL.HIGHWAY.MIXING", 5])
    assert cfg.MODEL.TRUNK.VARIANT == "swin_s"
    assert (cfg.MODEL.HIGHWAY.STORAGE, cfg.MODEL.HIGHWAY.MIXING) == ("int8", 5)
    assert cfg.MODEL.HIGHWAY.STATE is False
    in_base, in_own, on_command_line = (record.getMessage() for record in caplog.records)
    assert "MODEL.E3VA.VARIANT is MODEL.TRUNK.VARIANT now, MODEL.E3VA.TAPS is MODEL." in in_base
    assert in_own.endswith("MODEL.E3VA.STATE is MODEL.HIGHWAY.STATE now")
    assert on_command_line.endswith("MODEL.E3VA.TAPS is MODEL.HIGHWAY.STORAGE now")

    caplog.clear()
    written = tmp_path / "config.yaml"  # as a run writes it, which says everything
    written.write_text(cfg.dump())
    again = load_config(str(written)).MODEL
    for section in ("TRUNK", "HIGHWAY", "TUNING"):
        assert again[section] == cfg.MODEL[section]
    assert not caplog.records
    own.write_text("VERSION: 2\nMODEL:\n  E3VA:\n    VARIAN: swin_t\n")
    with pytest.raises(KeyError, match=r"MODEL\.E3VA"):
        load_config(str(own))


def test_every_former_name_has_a_new_one():
    cfg = load_config(DIGITS)
    names = translated([f"MODEL.E3VA.{key}" for key in _FORMER])
    assert len(set(names)) == len(_FORMER)
    for name in names:
        node = cfg
        for key in name.split("."):
            node = node[key]


def test_every_method_has_a_section_for_its_options():
    """In which they have their defaults; those of the highway are shared."""
    for method in METHODS:
        cfg = load_config(DIGITS, ["MODEL.TUNING.METHOD", method, "MODEL.HIGHWAY.KERNEL_DIM", 8])
        cfg.MODEL.HIGHWAY.HIDDEN_RATIO = 0.5
        assert method_options(cfg) == options_of(method)
    cfg = load_config(DIGITS, ["MODEL.TUNING.METHOD", "lora", "MODEL.TUNING.LORA.RANK", 4])
    assert method_options(cfg) == {"rank": 4, "scale": 1.0}


def test_the_published_form_is_no_other():
    paper = ["MODEL.TUNING.METHOD", "e3va_paper"]
    load_config(DIGITS, [*paper, "MODEL.HIGHWAY.MIXING", 0])
    for key, value in (("MIXING", 3), ("MIXING", 5), ("TAP", "norm"), ("STATE", True)):
        with pytest.raises(ValueError, match=rf"{key} is .* in e3va_paper, not {value}, which"):
            load_config(DIGITS, [*paper, f"MODEL.HIGHWAY.{key}", value])
    changed = Setup(load_config(DIGITS, paper), 1).changed("e3va").build().model
    assert bottom_up(changed).net.highway.config.state  # of e3va: ours


def test_a_frozen_trunk_is_stored_as_it_is_computed_in():
    def stored(method="e3va", *settings):
        model = open_setup(None, "swin_t", method, settings, 1).build().model
        return next(bottom_up(model).net.trunk.parameters()).dtype

    assert stored() == torch.bfloat16
    assert stored("e3va", "SOLVER.AMP.DTYPE", "float16") == torch.float16
    told = [("e3va", f"MODEL.{key}", "float32") for key in ("TRUNK.DTYPE", "E3VA.TRUNK_DTYPE")]
    told.append(("e3va", "SOLVER.AMP.ENABLED", "False"))
    for settings in (("full",), *told):
        assert stored(*settings) == torch.float32
    with pytest.raises(ValueError, match="unknown tuning method 'e3vo'; known: full"):
        stored("e3va", "MODEL.TUNING.METHOD", "e3vo")


def test_add_config_leaves_detectron2_defaults_alone():
    ours, theirs = get_cfg(), get_cfg()
    add_e3va_config(ours)
    for section in ("TRUNK", "HIGHWAY", "TUNING", "UPERNET"):
        del ours.MODEL[section]
    for section in ("CLASSES", "COCO_JSON", "VOC_TREE", "SEMANTIC_MAPS"):
        del ours.DATASETS[section]
    del ours.INPUT.CROP["RESIZE"], ours.INPUT.CROP["SINGLE_CATEGORY_MAX_AREA"]
    del ours.INPUT["COLOR_JITTER"]
    del ours.TEST["SLIDE"], ours.SOLVER["POLY_LR_POWER"]
    del (
        ours.SOLVER["OPTIMIZER"],
        ours.SOLVER["BETAS"],
        ours.SOLVER["HIGHWAY_LR_FACTOR"],
        ours.SOLVER["HIGHWAY_LR_RATIO"],
        ours.SOLVER.AMP["DTYPE"],
        ours.SOLVER["ACCUMULATE"],
        ours.SOLVER["EMA"],
    )
    assert ours == theirs


def test_import_without_detectron2(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.delitem(sys.modules, "e3va.detectron2")
    with pytest.raises(ImportError, match="needs Detectron2, which is installed from"):
        importlib.import_module("e3va.detectron2")
