"""Text files in the encodings that people's tools write."""

import time

import pytest

from e3va.data.text import LARGEST_YAML, load_yaml, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Kätzchen\r\n".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "Kätzchen\r\n"


@pytest.mark.parametrize("content", ["Kätzchen".encode("latin-1"), b"\xff\xfea", b"\xff\xd8\xff"])
def test_other_encodings_are_named(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt is no text in UTF-8"):
        read_text(tmp_path / "a.txt")


def test_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("none.txt", "folder"):
        with pytest.raises(FileNotFoundError, match=rf"no file at .*{name}"):
            read_text(tmp_path / name)


def test_a_yaml_file_that_no_person_has_written_is_refused_at_once(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text("names: [" + "a," * LARGEST_YAML + "]")
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"data\.yaml has \d+ characters: too large"):
        load_yaml(path)
    assert time.perf_counter() - began < 5
