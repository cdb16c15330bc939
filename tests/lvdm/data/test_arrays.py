"""Videos as .npy files: frames as they are, mapped and not unpickled; what is no video is named."""

import json
import pickle
import re

import numpy as np
import pytest
import torch

from lvdm.data.arrays import rate_of
from lvdm.data.clips import ClipPolicy, Clips
from lvdm.data.frames import FPS, VideoInfo
from lvdm.data.index import build_index, open_index
from lvdm.data.reader import Unreadable, iter_frames, probe, read_frames
from lvdm.media import write_video


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_frames_are_those_of_the_array(tmp_path):
    video = noise(9, 24, 40, 3)
    write_video(tmp_path / "a.npy", video, 24)
    assert probe(tmp_path / "a.npy") == VideoInfo(9, FPS, 40, 24, False)
    assert np.array_equal(np.stack(list(iter_frames(tmp_path / "a.npy"))), video)
    found = read_frames(tmp_path / "a.npy", [8, 0, 3, 3])
    assert found.dtype == torch.uint8 and torch.equal(found, torch.from_numpy(video[[8, 0, 3, 3]]))
    small = np.stack(list(iter_frames(tmp_path / "a.npy", (10, 6))))
    exact = video.reshape(9, 6, 4, 10, 4, 3).mean((2, 4))
    assert small.shape == (9, 6, 10, 3) and abs(small - exact).max() <= 1
    with pytest.raises(Unreadable, match="frames 0 to 9 asked of a video of 9 frames"):
        read_frames(tmp_path / "a.npy", [0, 9])


def test_the_rate_is_that_of_the_json_beside_it(tmp_path):
    np.save(tmp_path / "a.npy", noise(2, 8, 8, 3))
    assert rate_of(tmp_path / "a.npy") is None
    (tmp_path / "a.json").write_text(json.dumps({"fps": 29.97}))
    assert probe(tmp_path / "a.npy").fps == rate_of(tmp_path / "a.npy") == 29.97
    for nonsense in ("{}", "[]", "fps", '{"fps": 0}', '{"fps": "nan"}'):
        (tmp_path / "a.json").write_text(nonsense)
        with pytest.raises(Unreadable, match=r"a\.json beside it"):
            probe(tmp_path / "a.npy")


def test_a_rate_that_changes_is_seen_by_the_index(tmp_path):
    np.save(tmp_path / "a.npy", noise(2, 8, 8, 3))
    rates = []
    for write in (lambda: None, lambda: (tmp_path / "a.json").write_text('{"fps": 50}'), (tmp_path / "a.json").unlink):
        write()
        rates.append(open_index(tmp_path, cache=tmp_path / "index", workers=1).ok[0].fps)
    assert rates == [FPS, 50, FPS]


def test_an_index_finds_arrays_and_clips_come_out_of_them(tmp_path):
    video = noise(12, 16, 24, 3)
    write_video(tmp_path / "a.npy", video, 24)
    np.save(tmp_path / "b.npy", video.astype(np.float32))
    index = build_index(tmp_path, workers=1)
    assert [(row.path, row.state, row.frames) for row in index.rows] == [("a.npy", "ok", 12), ("b.npy", "broken", 0)]
    clips = Clips(index, ClipPolicy(4, 2, 16, split="all", across_cuts=True), seed=0)
    clip = clips.read(clips.grid(1)[0])
    expected = video[clip.start : clip.start + 7 : 2, :, 4:20].transpose(3, 0, 1, 2)
    assert np.array_equal(clip.video.numpy(), expected)


class Bomb:
    def __reduce__(self):
        return print, ("unpickled",)


WRONG = {
    "floats": (np.zeros((2, 8, 8, 3), np.float32), "it holds float32 (2, 8, 8, 3)"),
    "nan": (np.full((2, 8, 8, 3), np.nan, np.float32), "NaN or infinity among it"),
    "infinity in a row": (np.array([0, 1, -np.inf]), "it holds float64 (3,), NaN or infinity among it"),
    "a row": (np.zeros(0), "it holds float64 (0,)"),
    "grey": (noise(2, 8, 8), "it holds uint8 (2, 8, 8)"),
    "alpha": (noise(2, 8, 8, 4), "it holds uint8 (2, 8, 8, 4)"),
    "empty": (noise(0, 8, 8, 3), "holds no frame"),
    "objects": (np.array([Bomb()], dtype=object), "cannot be loaded|can't be memory-mapped|Python objects"),
}


@pytest.mark.parametrize("array, reason", WRONG.values(), ids=WRONG)
def test_what_is_no_video_is_named_with_the_reason(array, reason, tmp_path, capsys):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(Unreadable, match=f"a.npy: .*({reason if '|' in reason else re.escape(reason)})"):
        probe(tmp_path / "a.npy")
    assert "unpickled" not in capsys.readouterr().out


def test_files_that_are_cut_short_or_pickles_are_unreadable(tmp_path, capsys):
    np.save(tmp_path / "a.npy", noise(4, 8, 8, 3))
    whole = (tmp_path / "a.npy").read_bytes()
    for damaged in (b"", whole[:5], whole[:60], whole[:-1], pickle.dumps(Bomb()), b"not numpy at all"):
        (tmp_path / "a.npy").write_bytes(damaged)
        with pytest.raises(Unreadable, match=r"a\.npy: not an array of numbers that can be mapped"):
            probe(tmp_path / "a.npy")
    assert "unpickled" not in capsys.readouterr().out
