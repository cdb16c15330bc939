"""Datasets as lists of entries: any folder, UCF101, SkyTimelapse, or a list file. Names only, nothing is decoded."""

import ast
import csv
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from lvdm.data.arrays import SUFFIX as ARRAY
from lvdm.data.frames import SUFFIXES as IMAGES
from lvdm.errors import UserError, nearest

ENCODED = (".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
VIDEOS = (*ENCODED, ARRAY)
LISTS = (".csv", ".jsonl", ".parquet")
LABELS = ("auto", "folder", "file", "none")
SPLITS = tuple(f"{part}{number:02}" for part in ("train", "test") for number in (1, 2, 3))
SUBSETS = {"ucf101": ("all", *SPLITS), "sky": ("all", "train", "test"), "folder": ("all",), "list": ("all",)}
SKY_LAYOUT = "expected sky_train/<video>/<video>_<clip>/*.jpg and sky_test likewise; lvdm data sky fetches them"
SKY_DIRT = {"z6Yr7KDZhm0": "known to be unusable"}  # folder of SkyTimelapse -> why nobody trains on it


@dataclass(frozen=True)
class Entry:
    """A video file, a folder of frames or an image; `path` is relative to the root of its dataset, or absolute where a
    list names a file elsewhere. `start` and `end` are seconds, `end` None the end of the video."""

    path: str
    label: str | None = None
    start: float = 0.0
    end: float | None = None
    caption: str = ""


@dataclass(frozen=True)
class Dataset:
    """What is there, sorted by path (a list keeps its order); `labels` says what labels are: "folder", "file", "none",
    or "list" (a column).

    `classes` are the names of the labels in the order that numbers them, where the dataset has one of its own: UCF101's
    is that of classInd.txt, which is not Python's (Hammering, HammerThrow); None leaves it to who counts the labels.
    """

    kind: str
    root: Path
    labels: str
    entries: list[Entry]
    classes: list[str] | None = None


def open_dataset(videos: str | Path, labels: str = "auto", subset: str = "all") -> Dataset:
    """The dataset at `videos`, recognised by what is there:

    - a folder with UCF-101/ or ucfTrainTestlist/ is UCF101; `subset` may be a split: train01 to test03
    - a folder with sky_train/ or sky_test/ is SkyTimelapse; `subset` may be train or test
    - any other folder: videos, folders of frames and images anywhere below
    - a .csv, .jsonl or .parquet file is a list (see `read_list`)
    - what is no path is a name below the folder LVDM_DATA (see `by_name`)

    `labels` are the name of the parent folder ("folder"), the name of the file ("file") or absent ("none"). "auto"
    takes the class of UCF101, nothing for SkyTimelapse, the label column of a list where it has one, and of other
    folders "folder" when there is something in more than one of them, else "file" when there are at most 20, else
    "none".

    What is left out is told on stderr, once a process. Raises UserError where nothing is found, and when a split of
    UCF101 names files that are not there.
    """
    path = by_name(str(videos))
    if labels not in LABELS:
        raise UserError(f"labels: {labels!r} is not one of {', '.join(LABELS)}{nearest(labels, LABELS)}")
    kind = _kind(path) if str(videos) else None
    if kind is None:
        raise UserError(
            f"videos={videos}: expected a folder of videos, UCF101, SkyTimelapse or a {' '.join(LISTS)} list, "
            f"or the name of one in the folder LVDM_DATA ({os.environ.get('LVDM_DATA') or 'not set'})"
        )
    if subset not in SUBSETS[kind]:
        what = {"ucf101": "UCF101", "sky": "SkyTimelapse"}.get(kind, f"a {kind} without splits")
        raise UserError(f"subset={subset}: {path} is {what}, expected {', '.join(SUBSETS[kind])}")
    if kind == "folder":
        return read_folder(path, labels)
    if kind == "list":
        return read_list(path, labels)
    if kind == "sky":
        dataset, left_out = read_sky(path, labels, subset)
        _tell(path, left_out, "folders left out")
        return dataset
    dataset, missing = read_ucf101(path, labels, subset)
    if missing and subset != "all":
        raise UserError(
            f"{path}: {some(missing, f'videos that the split {subset} names and that are not there')}; "
            f"lvdm data ucf101 root={path} download=true fetches them"
        )
    _tell(path, missing, "videos that the official lists name and that are not there")
    return dataset


def by_name(videos: str) -> Path:
    """`videos` where that is a path; else what is called so in the folder that LVDM_DATA names, whatever its letter
    case, hyphens and underscores: ucf101 is UCF-101, too, and sky is sky_timelapse. UserError where two are."""
    path, root = Path(videos), Path(os.environ.get("LVDM_DATA", ""))
    if path.exists() or not os.environ.get("LVDM_DATA") or not root.is_dir():
        return path
    if (root / path).exists():
        return root / path
    found = [there for there in sorted(root.iterdir()) if _plain(there.name) == _plain(videos)]
    if len(found) > 1:
        raise UserError(f"videos={videos}: may be any of {', '.join(map(str, found))}: give the path")
    return found[0] if found else path


def _plain(name: str) -> str:
    """A name by which a dataset is known, as everyone spells it."""
    plain = re.sub(r"[\W_]", "", name.lower())
    return "skytimelapse" if plain == "sky" else plain


def _kind(path: Path) -> str | None:
    if path.is_dir():
        if (path / "UCF-101").is_dir() or (path / "ucfTrainTestlist").is_dir():
            return "ucf101"
        return "sky" if (path / "sky_train").is_dir() or (path / "sky_test").is_dir() else "folder"
    return "list" if path.is_file() and path.suffix.lower() in LISTS else None


def some(names: list[str], what: str) -> str:
    """ "folders left out: 7 (a, b, c, d, e, ...)": the count and the first five."""
    return f"{what}: {len(names):,} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


@cache  # so that a process says it once
def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _tell(path: Path, names: list[str], what: str) -> None:
    if names:
        _say(f"{path}: {some(names, what)}")


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def read_folder(root: Path, labels: str = "auto") -> Dataset:
    """Everything below `root` but hidden files and folders; raises UserError when that is nothing."""
    paths, empty, beside = [], [], []
    for here, folders, videos, images in _walk(root):
        if videos:
            paths += [here + name for name in videos]
            beside += [here + name for name in images]
        elif images and not folders and here and is_sequence(images):
            paths.append(here.rstrip("/"))
        else:
            paths += [here + name for name in images]
            if not images and not folders:
                empty.append(here.rstrip("/"))
    if not paths:
        raise UserError(f"{root}: no video in or below it (looked for {' '.join((*VIDEOS, *IMAGES))})")
    _tell(root, beside, "images beside videos, left out")
    if labels == "auto":
        parents = {os.path.dirname(path) for path in paths}
        labels = "folder" if len(parents) > 1 else "file" if len(paths) <= 20 else "none"
    if labels == "folder":
        _tell(root, sorted(empty), "empty classes, with no video or image")
    return _labelled("folder", root, labels, paths)


def is_sequence(names: list[str]) -> bool:
    """Whether images of these names are the frames of one video: two or more, the same but for their last number, and
    those in a row. A fixed step is a row too, and fewer than half may miss."""
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*)", name) for name in names]
    if len(parts) < 2 or not all(parts) or len({part.group(1, 3) for part in parts}) > 1:
        return False
    numbers = sorted(int(part[2]) for part in parts)
    step = min(after - before for before, after in pairwise(numbers))
    return step > 0 and numbers[-1] - numbers[0] < 2 * step * len(numbers)


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str], list[str]]]:
    """(folder, sub-folders, videos, images) of `root` ("") and all folders below ("a/b/"), but what is hidden (".part",
    "._x.mp4" of macOS)."""
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = "" if parent == str(root) else Path(parent).relative_to(root).as_posix() + "/"
        yield here, folders, [f for f in files if _is(f, VIDEOS)], [f for f in files if _is(f, IMAGES)]


