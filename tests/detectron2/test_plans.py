"""What is told of cards, and how far plans are from real steps."""

import json

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its steps are not planned")

from bench import cards, plan
from e3va.budget import card
from tests.detectron2.factories import SMALL, flat

SETUP = "digits/upernet_e3va"


def test_what_fits_on_a_card(tmp_path, monkeypatch, capsys):
    """More images and larger ones fit on a larger card, and less of what takes more."""
    monkeypatch.setattr(cards, "SETUPS", {SETUP: (64, 96)})
    file = tmp_path / "cards.json"
    options = ["--setup", SETUP, "--methods", "full", "e3va", "--json", str(file)]
    report = cards.main([*options, "--cards", "0.7GB", "0.75GB"])
    assert json.loads(file.read_text()) == json.loads(json.dumps(report))
    assert report["usable_bytes"]["0.7GB"] == card("0.7GB").usable
    found = report["setups"][SETUP]
    for method in found.values():
        small, large = method.values()
        assert 0 < small["largest_batch"] < large["largest_batch"]
        assert small["largest_size"] <= large["largest_size"]
        height, width = large["largest_size"]
        assert height % 32 == width % 32 == 0 and height < width
    full, ours = (found[method]["0.7GB"]["largest_batch"] for method in ("full", "e3va"))
    assert full < ours
    traced = cards.Traced(SETUP, "e3va")
    usable, most = card("0.7GB").usable, ours
    assert sum(traced.split(most, (64, 96)).values()) <= 1.02 * usable
    assert sum(traced.split(most + 2, (64, 96)).values()) > 0.98 * usable
    with pytest.raises(SystemExit):
        cards.main([*options, "--cards", "nothing"])
    assert "unknown card" in capsys.readouterr().err


def test_how_far_a_plan_is(tmp_path, monkeypatch, capsys):
    """Whole batches and parts, which find the gradients of those before them."""
    more = tuple(flat({k: v for k, v in SMALL.items() if "BATCH" not in k}))
    monkeypatch.setattr(
        plan,
        "CASES",
        [plan.Case("coco/mask_rcnn_e3va_swin_b_1x", "e3va", (96, 128), 1, n, more) for n in (1, 2)],
    )
    file = tmp_path / "plan.json"
    report = plan.main(["--json", str(file)])
    assert json.loads(file.read_text()) == json.loads(json.dumps(report))
    whole, part = report["cases"]
    for case in (whole, part):
        assert case["planned_bytes"] == pytest.approx(case["real_bytes"], rel=0.05)
    assert part["real_bytes"] > whole["real_bytes"]
    assert capsys.readouterr().out.count("planned") == 2


def test_the_ten_setups_are_those_that_the_page_tells():
    assert len(plan.CASES) == len(set(plan.CASES)) == 10
    for case in plan.CASES:
        assert case.method == plan.settings(case).MODEL.TUNING.METHOD
