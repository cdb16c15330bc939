"""The index: what is found, what is named as broken, labels; what is looked at again, and what a dead process costs."""

import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvdm.data import index as module
from lvdm.data.index import Index, IndexRow, build_index, open_index
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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture
def folder(tmp_path, tiny):
    """Twenty videos in two classes."""
    for i in range(20):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:02}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny, path)
    return tmp_path / "data"


@pytest.fixture
def looked(tmp_path, monkeypatch):
    """`looked()` are the files that were looked at since it was called last, by whatever process."""
    log, real = tmp_path / "log", module.look

    def look(root, path, *rest):
        with open(log, "a") as file:
            file.write(f"{path}\n")
        return real(root, path, *rest)

    def read():
        paths = sorted(log.read_text().splitlines()) if log.exists() else []
        log.unlink(missing_ok=True)
        return paths

    monkeypatch.setattr(module, "look", look)
    return read


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
    clips = [index(start=2), index(end=8), index(start=2, end=8), index(caption="a cat"), index(start=2, caption="a")]
    assert len({index().hash(), *(clip.hash() for clip in clips)}) == 6
    numbered = Index(tmp_path, "file", index().rows, ["y", "x"])
    assert numbered.hash() != index().hash() == Index(tmp_path, "file", index().rows, ["x"]).hash()


def test_the_hash_of_a_folder_stays(samples, tiny, tmp_path):
    """Runs are bound to it."""
    assert samples.hash() == "6f90afee91f1df1d"
    for name in ("b/2.mp4", "a/1.MP4", "a/deep/3.mp4", "a-b/4.mp4", "a b/5.mp4", "a.c/6.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny, tmp_path / name)
    (tmp_path / "a" / "bad.mp4").write_text("x")
    assert build_index(tmp_path).hash() == "67ee4f9d141c72a3"
    assert build_index(tmp_path, labels="none").hash() == "1ae545e12b55b5c2"
    assert build_index(tmp_path / "a").hash() == "fa7f76b78a915d86"


def test_single_shots_have_no_cuts(real_data):
    """Fast motion, zooms and shakes of single-shot clips: not one false cut."""
    seen = []
    for folder, count in (("train", 67), ("val", 15)):
        index = build_index(real_data / folder, on_file=lambda done, total: seen.append((done, total)))
        assert len(index.ok) == count
        assert {row.path: row.cuts for row in index.rows if row.cuts} == {}
    assert seen == [(i, 67) for i in range(1, 68)] + [(i, 15) for i in range(1, 16)]


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
    with pytest.raises(UserError, match="missing: expected a folder of videos"):
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


# ---------------------------------------------------------------------------------------------------------------------
# Lists and official classes


def test_clips_of_a_list_lie_in_their_file(samples, tmp_path, cache, looked, capsys):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(samples.root / "bikes.mp4", data / "bikes.mp4")
    rows = ["1.0,4.0,street,bikes", "9.9,20,street,", "4,,bridge,a bridge", "11,12,street,nothing", "3.99,4.01,street,"]
    (data / "list.csv").write_text("path,start,end,label,caption\n" + "".join(f"bikes.mp4,{r}\n" for r in rows))
    index = open_index(data / "list.csv")
    assert looked() == ["bikes.mp4"]  # once, for five clips
    seen = {(row.start, row.end): row for row in index.ok}
    assert set(seen) == {(25, 100), (248, 250), (100, 250)}
    assert seen[25, 100].shots() == [(25, 30), (30, 76), (76, 100)] and seen[25, 100].length == 75
    assert (seen[100, 250].label, seen[100, 250].caption, seen[25, 100].caption) == ("bridge", "a bridge", "bikes")
    assert {row.frames for row in index.ok} == {250}
    reasons = sorted(row.reason for row in index.broken)
    assert reasons == [
        "no frame from 11 s to 12 s: the file has 250 at 25 fps",
        "no frame from 3.99 s to 4.01 s: the file has 250 at 25 fps",
    ]
    assert "2 of 5 videos are broken and left out" in capsys.readouterr().err
    whole = open_index(data, labels="none")
    assert looked() == [] and [(row.path, row.shots()[0]) for row in whole.rows] == [("bikes.mp4", (0, 30))]


def test_official_classes_keep_their_numbers(tmp_path, tiny, cache, capsys):
    (tmp_path / "ucfTrainTestlist").mkdir()
    (tmp_path / "ucfTrainTestlist" / "classInd.txt").write_text("1 Hammering\n2 HammerThrow\n3 Biking\n4 Archery\n")
    for name in ("HammerThrow/v_HammerThrow_g01_c01.avi", "Biking/v_Biking_g01_c01.avi"):
        (tmp_path / "UCF-101" / name).parent.mkdir(parents=True)
        shutil.copy(tiny, tmp_path / "UCF-101" / name)
    (tmp_path / "UCF-101" / "Archery").mkdir()
    (tmp_path / "UCF-101" / "Archery" / "v_Archery_g01_c01.avi").write_text("no video")
    index = open_index(tmp_path)
    assert index.classes == ["Hammering", "HammerThrow", "Biking", "Archery"]
    assert index.empty_classes == ["Hammering", "Archery"]
    assert "2 of 4 classes have no usable video and keep their number: Hammering, Archery" in capsys.readouterr().err
    index.save(tmp_path / "saved.jsonl")
    assert Index.load(tmp_path / "saved.jsonl") == index
    assert open_index(tmp_path, labels="none").classes == []


# ---------------------------------------------------------------------------------------------------------------------
# What is looked at again


def test_only_what_changes_is_looked_at_again(folder, tiny, cache, looked):
    everything = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))
    first = open_index(folder)
    assert looked() == everything and [row.path for row in first.rows] == everything
    assert open_index(folder) == first and open_index(folder, labels="none").classes == []
    assert looked() == []
    os.utime(folder / "a" / "04.mp4", ns=(1, 1))  # the same size
    assert open_index(folder) == first and looked() == ["a/04.mp4"]
    with open(folder / "b" / "05.mp4", "r+b") as file:
        file.truncate(900)
    assert [row.path for row in open_index(folder).broken] == ["b/05.mp4"] and looked() == ["b/05.mp4"]
    shutil.copy(tiny, folder / "b" / "new.mp4")
    os.remove(folder / "a" / "02.mp4")
    paths = [row.path for row in open_index(folder).rows]
    assert looked() == ["b/new.mp4"] and set(paths) ^ set(everything) == {"b/new.mp4", "a/02.mp4"}
    [kept] = cache.iterdir()
    assert "a/02.mp4" not in kept.read_text() and kept.read_text().count("b/05.mp4") == 1
    assert open_index(folder) == build_index(folder)
    looked()
    open_index(folder, again=True)
    assert looked() == paths


