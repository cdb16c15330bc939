import pytest

from lvdm.files import remove_parts, replacing, write_text


def test_a_file_changes_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "before")
    with pytest.raises(KeyError), replacing(path) as part:
        part.write_text("half of wh")
        raise KeyError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as part:
        part.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    parts = []
    for name in ("a.npy", "b"):
        with pytest.raises(FileNotFoundError), replacing(tmp_path / name) as part:
            parts.append(part)  # never written
    others = {tmp_path / name for name in ("a.npy", ".hidden", "my.part")}
    for path in (*parts, *others):
        path.touch()
    remove_parts(tmp_path)
    assert len(parts) == 2 and set(tmp_path.iterdir()) == others
    remove_parts(tmp_path / "not there")
