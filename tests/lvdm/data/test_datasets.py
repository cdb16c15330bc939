"""What datasets are made of: folders of anything, UCF101, SkyTimelapse, lists; and what is wrong with them."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lvdm.data import datasets
from lvdm.data.datasets import Dataset, Entry, is_sequence, open_dataset, read_sky, read_ucf101
from lvdm.errors import UserError


@pytest.fixture(autouse=True)
def _say_again():
    """Each test hears what a process says once."""
    datasets._say.cache_clear()


def tree(root: Path, *names: str) -> Path:
    """Empty files: names are all that datasets look at."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def frames(folder: str, count: int, name: str = "x_frames_{:08}.jpg") -> list[str]:
    return [f"{folder}/{name.format(i)}" for i in range(count)]


def found(dataset: Dataset) -> dict[str, str | None]:
    return {entry.path: entry.label for entry in dataset.entries}


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_videos_anywhere_below(tmp_path):
    tree(tmp_path, "b/2.mp4", "a/1.MP4", "a/deep/3.webm", "a/notes.txt", ".hidden/4.mp4", "a/._1.mp4", "a/5.mp4.part")
    dataset = open_dataset(tmp_path)
    assert (dataset.kind, dataset.labels, dataset.classes) == ("folder", "folder", None)
    assert list(found(dataset).items()) == [("a/1.MP4", "a"), ("a/deep/3.webm", "deep"), ("b/2.mp4", "b")]
    assert found(open_dataset(tmp_path, "file"))["a/1.MP4"] == "1"
    assert set(found(open_dataset(tmp_path, "none")).values()) == {None}
    assert found(open_dataset(tmp_path / "b")) == {"2.mp4": "2"}
    assert found(open_dataset(tmp_path / "b", "folder")) == {"2.mp4": "b"}
    assert open_dataset(tree(tmp_path / "flat", *(f"{i}.mp4" for i in range(21)))).labels == "none"


def test_paths_are_sorted_as_folders_are(tmp_path):
    tree(tmp_path, "a/z.mp4", "a-b/y.mp4", "a.mp4")
    assert list(found(open_dataset(tmp_path))) == ["a/z.mp4", "a-b/y.mp4", "a.mp4"]


def test_folders_of_frames_and_loose_images(tmp_path, capsys):
    tree(
        tmp_path, *frames("sky/one", 3), *frames("sky/two", 9, "{}.png"), "sky/three/only.jpg", "cat/1.jpg", "cat/z.jpg"
    )
    tree(tmp_path, "mixed/a.mp4", "mixed/a.jpg", "loose.jpg", "sky/one/readme.txt")
    assert found(open_dataset(tmp_path)) == {
        "cat/1.jpg": "cat",
        "cat/z.jpg": "cat",
        "loose.jpg": tmp_path.name,
        "mixed/a.mp4": "mixed",
        "sky/one": "sky",
        "sky/three/only.jpg": "three",
        "sky/two": "sky",
    }
    assert capsys.readouterr().err == f"{tmp_path}: images beside videos, left out: 1 (mixed/a.jpg)\n"
    # a folder that is given is no video itself
    assert len(open_dataset(tmp_path / "sky" / "two").entries) == 9


@pytest.mark.parametrize(
    "names, expected",
    [
        (["f_8.jpg", "f_10.jpg", "f_9.jpg"], True),
        (["f_0.jpg", "f_10.jpg", "f_20.jpg", "f_40.jpg"], True),  # every tenth, one is missing
        (["n01_26.jpg", "n01_9712.jpg", "n01_18.jpg"], False),  # numbers, but not in a row
        (["a_1.jpg", "b_2.jpg"], False),
        (["f_1.jpg", "f_1.png"], False),
        (["f_01.jpg", "f_1.jpg"], False),
        (["f_1.jpg", "f.jpg"], False),
        (["f_1.jpg"], False),
    ],
)
def test_what_is_a_sequence(names, expected):
    assert is_sequence(names) is expected


