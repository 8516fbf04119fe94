"""What is checked once, and when it is checked again."""

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import PIL
import pytest

from e3va.cache import warn_once
from e3va.data import checks
from e3va.data.checks import check_files
from e3va.data.images import check_images
from e3va.data.maps import look
from tests.data.factories import write_image, write_maps

calls: list[str] = []


def length(path):
    calls.append(path.name)
    if not (content := path.read_bytes()):
        raise ValueError(f"{path} is empty")
    return [len(content), str(path)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checks, "WORTH", -1.0)
    warn_once.cache_clear()
    checks._version.cache_clear()
    calls.clear()
    yield tmp_path / "cache/e3va"
    checks._version.cache_clear()


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"data/{i % 3}/{i}.txt" for i in range(50)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (i + 1))
    return paths


def test_unchanged_files_are_not_looked_at_again(files, cache):
    expected = [[i + 1, str(path)] for i, path in enumerate(files)]
    assert check_files(length, files) == expected
    assert sorted(calls) == sorted(path.name for path in files)
    calls.clear()
    assert check_files(length, files) == check_files(length, files[::-1])[::-1] == expected
    assert not calls and len(list(cache.iterdir())) == 1

    files[7].write_bytes(b"longer than before")
    status = files[9].stat()
    files[9].write_bytes(b"y" * status.st_size)  # of the same size, another time
    os.utime(files[9], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    files[11].unlink()
    files[11].symlink_to(files[30])
    expected[7][0], expected[11][0] = 18, 31
    assert check_files(length, files) == expected
    assert sorted(calls) == ["11.txt", "7.txt", "9.txt"]


def test_new_files_are_added(files):
    check_files(length, files[:40])
    calls.clear()
    check_files(length, files)
    assert sorted(calls) == sorted(path.name for path in files[40:])
    calls.clear()
    check_files(length, files[:40])
    check_files(length, files[40:])  # of another folder in common, or not: no harm
    assert len(calls) <= 10


def test_what_is_raised_is_not_kept_and_what_else_was_told_is(files):
    files[20].write_bytes(b"")
    for _ in range(2):
        calls.clear()
        with pytest.raises(ValueError, match=r"20\.txt is empty"):
            check_files(length, files)
        assert "20.txt" in calls
    assert "0.txt" not in calls
    files[20].write_bytes(b"mended")
    assert check_files(length, files)[20][0] == 6


def test_the_first_file_that_fails_is_told(files):
    for i in (45, 20, 33):
        files[i].write_bytes(b"")
    for _ in range(5):
        with pytest.raises(ValueError, match=r"20\.txt is empty"):
            check_files(length, files)


def test_another_version_of_the_checks_looks_again(files, monkeypatch):
    check_files(length, files)
    calls.clear()
    monkeypatch.setattr(PIL, "__version__", "another")
    checks._version.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_files(length, files)
    assert len(calls) == len(files)


def test_another_check_looks_itself(files):
    check_files(length, files)
    assert check_files(os.path.basename, files) == [path.name for path in files]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 3}', b"\xff\xfe", b"[" * 10**5])
def test_a_damaged_cache_is_told_once_and_made_anew(files, cache, content):
    expected = check_files(length, files)
    (kept,) = cache.iterdir()
    kept.write_bytes(content)
    calls.clear()
    with pytest.warns(UserWarning, match="is damaged") as told:
        assert check_files(length, files) == expected
    assert len(told) == 1 and len(calls) == len(files)
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_files(length, files) == expected
    assert not calls


def test_entries_that_are_none(files, cache):
    expected = check_files(length, files)
    (kept,) = cache.iterdir()
    content = json.loads(kept.read_text())
    (entries,) = content["files"].values()
    wrong = [None, [], "text", 3, [1, 2], {}]
    entries |= {str(path): entry for path, entry in zip(files, wrong, strict=False)}
    kept.write_text(json.dumps(content))
    assert check_files(length, files) == expected


def test_a_cache_that_cannot_be_written(files, tmp_path, monkeypatch):
    (tmp_path / "blocked").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    with pytest.warns(UserWarning, match="cannot be kept in .*XDG_CACHE_HOME") as told:
        for _ in range(2):
            assert check_files(length, files)[3][0] == 4
    assert len(told) == 1


def test_what_takes_no_time_is_not_kept(files, cache, monkeypatch):
    monkeypatch.setattr(checks, "WORTH", 60.0)
    check_files(length, files)
    assert not cache.exists()


def test_names_that_are_no_text(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9.txt"))
    path.write_bytes(b"abc")
    for _ in range(2):
        assert check_files(os.path.getsize, [path]) == [3]


def test_a_file_that_is_not_there(files):
    with pytest.raises(FileNotFoundError):
        check_files(length, [*files, files[0].parent / "none"])
    assert check_files(length, []) == []


def test_files_are_checked_at_once(files, monkeypatch):
    """Each waits until another one has begun."""
    monkeypatch.setattr(checks, "BUNCH", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    pair = threading.Barrier(2, timeout=30)
    assert check_files(lambda path: pair.wait() < 2, files[:10]) == [True] * 10


def test_threads_find_pillows_readers_loaded():
    code = (
        "from PIL import Image; from e3va.data.checks import check_files\n"
        "print(check_files(lambda path: 'WEBP' in Image.OPEN, ['a.webp']))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[True]\n"


def test_an_image_that_was_replaced_is_seen(tmp_path):
    paths = [write_image(tmp_path / f"{i}.png") for i in range(3)]
    assert check_images(paths) == [(30, 40)] * 3
    write_image(paths[1], 20, 50)
    assert check_images(paths) == [(30, 40), (20, 50), (30, 40)]
    paths[2].write_bytes(paths[2].read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"2\.png is damaged"):
        check_images(paths)


def test_values_of_maps_come_back_from_the_cache(tmp_path):
    root = write_maps(tmp_path / "a", {"train": [[0, 3], [255, 1, 1]]})
    pairs = [(root / f"images/train/{i}.jpg", root / f"annotations/train/{i}.png") for i in (0, 1)]
    assert look(pairs) == look(pairs) == [{0, 3}, {1, 255}]