def _is(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes) and not name.startswith(".")


def _labelled(kind: str, root: Path, labels: str, paths: Iterable[str]) -> Dataset:
    root = root.resolve()
    name = _namer(root, labels)
    return Dataset(kind, root, labels, [Entry(path, name(path)) for path in sorted(paths, key=lambda p: p.split("/"))])


def _namer(root: Path, labels: str) -> Callable[[str], str | None]:
    """The label of a path, by its folder or its own name."""
    if labels == "folder":
        return lambda path: os.path.basename(os.path.dirname(os.path.join(root, path)))
    return (lambda path: os.path.splitext(os.path.basename(path))[0]) if labels == "file" else lambda path: None


# ---------------------------------------------------------------------------------------------------------------------
# UCF101


def read_ucf101(root: Path, labels: str = "auto", subset: str = "all") -> tuple[Dataset, list[str]]:
    """The videos of a split that are there, and the names in its official list that are not ("all": in any list).

    The class is the folder, never the file: folder HandstandPushups holds v_HandStandPushups_*.avi. Letter case of
    folders and files does not matter, since copies of UCF101 differ in it.
    """
    videos = root / "UCF-101" if (root / "UCF-101").is_dir() else root
    found = {name.lower(): videos / here / name for here, _, names, _ in _walk(videos) for name in names}
    if not found:
        raise UserError(
            f"{root}: no UCF101 in it, expected UCF-101/<class>/v_<class>_g01_c01.avi and so on; "
            f"lvdm data ucf101 root={root} download=true fetches it"
        )
    classes = ucf101_classes(root) or sorted({path.parent.name for path in found.values()}, key=str.lower)
    spelled = {name.lower(): name for name in classes}
    foreign = sorted({path.parent.name for path in found.values() if path.parent.name.lower() not in spelled})
    _tell(root, foreign, "folders that are no class of classInd.txt, left out")
    found = {key: path for key, path in found.items() if path.parent.name.lower() in spelled}

    listed = split_names(root, subset)
    missing = [name for name in listed if name.rpartition("/")[2].lower() not in found]
    if subset != "all":
        wanted = {name.rpartition("/")[2].lower() for name in listed}
        found = {key: path for key, path in found.items() if key in wanted}
    dataset = _labelled(
        "ucf101",
        root,
        "folder" if labels == "auto" else labels,
        (path.relative_to(root).as_posix() for path in found.values()),
    )
    if dataset.labels != "folder":
        return dataset, missing
    entries = [Entry(entry.path, spelled[entry.label.lower()]) for entry in dataset.entries]
    return Dataset("ucf101", dataset.root, "folder", entries, classes), missing


