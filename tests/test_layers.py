"""Imports point one way: integrations → backbone → trunk, highway → ops → kernels."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "files": set(),
    "seeding": set(),
    "ops": {"files", "native", "kernels"},
    "config": {"ops"},
    "trunks": {"config", "ops"},
    "weights": {"files", "trunks"},
    "highway": {"config", "ops", "trunks"},
    "backbone": {"ops", "trunks"},
    "methods": {"backbone", "config", "highway", "trunks"},
    "optim": {"highway", "trunks"},
    "checkpoint": {"files", "trunks", "weights"},
    "precision": {"trunks", "weights"},
    "adapter": {
        "__version__",
        *("backbone", "checkpoint", "config", "files", "highway", "methods", "trunks", "weights"),
    },
    "serving": {"highway", "methods", "trunks", "weights"},
}
"""Modules of e3va that each core module may import, beside itself."""


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_core_modules_import_only_what_lies_below(module):
    path = ROOT / "e3va" / module
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module == "e3va":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("e3va."):
                names = [node.module.split(".")[1]]
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1] for a in node.names if a.name.startswith("e3va.")]
            assert set(names) <= MAY_IMPORT[module] | {module}, file


def test_importing_is_lean():
    """No GPU is touched and nothing optional is loaded."""
    code = (
        "import sys, torch, e3va\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'triton', 'detectron2', 'torchvision', 'pycocotools', 'matplotlib', 'sklearn'}\n"
        "heavy |= {'peft', 'timm', 'transformers'}\n"
        "import_of_torch = {m for m in heavy if m in sys.modules}\n"
        "assert not import_of_torch, import_of_torch\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)
