import hashlib
import os

import pytest

from lvdm.metrics import content
from lvdm.metrics.content import content_of, contents_of


def test_a_file_is_its_sha256_whatever_its_name_and_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"frames")
    os.utime(tmp_path / "b", (1.7e9, 1.7e9))
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b") == hashlib.sha256(b"frames").hexdigest()


def test_a_change_that_leaves_size_and_time_alone_is_seen(tmp_path):
    path, before = tmp_path / "a", []
    for data in (b"one", b"two"):
        path.write_bytes(data)
        os.utime(path, (1.7e9, 1.7e9))
        before.append(content_of(path))
    assert before[0] != before[1]


def test_a_folder_is_its_files_in_order(tmp_path):
    for folder, files in (("a", ("1", "2")), ("b", ("2", "1")), ("c", ("1", "2")), ("d", ("1",))):
        (tmp_path / folder).mkdir()
        for name, data in zip(("x.png", "y.png"), files, strict=False):
            (tmp_path / folder / name).write_text(data)
    found = [content_of(tmp_path / name) for name in "abcd"]
    assert found[0] == found[2] and len({*found}) == 3


def test_each_file_is_read_once(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}" for i in range(20)]
    for i, path in enumerate(paths):
        path.write_text(f"{i}")
    found = contents_of(paths + paths)
    assert list(found) == paths and found[paths[7]] == hashlib.sha256(b"7").hexdigest()
    monkeypatch.setattr(content.hashlib, "file_digest", None)
    assert contents_of(paths) == found
    with pytest.raises(FileNotFoundError):
        content_of(tmp_path / "none")
