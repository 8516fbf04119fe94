import json
import runpy
import sys

import pytest

pytest.importorskip("torchvision", reason="the demo needs torchvision: pip install 'e3va[demo]'")

from e3va.demo import __main__ as demo
from e3va.environment import environment

KEYS = {
    "box_ap",
    "mask_ap",
    "mask_ap50",
    "trainable_params",
    "saved_bytes",
    "peak_live_bytes",
    "seconds_per_iter",
}


@pytest.mark.parametrize("engine", ["detectron2", "torchvision"])
def test_demo_end_to_end(engine, tmp_path, monkeypatch, capsys):
    if engine == "detectron2":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    monkeypatch.setattr(demo, "TIMED_STEPS", 1)
    write_digits = demo.write_digits
    monkeypatch.setattr(
        demo, "write_digits", lambda root, seed: write_digits(root, train=4, val=2, seed=seed)
    )
    demo.main(["--engine", engine, "--iterations", "2", "--output", str(tmp_path)])

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["engine"] == engine and report["seconds"] > 0
    assert report["environment"] == environment()
    methods = report["methods"]
    assert list(methods) == ["full", "frozen", "e3va"]
    for result in methods.values():
        assert set(result) == KEYS
        assert all(isinstance(value, int | float) for value in result.values())
        assert all(0 <= result[k] <= 100 for k in ("box_ap", "mask_ap", "mask_ap50"))
        assert result["seconds_per_iter"] > 0
    for key in ("trainable_params", "saved_bytes"):
        assert methods["frozen"][key] < methods["e3va"][key] < methods["full"][key]
    # How many regions are positive is a matter of chance, more than frozen and e3va differ by.
    for method in ("frozen", "e3va"):
        assert 0 < methods[method]["peak_live_bytes"] < methods["full"]["peak_live_bytes"]
    assert methods["frozen"]["trainable_params"] == methods["frozen"]["saved_bytes"] == 0
    for picture in ("predictions.png", "curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "e3va" in capsys.readouterr().out


def test_an_interrupted_demo_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    def interrupt(*of, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("e3va.demo.digits.write_digits", interrupt)
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "e3va.demo.__main__")
    with pytest.raises(SystemExit, match="130"):
        runpy.run_module("e3va.demo", run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("interrupted: ")
