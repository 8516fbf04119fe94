"""Imports point one way: entries → shells → runs and core → ops."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = {
    "files": set(),
    "cache": {"files"},
    "figures": {"files"},
    "environment": {"ops"},
    "seeding": set(),
    "words": set(),
    "ops": {"cache"},
    "measure": {"checkpoint", "ops"},
    "budget": {"figures", "files", "measure", "methods", "optim"},
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
RUNS = {
    "data": {"cache", "files", "words"},
    "runs": {"data", "figures", "files", "trunks", "words"},
}
SHELLS = {shell: {"__version__", *CORE, *RUNS} for shell in ("detectron2", "torchvision")}
ENTRIES = {
    "demo": {*CORE, *RUNS, *SHELLS},
    "cli": {"__version__", *CORE, *RUNS},
    "__main__": {"cli"},
    "__init__": set(CORE),
}
MAY_IMPORT = CORE | RUNS | SHELLS | ENTRIES
"""Modules of e3va that each module may import, beside itself."""


def test_every_module_has_its_layer():
    package = ROOT / "e3va"
    modules = {p.stem for p in package.glob("*.py")}
    assert modules | {p.parent.name for p in package.glob("*/__init__.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_modules_import_only_what_lies_below(module):
    path = ROOT / "e3va" / module
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
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


def test_ops_import_one_another_in_one_direction():
    """No import hides in a function."""
    names = {}
    for path in (ROOT / "e3va" / "ops").rglob("*.py"):
        tree = ast.parse(path.read_text())
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found = names[module] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "e3va":
                within = {f"{node.module}.{alias.name}" for alias in node.names}
                assert node in tree.body, module
                found |= within | {node.module}
    # Packages import their modules, so that those who import them are attached.
    edges = {name: set(names) & found for name, found in names.items()}
    packages = {"e3va.ops", "e3va.ops.backends"}
    graph = graphlib.TopologicalSorter({n: e - packages for n, e in edges.items()})
    assert len(list(graph.static_order())) == len(names)  # raises where there is a circle


def test_a_family_is_named_in_its_own_folder_alone():
    """Elsewhere stand only variants, what is registered in Detectron2, and files of configs."""
    interface = r"swin_(t|s|b|l|digits)\b|build_e3va_swin\w*|E3VA-Swin|\"swin\"|\bswin\\\."
    for path in (ROOT / "e3va").rglob("*.py"):
        if path.relative_to(ROOT / "e3va").parts[0] not in ("trunks", "weights"):
            assert "swin" not in re.sub(interface, "", path.read_text()).lower(), path


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
