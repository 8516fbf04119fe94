"""What is traced on shapes alone is what a real step takes."""

import json
import subprocess
import sys

import pytest
import torch

from bench.plan import real_split
from bench.step import with_stock_heads
from e3va.cli import main
from e3va.detectron2 import load_config
from e3va.detectron2.budget import Setup
from e3va.optim import has_adamw8bit
from tests.detectron2.factories import DIGITS, FOLDER, SMALL, flat
from tests.traces import assert_near

MIB = 2**20
MASKS = FOLDER / "coco/mask_rcnn_e3va_swin_b_1x.yaml"
CASCADE = FOLDER / "coco/cascade_mask_rcnn_e3va_swin_b_1x.yaml"
BOXES = FOLDER / "voc/faster_rcnn_e3va_swin_b.yaml"
RETINANET = FOLDER / "voc/retinanet_e3va_swin_b.yaml"
CASCADE_L = FOLDER / "coco/cascade_mask_rcnn_e3va_swin_l_1x.yaml"
RETINANET_L = FOLDER / "voc/retinanet_e3va_swin_l.yaml"
MAPS = FOLDER / "ade20k/upernet_e3va_swin_b.yaml"
FULL_TAPS = ("MODEL.HIGHWAY.STORAGE", "full")
WIDE = ("MODEL.FPN.OUT_CHANNELS", 128)


@pytest.mark.parametrize(
    ("config", "method", "size", "images", "more"),
    [
        (MASKS, "e3va", (160, 224), 1, ()),
        (MASKS, "e3va", (97, 131), 2, FULL_TAPS),
        (MASKS, "full", (128, 192), 1, ()),
        (CASCADE, "e3va", (128, 160), 1, ()),
        (CASCADE, "partial1", (128, 160), 1, ("SOLVER.OPTIMIZER", "SGD")),
        (BOXES, "mona", (160, 160), 1, ("SOLVER.OPTIMIZER", "ADAMW8BIT")),
        (RETINANET, "full", (160, 96), 2, ("SOLVER.AMP.ENABLED", False)),
        (MAPS, "e3va", (96, 96), 2, ("MODEL.SEM_SEG_HEAD.NORM", "BN")),
        (DIGITS, "adapter", (160, 160), 1, ()),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (MASKS, "frozen", (160, 224), 1, ()),
                (MASKS, "bitfit", (128, 128), 1, WIDE),
                (RETINANET, "e3va_paper", (160, 256), 1, ()),
            )
        ),
    ],
)
def test_a_traced_step_takes_what_a_real_one_does(config, method, size, images, more):
    words = [*flat({**SMALL, "MODEL.TUNING.METHOD": method}), *more]
    if "ADAMW8BIT" in more:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing")
    cfg = load_config(str(config), words)
    real = real_split(cfg, images, size)
    traced = Setup(cfg).split(images, size)
    assert_near(traced, real)
    for part, slack in (("neck", 2**16), ("proposals", 2**19)):
        assert traced[part] == pytest.approx(real[part], rel=0.05, abs=slack)


# Measured by python -m bench.step, which rounded to whole MiB, in bfloat16 on a CPU, under
# Detectron2's own heads, with all gradients beforehand, as in a part of the configured batch.
@pytest.mark.parametrize(
    ("config", "method", "size", "measured"),
    [
        (MASKS, "e3va", (800, 1344), 895),
        (CASCADE, "partial1", (800, 1344), 1534),
        (RETINANET_L, "e3va", (608, 1008), 900),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (MASKS, "frozen", (800, 1344), 797),
                (MASKS, "full", (800, 1344), 4660),
                (CASCADE, "frozen", (800, 1344), 1300),
                (CASCADE, "e3va", (800, 1344), 1396),
                (CASCADE, "full", (800, 1344), 5164),
                (CASCADE_L, "frozen", (800, 1344), 1526),
                (CASCADE_L, "e3va", (800, 1344), 1664),
                (RETINANET_L, "frozen", (608, 1008), 794),
                (RETINANET_L, "full", (608, 1008), 5983),
            )
        ),
    ],
)
def test_big_steps_are_what_was_measured(config, method, size, measured):
    cfg = with_stock_heads(load_config(str(config), ["MODEL.TUNING.METHOD", method]))
    total = sum(Setup(cfg).split(1, size).values())
    assert total / MIB == pytest.approx(measured, rel=0.05)


