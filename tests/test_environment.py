import subprocess

import torch

from e3va import environment as module
from e3va.environment import environment


def test_versions_and_commit(tmp_path, monkeypatch):
    root = tmp_path / "clone"
    (root / "e3va").mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(root / "e3va/environment.py"))
    found = environment()
    assert found["torch"] == torch.__version__ and found["device"]
    assert (found["commit"], found["dirty"]) == ("unknown", False)

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", root, *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (root / "a").write_text("1")
    git("init")
    git("add", "a")
    git("commit", "-m", "a")
    found = environment()
    assert (found["commit"], found["dirty"]) == (git("rev-parse", "HEAD"), False)
    (root / "a").write_text("2")
    assert environment()["dirty"]


def test_the_commit_of_a_project_around_it_is_not_ours(tmp_path, monkeypatch):
    subprocess.run(["git", "init", tmp_path], check=True, capture_output=True)
    place = tmp_path / "lib/site-packages/e3va"
    place.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(place / "environment.py"))
    assert environment()["commit"] == "unknown"


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "e3va").mkdir()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "e3va/environment.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment()
    assert (found["commit"], found["dirty"]) == ("unknown", False)
