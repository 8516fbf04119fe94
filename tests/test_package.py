"""What was built, and what the user is told about it."""

import json

import pytest
import torch

import e3va
from e3va import cli
from e3va.ops import dispatch, trial
from e3va.ops.backends import native
from e3va.ops.backends.registry import PREFERENCE


@pytest.fixture
def no_build(monkeypatch, tmp_path):
    """As if another build record were there; call it with the record, or None for none."""

    def pretend(record):
        if record is not None:
            (tmp_path / "_build_info.json").write_text(json.dumps(record))
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        native.build_info.cache_clear()
        native.load_error.cache_clear()

    yield pretend
    monkeypatch.undo()
    native.build_info.cache_clear()
    native.load_error.cache_clear()


def test_info_names_every_op_and_what_was_built(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"e3va {e3va.__version__}" in out
    assert all(op in out for op in PREFERENCE)
    for part in native.build_info().built:
        assert part in out
    for part, reason in native.build_info().left_out.items():
        assert f"left out: {part}: {reason}" in out


def test_without_a_compiler_everything_runs_on_the_reference(no_build, capsys):
    why = "no C++ compiler: c++, g++ or clang++ not found"
    no_build({"built": [], "left_out": {"C++": why, "CUDA": why}})
    for op in PREFERENCE:
        assert dispatch.explain(op, torch.device("cpu"), torch.float32).backend == "reference"
    cli.main(["info"])
    out = capsys.readouterr().out
    assert "nothing: pure Python and Triton" in out
    assert f"left out: C++: {why}" in out
    with e3va.backend("native"), pytest.raises(RuntimeError, match="was not built: no C\\+\\+"):
        e3va.ops.window_attention(
            torch.zeros(1, 3, 3, 96), torch.zeros(96), torch.zeros(25, 1), 3, 0
        )


def test_never_built(no_build):
    no_build(None)
    reason = native.why_not(torch.device("cpu"), torch.float32)
    assert "the package was never built: pip install -e ." in reason


def test_a_library_that_does_not_load_is_told(no_build, monkeypatch, capsys):
    no_build({"built": ["C++"]})
    assert dispatch.explain("window_attention", torch.device("cpu"), torch.float32).backend == (
        "reference"
    )
    cli.main(["info"])
    assert "BROKEN:   the extension was built but does not load" in capsys.readouterr().out
    monkeypatch.setattr(trial, "selftest", lambda device: iter(()))
    assert cli.main(["selftest", "--device", "cpu"]) == 1


def test_a_damaged_record_of_the_build_is_named(no_build, tmp_path):
    no_build(None)
    wrong = ("", '{"built": ["C+', '{"compiled": []}', '{"built": null}', "[]", "[" * 100_000)
    for damage in (*wrong, "\udcff{"):  # the last is no UTF-8
        (tmp_path / "_build_info.json").write_text(damage, errors="surrogateescape")
        native.build_info.cache_clear()
        reason = native.why_not(torch.device("cpu"), torch.float32)
        assert f"{tmp_path / '_build_info.json'} is damaged" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for it here")
def test_triton_says_what_it_needs():
    with e3va.backend("triton"), pytest.raises(RuntimeError, match="run on GPUs, not on cpu"):
        dispatch.explain("sublayer_epilogue", torch.device("cpu"), torch.float32)


def test_the_first_backend_that_can_run_is_taken(monkeypatch):
    cpu = torch.device("cpu")
    with e3va.backend("triton, reference"):
        choice = dispatch.explain("sublayer_epilogue", cpu, torch.float32)
    assert choice == ("reference", "asked for by name")
    monkeypatch.setenv("E3VA_BACKEND", "triton,reference")
    assert dispatch.explain("window_attention", cpu, torch.float32).backend == "reference"
    for wrong in ("cuda", "auto,native", ""):
        monkeypatch.setenv("E3VA_BACKEND", wrong)
        with pytest.raises(ValueError, match="E3VA_BACKEND must be auto, or one or more of"):
            dispatch.requested_backends()


def test_info_names_a_wrong_backend(monkeypatch, capsys):
    monkeypatch.setenv("E3VA_BACKEND", "bogus")
    assert cli.main(["info"]) == 0
    assert "error: E3VA_BACKEND must be auto" in capsys.readouterr().out
    assert cli.main(["data", "nowhere"]) == 2  # other commands end before they begin
    assert "error: E3VA_BACKEND must be auto" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for it here")
def test_a_backend_that_cannot_run_ends_a_command_in_one_line(monkeypatch, capsys):
    def run(device):
        with e3va.backend("triton"):
            dispatch.explain("sublayer_epilogue", device, torch.float32)

    monkeypatch.setattr(trial, "selftest", run)
    assert cli.main(["selftest", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: backend 'triton' was asked for, but cannot run")


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"e3va {e3va.__version__}"
