"""What the programs that look at a dataset say of it, and what they draw."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lvdm.data.index import Index, IndexRow
from lvdm.data.look import caption, check_main, counted, index_main, preview_main, strip, summary
from lvdm.data.reader import iter_frames, read_frames
from lvdm.data.samples import sample_videos
from lvdm.media import write_mp4


@pytest.fixture(scope="module")
def bikes():
    return sample_videos() / "bikes.mp4"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(bikes, tmp_path, cache):
    """Two classes; the second video of one of them is cut off, and something is no video."""
    frames = list(iter_frames(bikes, (64, 48)))[20:50]  # with a cut at its frame 10
    for name in ("a/1", "b/2", "b/3"):
        path = tmp_path / f"data/{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, frames, 25)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "data" / "a" / "0.mp4").write_text("no video")
    return tmp_path / "data"


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_summary_counts(folder, capsys, tmp_path):
    assert index_main([str(folder), f"out={tmp_path / 'deep' / 'index.jsonl'}"]) == 0
    printed = capsys.readouterr()
    facts = dict(line.split(maxsplit=1) for line in printed.out.splitlines()[:10])
    index = Index.load(tmp_path / "deep" / "index.jsonl")
    frames = sum(row.frames for row in index.ok)
    assert frames > 60 and facts["videos"] == "3" and facts["frames"] == str(frames)
    assert facts["sizes"] == "64x48 (3)" and facts["fps"].startswith("25 (2)") and facts["shots"] == "6"
    assert facts["classes"] == "2 (labels=folder)" and facts["hash"] == index.hash()
    assert facts["broken"].startswith("1: Invalid data") and facts["damaged"].startswith("1: ")
    assert "a/0.mp4: Invalid data" in printed.err and "b/3.mp4: only the first" in printed.err


def test_the_summary_of_clips():
    rows = [IndexRow("a.mp4", None, 7500, 25.0, 8, 8, cuts=[100], start=0, end=4500), IndexRow("b.mp4", None, 4500, 25)]
    facts = dict(line.split(maxsplit=1) for line in summary(Index("x", "none", rows)).splitlines())
    assert (facts["hours"], facts["frames"], facts["shots"]) == ("0.10", "9,000", "3")
    assert counted("aabcdefgg", 2) == "a (2), g (2), 5 others" and counted("aab") == "a (2), b (1)"


def test_check_names_every_bad_file_and_exits_with_1(folder, capsys):
    assert check_main([str(folder)]) == 1
    broken, damaged, last = lines(capsys)
    assert broken.startswith("a/0.mp4: Invalid data") and damaged.startswith("b/3.mp4: only the first ")
    assert last.startswith("4 files, ") and last.endswith(" frames decoded: 1 broken, 1 damaged")
    for name in ("a/0.mp4", "b/3.mp4"):
        (folder / name).unlink()
    assert check_main([str(folder)]) == 0
    assert lines(capsys) == ["2 files, 60 frames decoded: 0 broken, 0 damaged"]
    assert not (folder.parent / "cache").exists()


def test_check_of_files_broken_in_the_wild(real_data, capsys):
    assert check_main([str(real_data / "broken")]) == 1
    *named, last = lines(capsys)
    assert [line.partition(":")[0] for line in named] == [
        "bitflips.mp4",
        "empty.mp4",
        "not_a_video.mp4",
        "truncated.mp4",
    ]
    assert last == "7 files, 76 frames decoded: 3 broken, 1 damaged"


def test_the_preview_shows_frames_and_where_shots_begin(folder, capsys, tmp_path):
    out = tmp_path / "deep" / "preview.png"
    assert preview_main([str(folder), f"out={out}", "columns=6", "size=48"]) == 0
    assert lines(capsys) == [f"3 of 3 videos in {out}"]
    sheet = np.asarray(Image.open(out)).astype(int)
    assert sheet.shape == (3 * (16 + 48), 6 * 64, 3)
    red = (sheet == [255, 0, 0]).all(2)
    assert red[16:64].all(0).nonzero()[0].tolist() == [2 * 64, 2 * 64 + 1]  # frames 0 6 | 12 17 23 29
    frames = read_frames(folder / "a" / "1.mp4", [0, 6, 12]).numpy()
    assert (sheet[16:64, :128] == np.concatenate(list(frames[:2]), 1)).all()
    assert (sheet[16:64, 130:192] == frames[2][:, 2:]).all()
    assert (sheet[:16] < 128).all(2).sum() > 50 and not red[:16].any()


def test_a_preview_of_classes_and_of_a_clip(folder, bikes, capsys, tmp_path):
    out = tmp_path / "preview.png"
    assert preview_main([str(folder), f"out={out}", "per_class=true"]) == 0
    assert lines(capsys) == [f"2 of 3 videos in {out}"]
    assert preview_main([str(folder), f"out={out}", "count=1"]) == 0
    assert lines(capsys) == [f"1 of 3 videos in {out}"]
    assert preview_main([str(folder), f"out={out}", "per_class=true", "labels=none"]) == 2
    assert "error: per_class=true: the videos of" in capsys.readouterr().err

    row = IndexRow("bikes.mp4", "city", 250, 25.0, 640, 272, cuts=[30, 76], start=40, end=80)
    pictures = strip(bikes.parent, row, 3, 272)
    assert pictures.shape == (3, 272, 640, 3) and pictures.dtype == torch.uint8
    expected = read_frames(bikes, [40, 60, 79])
    assert torch.equal(pictures[:2], expected[:2])
    assert torch.equal(pictures[2, :, 11:], expected[2, :, 11:]) and (pictures[2, :, :11, 0] == 255).all()
    assert caption(row) == "city, bikes.mp4, 40 frames, 640x272, 1.6 s, 25 fps, 2 shots"
    assert strip(bikes.parent, row, 100, 16).shape[0] == 40


def test_keys_need_no_torch_and_are_checked():
    code = (
        "import sys, json, lvdm.data.configs as c; from lvdm.config import parse; from lvdm.errors import UserError\n"
        "config, flags = parse(c.PreviewVideos, ['folder', 'count=3'])\n"
        "assert not {'torch', 'numpy', 'av'} & set(sys.modules)\n"
        "print(json.dumps([config.videos, config.count, config.out]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["folder", 3, "preview.png"]
    for main, word in ((index_main, "workers=-1"), (check_main, "workers=-1"), (preview_main, "columns=0")):
        assert main(["folder", word]) == 2
        assert main([]) == 2  # no folder