def ucf101_classes(root: Path) -> list[str]:
    """The names in classInd.txt in the order of their official numbers (from 1 there), or [] without that file."""
    path = root / "ucfTrainTestlist" / "classInd.txt"
    if not path.is_file():
        return []
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if not all(len(row) == 2 and row[0].isdigit() for row in rows):
        raise UserError(f'{path}: expected lines such as "1 ApplyEyeMakeup"')
    return [name for _, name in sorted((int(number), name) for number, name in rows)]


def split_names(root: Path, subset: str) -> list[str]:
    """ "Class/v_Class_g01_c01.avi" of a split, sorted; of "all", those in whatever lists are there."""
    if subset == "all":
        paths = [path for split in SPLITS if (path := split_list(root, split)).is_file()]
    else:
        paths = [split_list(root, subset)]
        if not paths[0].is_file():
            raise UserError(f"{paths[0]}: no such file; lvdm data ucf101 root={root} download=true fetches the lists")
    lines = [line.split() for path in paths for line in path.read_text().splitlines()]
    return sorted({line[0] for line in lines if line})


def split_list(root: Path, split: str) -> Path:
    """The file that lists a split: ucfTrainTestlist/trainlist01.txt."""
    return root / "ucfTrainTestlist" / f"{split[:-2]}list{split[-2:]}.txt"


# ---------------------------------------------------------------------------------------------------------------------
# SkyTimelapse