def test_empty_classes_are_named_once(tmp_path, capsys):
    tree(tmp_path, "a/1.mp4", "b/2.mp4")
    for name in "cdefghi":
        (tmp_path / name).mkdir()
    open_dataset(tmp_path)
    open_dataset(tmp_path)
    told = capsys.readouterr().err
    assert told == f"{tmp_path}: empty classes, with no video or image: 7 (c, d, e, f, g, ...)\n"


@pytest.mark.parametrize(
    "videos, labels, subset, message",
    [
        ("missing", "auto", "all", "expected a folder of videos, UCF101, SkyTimelapse or a .csv .jsonl .parquet list"),
        ("", "auto", "all", "videos=: expected a folder"),
        ("a/1.mp4", "auto", "all", "expected a folder"),
        ("a", "folders", "all", "did you mean 'folder'"),
        ("a", "auto", "train01", "a folder without splits, expected all"),
        ("empty", "auto", "all", r"no video in or below it .*\.mp4"),
        ("sky", "auto", "train01", "is SkyTimelapse, expected all, train, test"),
        ("ucf", "auto", "train", "is UCF101, expected all, train01"),
    ],
)
def test_what_cannot_be_opened(tmp_path, videos, labels, subset, message):
    tree(tmp_path, "a/1.mp4", "empty/readme.txt", "sky/sky_test/a/a_1/0.jpg", "ucf/UCF-101/A/v_A_g01_c01.avi")
    with pytest.raises(UserError, match=message) as raised:
        open_dataset(str(tmp_path / videos) if videos else "", labels, subset)
    assert "\n" not in str(raised.value)


def test_a_dataset_is_found_by_its_name(tmp_path, monkeypatch):
    data = tree(tmp_path / "data", "UCF-101/UCF-101/A/v_A_g01_c01.avi", "sky_timelapse/sky_test/a/a_1/0.jpg")
    tree(data, "My_Clips/1.mp4", "my-clips/2.mp4", "deep/val/3.mp4")
    monkeypatch.setenv("LVDM_DATA", str(data))
    for name, folder in (("ucf101", "UCF-101"), ("sky", "sky_timelapse"), ("SkyTimelapse", "sky_timelapse")):
        assert open_dataset(name).root == data / folder
    assert open_dataset("sky").kind == "sky" and open_dataset("ucf101", subset="all").kind == "ucf101"
    assert (open_dataset("my-clips").root, open_dataset("deep/val").root) == (data / "my-clips", data / "deep/val")
    with pytest.raises(UserError, match=r"videos=myclips: may be any of .*/My_Clips, .*/my-clips: give the path"):
        open_dataset("myclips")
    with pytest.raises(UserError, match=rf"videos=ucf: .*, or the name of one in the folder LVDM_DATA \({data}\)"):
        open_dataset("ucf")
    monkeypatch.chdir(tree(tmp_path / "here", "sky/4.mp4").parent / "here")
    assert open_dataset("sky").root == tmp_path / "here" / "sky"  # a path that exists wins
    monkeypatch.delenv("LVDM_DATA")
    with pytest.raises(UserError, match=r"LVDM_DATA \(not set\)"):
        open_dataset("ucf101")


# ---------------------------------------------------------------------------------------------------------------------
# UCF101


@pytest.fixture
def ucf(tmp_path) -> Path:
    """Four classes, of which one is the trap of spelling and one is empty."""
    lists = {
        "classInd.txt": "1 Hammering\n2 HammerThrow\n3 HandstandPushups\n4 YoYo\n",
        "trainlist01.txt": "HammerThrow/v_HammerThrow_g08_c01.avi 2\r\n"
        "HandstandPushups/v_HandStandPushups_g08_c01.avi 3\r\n",
        "testlist01.txt": "Hammering/v_Hammering_g01_c01.avi\nHandstandPushups/v_HandStandPushups_g01_c01.avi\n\n",
    }
    (tmp_path / "ucfTrainTestlist").mkdir()
    for name, text in lists.items():
        (tmp_path / "ucfTrainTestlist" / name).write_text(text, newline="")
    videos = ("HammerThrow_g08_c01", "Hammering_g01_c01", "HandStandPushups_g01_c01", "HandStandPushups_g08_c01")
    folders = ("HammerThrow", "Hammering", "HandstandPushups", "HandstandPushups")
    return tree(tmp_path, *(f"UCF-101/{f}/v_{v}.avi" for f, v in zip(folders, videos, strict=True)))


