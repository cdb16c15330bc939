"""The index: what is found, what is named as broken, labels, cuts."""

import shutil

import numpy as np
import pytest

from lvdm.data.index import Index, IndexRow, build_index, find_cuts
from lvdm.data.reader import iter_frames
from lvdm.data.samples import sample_videos
from lvdm.errors import UserError
from lvdm.media import write_mp4


@pytest.fixture(scope="module")
def samples():
    return build_index(sample_videos())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small real clip, quick to look at."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.mp4"
    frames = iter_frames(sample_videos() / "carphone_pristine.mp4", (64, 48))
    write_mp4(path, [next(frames) for _ in range(12)], 25)
    return path


def test_samples(samples):
    assert [(row.path, row.frames, row.cuts) for row in samples.rows] == [
        ("bigbuckbunny.mp4", 132, []),
        ("bikes.mp4", 250, [30, 76, 137, 187, 242]),
        ("carphone_pristine.mp4", 120, []),
    ]
    assert samples.labels == "file"
    assert samples.classes == ["bigbuckbunny", "bikes", "carphone_pristine"]
    assert samples.rows[1].shots()[-1] == (242, 250)
    assert not samples.broken and not samples.damaged


def test_save_and_load(samples, tmp_path):
    samples.save(tmp_path / "index.jsonl")
    again = Index.load(tmp_path / "index.jsonl")
    assert again == samples and again.hash() == samples.hash()
    assert [p.name for p in tmp_path.iterdir()] == ["index.jsonl"]
    (tmp_path / "other.txt").write_text("{}\n")
    with pytest.raises(UserError, match="not a video index"):
        Index.load(tmp_path / "other.txt")


def test_hash_sees_what_training_sees(tmp_path):
    def index(root="a", **changes):
        return Index(tmp_path / root, "file", [IndexRow(**{"path": "x.mp4", "label": "x", "frames": 9, **changes})])

    assert index().hash() == index(root="b").hash()
    others = [index(**c).hash() for c in ({"path": "y.mp4"}, {"label": "y"}, {"frames": 8}, {"cuts": [4]})]
    assert len({index().hash(), *others}) == 5


def test_single_shots_have_no_cuts(real_data):
    """Fast motion, zooms and shakes of single-shot clips: not one false cut."""
    seen = []
    for folder, count in (("train", 67), ("val", 15)):
        index = build_index(real_data / folder, on_file=lambda done, total: seen.append((done, total)))
        assert len(index.ok) == count
        assert {row.path: row.cuts for row in index.rows if row.cuts} == {}
    assert seen == [(i, 67) for i in range(1, 68)] + [(i, 15) for i in range(1, 16)]


def test_find_cuts_joins_and_flashes():
    clips = [
        np.stack(list(iter_frames(sample_videos() / name, (32, 18)))) for name in ("bikes.mp4", "bigbuckbunny.mp4")
    ]
    a, b = clips[0][30:76], clips[1]
    assert find_cuts(np.concatenate([a[:9], b[:20], a[20:30], b[60:]])) == [9, 29, 39]
    flash = b.copy()
    flash[20], flash[50:52] = 255, 0
    assert find_cuts(flash) == []
    assert find_cuts(b[:1]) == []
    # motion so fast that every frame is another picture
    blocks = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 3), np.uint8)
    assert find_cuts(blocks.repeat(6, 1).repeat(8, 2)) == []


def test_broken_files_are_named(real_data):
    index = build_index(real_data / "broken", labels="none")
    assert {row.path for row in index.broken} == {"empty.mp4", "not_a_video.mp4", "truncated.mp4"}
    assert all(row.reason and row.frames == 0 for row in index.broken)
    [damaged] = index.damaged
    # the file's 41st frame is still held back for reordering when the decoder fails
    assert damaged.path == "bitflips.mp4" and damaged.frames == 40 and "of 149 frames" in damaged.reason
    assert {row.path: row.frames for row in index.ok if not row.reason} == {
        "one_frame.mp4": 1,
        "three_frames.mp4": 3,
        "tiny_16x16.mp4": 32,
    }


def test_nothing_usable(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        build_index(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / ".hidden.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"no video in or below it .*\.mp4"):
        build_index(tmp_path)
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"none of the 1 videos can be read; a\.mp4"):
        build_index(tmp_path)
    with pytest.raises(UserError, match="did you mean 'folder'"):
        build_index(tmp_path, labels="folders")


def test_labels(tiny, tmp_path):
    for name in ("b/2.mp4", "a/1.MP4", "a/deep/3.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny, tmp_path / name)
    index = build_index(tmp_path)
    assert [(row.path, row.label) for row in index.rows] == [
        ("a/1.MP4", "a"),
        ("a/deep/3.mp4", "deep"),
        ("b/2.mp4", "b"),
    ]
    assert build_index(tmp_path / "b").classes == ["2"]
    assert build_index(tmp_path, labels="none").classes == []
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(21):
        shutil.copy(tiny, flat / f"{i}.mp4")
    assert build_index(flat).labels == "none"


def test_ucf101_layout(real_data):
    index = build_index(real_data / "ucf101_mini")
    assert index.labels == "folder" and len(index.classes) == 11 and "Biking" in index.classes
    assert not index.broken and not index.damaged
