from collections.abc import Callable

import pytest
import torch

from lvdm.errors import UserError
from lvdm.metrics.cache import load_features, save_features
from lvdm.metrics.sets import FeatureSet

KEY = {"videos": "ab12", "preset": {"frames": 16, "stride": 3}, "weights": "cd34"}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path))
    return tmp_path / "features"


class Maker:
    """Counts how often features are made."""

    def __init__(self):
        self.made = 0

    def __call__(self) -> FeatureSet:
        self.made += 1
        return FeatureSet(torch.full((2, 3), float(self.made)), torch.arange(2), ["a.mp4", 'b "é".mp4'])


def cached_features(key: dict, make: Callable[[], FeatureSet]) -> FeatureSet:
    """What is kept under the key, made and kept where there is nothing."""
    found = load_features(key)
    if found is None:
        save_features(key, found := make())
    return found


def same(a: FeatureSet, b: FeatureSet) -> bool:
    return torch.equal(a.features, b.features) and torch.equal(a.clips, b.clips) and a.sources == b.sources


def test_features_are_made_once_for_a_key_whatever_its_order(folder):
    make = Maker()
    first = cached_features(KEY, make)
    assert same(cached_features(dict(reversed(KEY.items())), make), first)
    assert make.made == 1 and [path.suffix for path in folder.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "change", [{"videos": "ab13"}, {"preset": {"frames": 16, "stride": 1}}, {"weights": None}, {"more": 0}]
)
def test_anything_else_in_the_key_is_another_entry(change):
    make = Maker()
    first = cached_features(KEY, make)
    assert not same(cached_features(KEY | change, make), first) and make.made == 2
    assert same(cached_features(KEY, make), first) and make.made == 2


def flipped(data: bytes) -> bytes:
    """One bit of the last number, of the clips or features."""
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"not safetensors", lambda data: data[:-1], flipped])
def test_a_damaged_file_is_made_anew_with_a_warning(folder, capsys, damage):
    make = Maker()
    cached_features(KEY, make)
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cached_features(KEY, make).features[0, 0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: damaged features") and line.endswith("made anew")
    assert cached_features(KEY, make).features[0, 0] == 2 and make.made == 2


def test_a_file_never_serves_another_key(folder, capsys):
    make = Maker()
    cached_features(KEY, make)
    (first,) = folder.iterdir()
    cached_features(KEY | {"videos": "other"}, make)
    (other,) = set(folder.iterdir()) - {first}
    other.write_bytes(first.read_bytes())  # as if two keys had one hash
    assert cached_features(KEY | {"videos": "other"}, make).features[0, 0] == 3
    assert "of another key" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_a_user_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set LVDM_CACHE"):
        cached_features(KEY, Maker())