def test_ucf101_classes_are_folders_in_official_order(ucf):
    dataset = open_dataset(ucf)
    assert (dataset.kind, dataset.labels, dataset.root) == ("ucf101", "folder", ucf.resolve())
    # sorted() would have HammerThrow first
    assert dataset.classes == ["Hammering", "HammerThrow", "HandstandPushups", "YoYo"]
    assert found(dataset) == {
        "UCF-101/HammerThrow/v_HammerThrow_g08_c01.avi": "HammerThrow",
        "UCF-101/Hammering/v_Hammering_g01_c01.avi": "Hammering",
        "UCF-101/HandstandPushups/v_HandStandPushups_g01_c01.avi": "HandstandPushups",
        "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi": "HandstandPushups",
    }
    unlabelled = open_dataset(ucf, "none")
    assert set(found(unlabelled).values()) == {None} and unlabelled.classes is None


def test_ucf101_splits(ucf):
    train, test = open_dataset(ucf, subset="train01"), open_dataset(ucf, subset="test01")
    assert [Path(path).name for path in found(train)] == ["v_HammerThrow_g08_c01.avi", "v_HandStandPushups_g08_c01.avi"]
    assert [Path(path).name for path in found(test)] == ["v_Hammering_g01_c01.avi", "v_HandStandPushups_g01_c01.avi"]
    assert train.classes == test.classes == open_dataset(ucf).classes
    with pytest.raises(UserError, match=r"trainlist02\.txt: no such file; lvdm data ucf101 .*download=true"):
        open_dataset(ucf, subset="train02")


@pytest.mark.parametrize(
    "folder, file", [("HandStandPushups", "HandStandPushups"), ("HandstandPushups", "HandstandPushups")]
)
def test_ucf101_spelled_otherwise(ucf, folder, file):
    shutil.rmtree(ucf / "UCF-101" / "HandstandPushups")
    tree(ucf, f"UCF-101/{folder}/v_{file}_g08_c01.avi")
    path = f"UCF-101/{folder}/v_{file}_g08_c01.avi"
    assert found(open_dataset(ucf, subset="train01"))[path] == "HandstandPushups"


def test_ucf101_without_the_lists_or_the_inner_folder(ucf, tmp_path):
    shutil.rmtree(ucf / "ucfTrainTestlist")
    bare = open_dataset(ucf)
    assert bare.kind == "ucf101" and bare.classes == ["Hammering", "HammerThrow", "HandstandPushups"]
    (ucf / "ucfTrainTestlist").mkdir()
    for folder in (ucf / "UCF-101").iterdir():
        folder.rename(ucf / folder.name)
    (ucf / "UCF-101").rmdir()
    assert sorted(Path(p).name for p in found(open_dataset(ucf))) == sorted(Path(p).name for p in found(bare))


def test_ucf101_lists_that_name_absent_files(ucf, capsys):
    names = [f"YoYo/v_YoYo_g01_c{i:02}.avi" for i in range(7)]
    with open(ucf / "ucfTrainTestlist" / "trainlist01.txt", "a") as file:
        file.write("\n".join(f"{name} 4" for name in names))
    with pytest.raises(UserError) as raised:
        open_dataset(ucf, subset="train01")
    message = str(raised.value)
    assert (
        f"videos that the split train01 names and that are not there: 7 ({', '.join(names[:5])}, ...); lvdm" in message
    )
    assert "\n" not in message
    assert len(open_dataset(ucf).entries) == 4  # everything that is there can be used, and the rest is told
    assert f"name and that are not there: 7 ({names[0]}," in capsys.readouterr().err
    dataset, missing = read_ucf101(ucf, subset="train01")
    assert len(dataset.entries) == 2 and missing == names
    assert read_ucf101(ucf, subset="test01")[1] == []


