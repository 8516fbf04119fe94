"""What the pages tell to type is understood: options, config files and keys."""

import re
import shlex
from pathlib import Path

import pytest

from e3va import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """The lines of indented blocks, joined where they are continued, as lists of words."""
    text = re.sub(r" \\\n\s+", " ", page.read_text())
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of(*beginning):
    n = len(beginning)
    found = [(p.name, w[n:]) for p in PAGES for w in commands(p) if tuple(w[:n]) == beginning]
    assert found, beginning
    return pytest.mark.parametrize("words", [pytest.param(w, id=name) for name, w in found])


@of("python", "train_net.py")
def test_train_net(words):
    pytest.importorskip("detectron2", reason="Detectron2 is missing: train_net.py is not checked")
    from detectron2.engine import default_argument_parser

    from e3va.detectron2 import load_config

    args = default_argument_parser().parse_args(words)
    config = args.config_file
    if config.startswith("output/"):  # what training with the config of that name has written
        name = Path(config).parent.name
        (config,) = map(str, (ROOT / "detectron2_configs").glob(f"*/{name}.yaml"))
        assert str(Path(args.config_file).parent) == load_config(config).OUTPUT_DIR
    load_config(str(ROOT / config), args.opts)  # raises for a key that there is not


@of("e3va")
def test_e3va(words, monkeypatch):
    """Understood, and then not run."""
    for name in ("_convert", "_data", "_evaluate", "_predict", "_export", "_plan", "describe"):
        monkeypatch.setattr(cli, name, lambda *options: "")
    trained = []
    monkeypatch.setattr(cli, "_train", trained.append)
    assert cli.main(words) == 0
    for options in trained:
        if options.engine == "torchvision":
            pytest.importorskip("torchvision")
            from e3va.torchvision.config import ModelConfig, TrainConfig, set_fields

            model = ModelConfig(weights="")
            set_fields(TrainConfig(iterations=1, model=model), options.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, page.name, "exec")


def test_tables_of_results_are_those_of_the_files():
    from bench import tables

    text = "".join(page.read_text() for page in tables.PAGES)
    assert tables.rendered(text) == text
    assert all(text.count(f"<!-- {name} -->") == 1 for name in tables.TABLES)
    stale = text.replace("<!-- tracks -->", "<!-- tracks -->\n\nstale")
    assert tables.rendered(stale) == text
    with pytest.raises(KeyError, match="unknown"):
        tables.rendered("<!-- unknown -->\n<!-- end -->")