def test_a_folder_of_frames_is_looked_at_again_when_a_frame_changes(tmp_path, cache, looked):
    for k in range(2):
        (tmp_path / f"data/{k}").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((16, 24, 3), 40 * i, np.uint8)).save(tmp_path / f"data/{k}/frame_{i}.png")
    index = open_index(tmp_path / "data")
    assert looked() == ["0", "1"] and [(row.frames, row.width, row.height) for row in index.rows] == [(3, 24, 16)] * 2
    os.utime(tmp_path / "data/1/frame_1.png", ns=(1, 1))
    open_index(tmp_path / "data")
    assert looked() == ["1"]
    os.remove(tmp_path / "data/0/frame_2.png")
    assert [row.frames for row in open_index(tmp_path / "data").rows] == [2, 3] and looked() == ["0"]


def test_a_subset_does_not_forget_the_rest(tmp_path, tiny, cache, looked):
    for name in ("sky_train/a/a_1", "sky_test/b/b_1"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(tmp_path / name / "frame_1.jpg")
    for subset, fresh in (("train", 1), ("test", 1), ("all", 0), ("train", 0)):
        open_index(tmp_path, subset=subset)
        assert len(looked()) == fresh


def test_nothing_is_written_beside_the_videos(folder, cache, looked, tmp_path):
    before = sorted(folder.rglob("*"))
    open_index(folder, cache=tmp_path / "elsewhere")
    assert sorted(folder.rglob("*")) == before and len(looked()) == 20
    assert [path.name.startswith("data-") for path in (tmp_path / "elsewhere").iterdir()] == [True]
    assert not cache.exists()
    open_index(folder, cache=tmp_path / "elsewhere")
    assert looked() == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot keep the index: "):
        open_index(folder, cache=tmp_path / "file")


def test_damaged_lines_of_the_cache_cost_their_files_only(folder, cache, looked):
    first = open_index(folder)
    looked()
    [kept] = cache.iterdir()
    lines = kept.read_text().splitlines(keepends=True)
    paths = [next(row.path for row in first.rows if f'"{row.path}"' in line) for line in lines]
    lines[3] = lines[3][:40] + "\n"
    lines[7] = lines[7].replace("frames", "shapes")
    lines[9] = "[1, 2]\n"
    lines[-1] = lines[-1][:-20]
    kept.write_bytes("".join(lines).encode() + b'\xff\xfe\nnull\n{"stamp": 1}\n')
    assert open_index(folder) == first
    assert looked() == sorted([paths[3], paths[7], paths[9], paths[-1]])


def _runs(process: str) -> bool:
    """Whether there is such a process, and it is no zombie."""
    status = Path("/proc", process, "stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_build_goes_on(folder, cache, looked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "SAVE_EVERY", 0.0)
        real = module.look
        workers = folder.parent / "workers"

        def look(*args):
            time.sleep(0.1)
            with open(workers, "a") as file:
                file.write(f"{os.getpid()}\n")
            return real(*args)

        patch.setattr(module, "look", look)
        build = multiprocessing.get_context("fork").Process(target=open_index, args=(folder,))
        build.start()
        while not (cache.exists() and any(path.read_bytes().count(b"\n") > 6 for path in cache.glob("*.jsonl"))):
            assert build.is_alive()
            time.sleep(0.02)
        os.kill(build.pid, signal.SIGKILL)
        build.join()
        started = time.monotonic()
        while any(map(_runs, set(workers.read_text().split()))):  # its workers find out
            assert time.monotonic() - started < 10
            time.sleep(0.02)
    before = looked()
    index = open_index(folder)
    after = looked()
    assert 1 <= len(after) <= 13 and len(before) < 20
    assert set(before) | set(after) == {row.path for row in index.rows}
    assert index == build_index(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Files that bring down who looks at them


def test_a_worker_that_dies_costs_one_row(folder, cache, monkeypatch, capsys):
    real = module.look

    def look(root, path, alive, full):
        if path == "a/04.mp4":
            os._exit(3)
        if path == "b/11.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        if path == "a/08.mp4":
            time.sleep(60)
        for _ in range(4 * (path == "b/07.mp4")):  # slow, and not silent
            time.sleep(0.6)
            alive()
        return real(root, path, alive, full)

    monkeypatch.setattr(module, "look", look)
    monkeypatch.setattr(module, "SILENCE", 1.5)
    started = time.monotonic()
    index = open_index(folder, workers=3)
    assert time.monotonic() - started < 10
    assert {row.path: row.reason for row in index.broken} == {
        "a/04.mp4": "the process that decoded it died (exit code 3)",
        "a/08.mp4": "no new frame in 1.5 s",
        "b/11.mp4": "the process that decoded it died (SIGKILL)",
    }
    assert len(index.ok) == 17 and not index.damaged
    assert "a/04.mp4: the process that decoded it died" in capsys.readouterr().err
    assert not multiprocessing.active_children()


def test_whatever_a_decoder_raises_is_a_reason(folder, cache, monkeypatch):
    def probe(path):
        if path.name == "04.mp4":
            raise MemoryError("too large")
        return real(path)

    real = module.probe
    monkeypatch.setattr(module, "probe", probe)
    assert [(row.path, row.reason) for row in open_index(folder).broken] == [("a/04.mp4", "MemoryError: too large")]


def test_workers_make_no_difference(folder):
    (folder / "a" / "bad.mp4").write_text("no video")
    one, five = build_index(folder, workers=1), build_index(folder, workers=5)
    assert one == five and len(one.broken) == 1


def test_bad_files_are_named_once_and_not_without_end(folder, tiny, cache, capsys):
    for i in range(30):
        (folder / f"{i}.mp4").write_text("no video")
    open_index(folder)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("index data")]
    assert len(lines) == 22 and lines[20].startswith("... and 10 more files; lvdm data index ")
    assert lines[21] == "30 of 50 videos are broken and left out"
    assert Counter(line.partition(": ")[2] for line in lines[:20])["Invalid data found when processing input"] == 20
    open_index(folder)
    assert capsys.readouterr().err == ""