def test_ucf101_folders_that_are_no_classes(ucf, capsys):
    tree(ucf, "UCF-101/Extra/v_Extra_g01_c01.avi")
    assert len(open_dataset(ucf).entries) == 4
    assert "folders that are no class of classInd.txt, left out: 1 (Extra)" in capsys.readouterr().err


def test_ucf101_wrong_roots(tmp_path):
    (tmp_path / "UCF-101" / "YoYo").mkdir(parents=True)
    with pytest.raises(UserError, match=r"expected UCF-101/<class>/v_<class>_g01_c01\.avi"):
        open_dataset(tmp_path)
    tree(tmp_path, "UCF-101/YoYo/v_YoYo_g01_c01.avi", "ucfTrainTestlist/x")
    (tmp_path / "ucfTrainTestlist" / "classInd.txt").write_text("YoYo\n")
    with pytest.raises(UserError, match=r'classInd\.txt: expected lines such as "1 ApplyEyeMakeup"'):
        open_dataset(tmp_path)


def test_ucf101_for_real(real_data):
    dataset = open_dataset(real_data / "ucf101_mini")
    assert len(dataset.entries) == 15 and len(dataset.classes) == 11
    train, test = (open_dataset(real_data / "ucf101_mini", subset=name) for name in ("train01", "test01"))
    assert len(train.entries) == 12 and len(test.entries) == 3
    assert set(train.entries) | set(test.entries) == set(dataset.entries)
    assert all((dataset.root / entry.path).is_file() and entry.label in entry.path for entry in dataset.entries)


# ---------------------------------------------------------------------------------------------------------------------
# SkyTimelapse


def test_sky_leaves_out_and_names_the_known_dirt(tmp_path, capsys):
    tree(tmp_path, *frames("sky_train/a/a_1", 40), *frames("sky_train/a/a_2", 33), *frames("sky_test/b/b_1", 32))
    tree(tmp_path, *frames("sky_train/z6Yr7KDZhm0/z6Yr7KDZhm0_1", 32), "sky_train/a/a_1/Thumbs.db")
    (tmp_path / "sky_train" / "c" / "c_1").mkdir(parents=True)
    dataset = open_dataset(tmp_path)
    assert (dataset.kind, dataset.labels) == ("sky", "none")
    assert list(found(dataset)) == ["sky_test/b/b_1", "sky_train/a/a_1", "sky_train/a/a_2"]
    assert list(found(open_dataset(tmp_path, subset="test"))) == ["sky_test/b/b_1"]
    assert found(open_dataset(tmp_path, "folder", "train")) == {"sky_train/a/a_1": "a", "sky_train/a/a_2": "a"}
    assert read_sky(tmp_path)[1] == [
        "sky_train/c/c_1: empty",
        "sky_train/z6Yr7KDZhm0/z6Yr7KDZhm0_1: known to be unusable",
    ]
    assert "folders left out: 2 (sky_train/c/c_1: empty, sky_train/z6Yr7KDZhm0" in capsys.readouterr().err
    assert datasets.sky_clips(tmp_path / "sky_train") == 3  # of 32 frames, as the authors count, dirt and all


def test_sky_wrong_roots(tmp_path):
    (tmp_path / "sky_train").mkdir()
    with pytest.raises(UserError, match="no frames in it, expected sky_train/<video>/<video>_<clip>"):
        open_dataset(tmp_path)
    tree(tmp_path, *frames("sky_train/a/a_1", 2))
    with pytest.raises(UserError, match="no sky_test in it"):
        open_dataset(tmp_path, subset="test")
    assert len(open_dataset(tmp_path, subset="train").entries) == 1


