import pytest

from lvdm.files import replacing, write_text


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