def read_sky(root: Path, labels: str = "auto", subset: str = "all") -> tuple[Dataset, list[str]]:
    """The folders of frames of a split, and those that are left out, each with the reason.

    They lie two levels below sky_train and sky_test: sky_train/<video>/<video>_<clip>/*.jpg.
    """
    paths, left_out = [], []
    for split in sky_splits(root, subset):
        for here, folders, _, images in _walk(split):
            path = f"{split.name}/{here}".rstrip("/")
            dirt = [reason for name, reason in SKY_DIRT.items() if name in path.split("/")]
            if dirt and images:
                left_out.append(f"{path}: {dirt[0]}")
            elif images:
                paths.append(path)
            elif not folders:
                left_out.append(f"{path}: empty")
    if not paths:
        raise UserError(f"{root}: no frames in it, {SKY_LAYOUT}")
    return _labelled("sky", root, "none" if labels == "auto" else labels, paths), sorted(left_out)


def sky_splits(root: Path, subset: str) -> list[Path]:
    """The folders of a split; raises UserError where a split that was asked for is not there."""
    splits = [root / f"sky_{name}" for name in ("train", "test") if subset in (name, "all")]
    there = [split for split in splits if split.is_dir()]
    if not there:
        raise UserError(f"{root}: no {' or '.join(split.name for split in splits)} in it, {SKY_LAYOUT}")
    return there