def test_sky_for_real(real_data):
    root = real_data / "sky_mini"
    assert [len(open_dataset(root, subset=name).entries) for name in ("all", "train", "test")] == [48, 40, 8]
    assert datasets.sky_clips(root) == 48 and read_sky(root)[1] == []


# ---------------------------------------------------------------------------------------------------------------------
# Lists


def write_csv(path: Path, *rows: dict) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_list_of_paths(tmp_path):
    tree(tmp_path, "videos/a.mp4", "videos/ü b.mp4", "elsewhere/c.mp4", *frames("videos/frames", 3), "videos/i.jpg")
    elsewhere = (tmp_path / "elsewhere" / "c.mp4").resolve()
    rows = [
        {"path": "a.mp4", "label": "x", "caption": 'A dog, "running"', "start": 1.5, "end": "0:01:02.5", "more": 3},
        {"path": "./ü b.mp4", "label": "y", "caption": "", "start": "", "end": "", "more": ""},
        {"path": str(elsewhere), "label": "x", "caption": "", "start": "", "end": "", "more": ""},
        {"path": "frames", "label": "x", "caption": "", "start": "2", "end": "", "more": ""},
        {"path": "../videos/i.jpg", "label": "x", "caption": "", "start": "", "end": "", "more": ""},
    ]
    expected = [
        Entry("a.mp4", "x", 1.5, 62.5, 'A dog, "running"'),
        Entry("ü b.mp4", "y"),
        Entry(elsewhere.as_posix(), "x"),
        Entry("frames", "x", 2.0),
        Entry("../videos/i.jpg", "x"),
    ]
    dataset = open_dataset(write_csv(tmp_path / "videos" / "list.csv", *rows))
    assert dataset == Dataset("list", (tmp_path / "videos").resolve(), "list", expected)
    lines = tmp_path / "videos" / "list.jsonl"
    lines.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert open_dataset(lines) == dataset
    assert [entry.label for entry in open_dataset(lines, "none").entries] == [None] * 5
    assert [entry.label for entry in open_dataset(lines, "folder").entries][1:3] == ["videos", "elsewhere"]
    below = write_csv(tmp_path / "list.csv", {"File": tmp_path.resolve() / "videos" / "a.mp4"})
    assert open_dataset(below).entries == [Entry("videos/a.mp4")] and open_dataset(below).labels == "none"