def test_a_trace_finds_the_same_after_others():
    """Memory that others have left is dirty, and each trace ends with the optimizer's step, by the
    fused AdamW, one that has to see all gradients first, one in eight bits, or SGD."""
    clip = "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"
    float16 = "SOLVER.AMP.DTYPE", "float16"
    kinds = [("SOLVER.OPTIMIZER", "SGD")]
    kinds += [("SOLVER.OPTIMIZER", "ADAMW8BIT")] if has_adamw8bit() else []
    for more in ((), clip, float16, *kinds):
        setup = Setup(load_config(str(MASKS), [*flat(SMALL), *more]))
        first = setup.split(2, (96, 128))
        torch.full((2**26,), float("nan"))  # dirties what is given out next
        setup.split(1, (64, 96))
        assert setup.split(2, (96, 128)) == first
        tracer = setup._tracer
        weights = [p for p in tracer.model.parameters() if p.requires_grad]
        assert all(tracer._shapes._is_unknown(p) for p in weights if p.numel() >= 2**16)


def test_a_trace_leaves_the_random_numbers_and_the_memory_alone():
    code = (
        "import resource, torch\n"
        "from e3va.detectron2 import load_config\n"
        "from e3va.detectron2.budget import Setup\n"
        f"cfg = load_config({str(MASKS)!r}, ['MODEL.TUNING.METHOD', 'full'])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "state = torch.get_rng_state()\n"
        "total = sum(Setup(cfg).split(1, (800, 1344)).values())\n"
        "assert torch.equal(torch.get_rng_state(), state)\n"
        "taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "assert taken < total / 5, (taken, total)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def plan(*words):
    return main(["plan", *map(str, words)])


def test_plan_says_what_fits_and_what_would(tmp_path, capsys):
    target, picture = tmp_path / "plan.json", tmp_path / "methods.png"
    small = flat({**SMALL, "MODEL.HIGHWAY.STORAGE": "full", "SOLVER.IMS_PER_BATCH": 16})
    words = "--config", MASKS, "--size", 256, 384, "--json", target
    assert plan(*words, "--card", "0.75GB", "--compare", picture, *small) == 0
    content = json.loads(target.read_text())
    assert content["fits"]
    assert content["total_bytes"] == sum(content["split"].values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    most, usable = content["largest_batch"], content["usable_bytes"]
    assert most >= 1
    setup = Setup(load_config(str(MASKS), small))
    assert sum(setup.split(most, (256, 384)).values()) <= 1.05 * usable
    assert sum(setup.split(most + 2, (256, 384)).values()) > 0.95 * usable
    side = content["largest_size"]
    if side[0] < 2 * 256:
        assert sum(setup.split(1, side).values()) == pytest.approx(usable, rel=0.2)
    assert content["accumulate"] == next(n for n in (1, 2, 4, 8, 16) if 16 // n <= most)

    assert plan(*words, "--card", "0.65GB", "--batch", 3, *small) == 0
    content = json.loads(target.read_text())
    assert not content["fits"]
    changes = {entry["change"]: entry["total_bytes"] for entry in content["advice"]}
    assert changes["MODEL.HIGHWAY.STORAGE int4"] < content["total_bytes"]
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config", "nowhere.yaml"), "no config file"),
        (("--config", str(MASKS), "--card", "RTX 1"), "unknown card"),
        (("--model", "swin_x"), "unknown model"),
        (("--config", DIGITS), "give --size"),
        (("--config", str(MASKS), "MODEL.NOTHING", "1"), "unknown key"),
        (("--config", str(MAPS), "--size", "64", "64", "MODEL.SEM_SEG_HEAD.NORM", "BN"), "images"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(words, message, capsys):
    assert plan(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1


def test_without_detectron2_a_line_says_so(monkeypatch, capsys):
    for name in [n for n in sys.modules if n.startswith("e3va.detectron2")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert plan("--config", MASKS) == 2
    assert "needs Detectron2" in capsys.readouterr().err
