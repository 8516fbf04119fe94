"""The wheel, installed where there is no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.runs.factories import write_yolo

pytest.importorskip("torchvision")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has the wheel and, by a .pth file, the packages of this one, of which
    the wheel's own comes first."""
    folder = tmp_path_factory.mktemp("wheel")
    kept = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "*.so", "output")
    source = shutil.copytree(ROOT, folder / "source", ignore=kept)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", ".", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    environment = {**os.environ, "E3VA_BUILD": "none"}
    subprocess.run(build, cwd=source, env=environment, check=True, capture_output=True)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    here = {*filter(os.path.isdir, sys.path), sysconfig.get_path("purelib")} - {str(ROOT)}
    places = [place for place in here if Path(place).name == "site-packages"]
    Path(site, "others.pth").write_text("\n".join(places) + "\n")
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    return python


def test_the_command_works_anywhere(python, tmp_path):
    write_yolo(tmp_path / "data")

    def e3va(*words):
        command = [python.with_name("e3va"), *words]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "left out: C++: E3VA_BUILD is none" in e3va("info")
    words = ["--model", "swin_digits", "--iterations", "1", "--output", "run"]
    assert "box_ap" in e3va("train", "data", *words)
    assert (tmp_path / "run/predictions.png").is_file()