def test_a_parquet_list(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tree(tmp_path, "a.mp4", "b.mp4")
    columns = {"video": ["a.mp4", "b.mp4"], "class": [7, 12], "caption": ["one", None], "end": [2.5, float("nan")]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    dataset = open_dataset(tmp_path / "list.parquet")
    assert dataset.entries == [Entry("a.mp4", "7", 0.0, 2.5, "one"), Entry("b.mp4", "12")]
    assert dataset.classes == ["7", "12"]
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(UserError, match=r"bad\.parquet: not a parquet file"):
        open_dataset(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install pyarrow"):
        open_dataset(tmp_path / "list.parquet")


def test_in_the_style_of_webvid(tmp_path):
    tree(tmp_path, "videos/000001_000050/1066674784.mp4")
    row = {
        "videoid": 1066674784,
        "contentUrl": "https://x/y.mp4",
        "duration": "PT00H00M09S",
        "page_dir": "000001_000050",
    }
    dataset = open_dataset(write_csv(tmp_path / "results.csv", {**row, "name": "Merida, mexico - people"}))
    assert dataset.entries == [Entry("videos/000001_000050/1066674784.mp4", caption="Merida, mexico - people")]


def test_in_the_style_of_panda(tmp_path):
    tree(tmp_path, "videos/-abc_1.mp4")
    times, texts = [["0:00:13.480", "0:00:20.040"], ["0:01:00", "1:00:00.5"]], ["A cat's tail.", "A dog, too."]
    row = {"videoID": "-abc_1", "url": "https://www.youtube.com/watch?v=-abc_1", "matching_score": "[0.4, 0.5]"}
    entries = [
        Entry("videos/-abc_1.mp4", None, 13.48, 20.04, "A cat's tail."),
        Entry("videos/-abc_1.mp4", None, 60.0, 3600.5, "A dog, too."),
    ]
    path = write_csv(tmp_path / "panda.csv", {**row, "timestamp": str(times), "caption": str(texts)})
    assert open_dataset(path).entries == entries
    path = tmp_path / "panda.jsonl"
    path.write_text(json.dumps({**row, "timestamp": times, "caption": texts}))
    assert open_dataset(path).entries == entries
    path = write_csv(tmp_path / "panda.csv", {**row, "timestamp": str(times), "caption": str(texts[:1])})
    with pytest.raises(UserError, match=r"panda\.csv, row 1: 2 timestamps and 1 captions"):
        open_dataset(path)


def test_in_the_style_of_kinetics(tmp_path, capsys):
    """What was cut when it was downloaded is not cut again; videos that are gone are named."""
    tree(tmp_path, "train/--a_000010_000020.mp4", "train/b/b1.mp4")
    ids = ["--a", "b1", "gone1", "gone2"]
    rows = [
        {"label": "riding a bike", "youtube_id": key, "time_start": 10, "time_end": 20, "split": "train"} for key in ids
    ]
    dataset = open_dataset(write_csv(tmp_path / "train.csv", *rows))
    assert dataset.entries == [
        Entry("train/--a_000010_000020.mp4", "riding a bike"),
        Entry("train/b/b1.mp4", "riding a bike", 10.0, 20.0),
    ]
    assert "files that are not there, left out: 2 (gone1, gone2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, message",
    [
        ({"url": "x", "text": "y"}, "no column says where the videos are: expected path, file, .* there are url, text"),
        ({"path": "gone.mp4"}, r"none of its 1 files is there, such as gone\.mp4 below"),
        ({"path": ""}, "row 1: no path in it"),
        ({"path": "a.mp4", "start": "soon"}, "row 1: 'soon' is neither seconds nor h:mm:ss"),
        ({"path": "a.mp4", "start": "nan"}, "row 1: 'nan' is no time"),
        ({"path": "a.mp4", "start": "5", "end": "5"}, "row 1: a clip from second 5 to 5"),
        ({"path": "a.mp4", "start": "-1"}, "row 1: a clip from second -1"),
        ({"path": "a.mp4", "label": ""}, "rows without a label: 1 .row 1.; fill column label, or labels=none"),
        ({"path": "a.mp4", "timestamp": "[[0, 1]"}, "row 1: .* is not a list"),
        ({"path": "a.mp4", "timestamp": "[0, 1]"}, "row 1: '0' is not a list"),
    ],
)
def test_lists_that_are_wrong(tmp_path, row, message):
    tree(tmp_path, "a.mp4")
    with pytest.raises(UserError, match=message) as raised:
        open_dataset(write_csv(tmp_path / "list.csv", row))
    assert "list.csv" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("list.csv", b"", "no rows in it"),
        ("list.csv", b"path,label\n", "no rows in it"),
        ("list.csv", b"path\n\xff\xfe.mp4\n", "cannot be read"),
        ("list.jsonl", b'{"path": "a.mp4"}\n{"path": ', "cannot be read"),
        ("list.jsonl", b'["a.mp4"]\n', "row 1: expected an object"),
    ],
)
def test_lists_that_are_none(tmp_path, name, text, message):
    tree(tmp_path, "a.mp4")
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path / name)


def test_labels_that_are_numbers_are_in_order_of_numbers(tmp_path):
    tree(tmp_path, "a.mp4")
    rows = [{"path": "a.mp4", "label": label} for label in (10, 9, 2, 10)]
    assert open_dataset(write_csv(tmp_path / "list.csv", *rows)).classes == ["2", "9", "10"]
    rows.append({"path": "a.mp4", "label": "cat"})
    assert open_dataset(write_csv(tmp_path / "list.csv", *rows)).classes is None


def test_opening_imports_no_torch():
    code = "import sys, lvdm.data.datasets, lvdm.data.programs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
