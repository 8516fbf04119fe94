"""Detectron2's own tools on our configs."""

import subprocess
import sys

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")


from tests.detectron2.factories import FOLDER, ROOT


def test_tools_of_detectron2_run_on_our_configs(tmp_path):
    """By way of python -m e3va.detectron2, which adds our keys to their configs."""
    tool = tmp_path / "tool.py"
    tool.write_text(
        "import sys\n"
        "from torch import empty\n"
        "from torch.nn import Identity\n"
        "from fvcore.nn import FlopCountAnalysis\n"
        "from detectron2.config import get_cfg\n"
        "from detectron2.modeling import BACKBONE_REGISTRY\n"
        "cfg = get_cfg()\n"
        "cfg.merge_from_file(sys.argv[1])\n"
        "assert cfg.MODEL.BACKBONE.NAME in BACKBONE_REGISTRY\n"
        "assert 'e3va::highway' in FlopCountAnalysis(Identity(), (empty(1),))._op_handles\n"
        "print(__name__, cfg.MODEL.TUNING.METHOD)\n"
    )

    def run(*arguments):
        command = [sys.executable, "-m", "e3va.detectron2", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(tool, FOLDER / "coco/cascade_mask_rcnn_e3va_swin_b_1x.yaml")
    assert done.stdout.split() == ["__main__", "e3va"], done.stderr
    assert "usage: python -m e3va.detectron2 TOOL.py" in run().stderr