def sky_clips(split: Path) -> int:
    """How many clips of 32 frames its folders hold one after the other, which is how the authors count."""
    return sum(len(images) // 32 for _, _, _, images in _walk(split))


# ---------------------------------------------------------------------------------------------------------------------
# Lists

# Names of columns without case and underscores. Those of WebVid are videoid and name, of Panda-70M videoID, timestamp
# and caption, of Kinetics youtube_id, label, time_start and time_end.
COLUMNS = {
    "path": ("path", "file", "video", "filepath", "filename", "videopath", "image", "imagepath"),
    "id": ("videoid", "youtubeid"),
    "label": ("label", "class", "classname", "category"),
    "caption": ("caption", "text", "title", "name", "prompt"),
    "start": ("start", "starttime", "timestart", "startsec", "startseconds"),
    "end": ("end", "endtime", "timeend", "endsec", "endseconds"),
    "spans": ("timestamp", "timestamps"),
}


def read_list(path: Path, labels: str = "auto") -> Dataset:
    """A .csv, .jsonl or .parquet list of videos, one a row, in the order of its rows.

    Columns are known by name (`COLUMNS`), as WebVid, Panda-70M and Kinetics call them; others are ignored. A path is
    absolute or relative to the folder of the list. Where there are only ids, a video is the file of that name anywhere
    below that folder: ID.mp4, or ID_000010_000020.mp4, which Kinetics has cut from second 10 to 20 already. A row of
    Panda-70M stands for several clips: `timestamp` is a list of [start, end], `caption` a list too.

    Files that are not there are left out and named. Raises UserError when that is all of them, when a column is
    missing, and for rows that make no sense.
    """
    root, rows = path.parent.resolve(), _rows(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: no rows in it")
    column = _columns(path, list(first[1]))
    if labels == "auto":
        labels = "list" if "label" in column else "none"
    below = _stems(root) if "path" not in column else {}
    name, entries, absent, unlabelled = _namer(root, labels), [], [], []
    for number, row in (first, *rows):
        values = {key: row.get(source) for key, source in column.items()}
        try:
            file, spans, captions = _locate(root, below, values)
        except ValueError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
        if file is None:
            absent.append(str(values.get("path") or values["id"]))
            continue
        label = _text(values["label"]) if labels == "list" else name(file)
        if label == "":
            unlabelled.append(f"row {number}")
        entries += [Entry(file, label, *span, text) for span, text in zip(spans, captions, strict=True)]
    if not entries:
        raise UserError(f"{path}: none of its {len(absent):,} files is there, such as {absent[0]} below {root}")
    _tell(path, absent, "files that are not there, left out")
    if unlabelled:
        raise UserError(
            f"{path}: {some(unlabelled, 'rows without a label')}; fill column {column['label']}, or labels=none"
        )
    return Dataset("list", root, labels, entries, _numbered(entries) if labels == "list" else None)


def _columns(path: Path, names: list[str]) -> dict[str, str]:
    """What a column is for -> its name in the list, the first where several would do."""
    plain = {re.sub(r"[\W_]", "", name.lower()): name for name in reversed(names)}
    column = {key: next((plain[known] for known in all_of if known in plain), None) for key, all_of in COLUMNS.items()}
    column = {key: name for key, name in column.items() if name is not None}
    if "path" not in column and "id" not in column:
        raise UserError(
            f"{path}: no column says where the videos are: expected {', '.join(COLUMNS['path'])} or "
            f"{', '.join(COLUMNS['id'])}; the columns there are {', '.join(names)}"
        )
    return column


def _locate(root: Path, below: dict[str, str], values: dict[str, Any]) -> tuple[str | None, list[tuple], list[str]]:
    """The file of a row (None: not there), its (start, end) and a caption for each; raises ValueError."""
    spans, captions = _spans(values)
    if _text(values.get("path")):
        file = os.path.join(root, Path(_text(values["path"])))
        inside = file.removeprefix(os.path.join(root, ""))
        return (inside.replace(os.sep, "/") if os.path.exists(file) else None), spans, captions
    key = _text(values.get("id"))
    if not key:
        raise ValueError("no path in it")
    start, end = spans[0]
    cut = f"{key}_{int(start):06}_{int(end):06}" if end is not None else key
    if cut != key and cut in below and len(spans) == 1:
        return below[cut], [(0.0, None)], captions
    return below.get(key), spans, captions


def _spans(values: dict[str, Any]) -> tuple[list[tuple[float, float | None]], list[str]]:
    """The (start, end) of the clips of a row, and their captions; raises ValueError."""
    if _text(values.get("spans"))[:1] not in ("[", "("):  # none, or one time of something else
        spans, captions = [(values.get("start"), values.get("end"))], [_text(values.get("caption"))]
    else:
        spans = [_literal(span) for span in _literal(values["spans"])]
        captions = _literal(values.get("caption") or [])
        captions = [_text(caption) for caption in captions] or [""] * len(spans)
        if not spans or any(len(span) != 2 for span in spans) or len(captions) != len(spans):
            raise ValueError(f"{len(spans)} timestamps and {len(captions)} captions; expected [[start, end], ...] each")
    seconds = [(_seconds(start) or 0.0, _seconds(end)) for start, end in spans]
    for start, end in seconds:
        if start < 0 or (end is not None and end <= start):
            raise ValueError(f"a clip from second {start:g} to {end}")
    return seconds, captions


def _literal(value: Any) -> list:
    """A list, or the text of one as csv files hold it."""
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
        return list(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"{str(value)[:50]!r} is not a list") from None


def _seconds(value: Any) -> float | None:
    """Seconds out of a number, "12.5" or "0:01:02.5"; None where there is nothing."""
    text = _text(value)
    if not text:
        return None
    try:
        seconds = sum(float(part) * 60**i for i, part in enumerate(reversed(text.split(":"))))
    except ValueError:
        raise ValueError(f"{text!r} is neither seconds nor h:mm:ss") from None
    if not math.isfinite(seconds):
        raise ValueError(f"{text!r} is no time")
    return seconds


def _text(value: Any) -> str:
    """A cell as text; "" where a table has nothing (None, or the NaN of pandas)."""
    return "" if value is None or value != value else str(value).strip()


def _numbered(entries: list[Entry]) -> list[str] | None:
    """Labels that are numbers, in the order of numbers ("10" is after "9"); None where they are names."""
    labels = {entry.label for entry in entries}
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else None


def _stems(root: Path) -> dict[str, str]:
    """The videos below `root` by their names without suffix."""
    return {os.path.splitext(name)[0]: here + name for here, _, videos, _ in _walk(root) for name in videos}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, cells by column) of each row; numbers count from 1, the header of a csv file not counted."""
    try:
        if path.suffix.lower() == ".parquet":
            yield from enumerate(_parquet(path), 1)
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                csv.field_size_limit(2**31 - 1)  # all clips of a long video are one row of Panda-70M
                yield from enumerate(csv.DictReader(file), 1)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f'{path}, row {number}: expected an object, as in {{"path": "a.mp4"}}')
                    yield number, row
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow, or give a csv or jsonl") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file: {error}") from None
