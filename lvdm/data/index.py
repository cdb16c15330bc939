"""The index of a dataset: what is there, what is broken, whose class it is, and where its shots begin.

Every file is looked at once, by several processes, and what was seen is kept in the cache folder: a file that comes or
changes costs only itself, and a build that was killed goes on.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lvdm.data import arrays
from lvdm.data.datasets import Dataset, Entry, open_dataset
from lvdm.data.reader import Unreadable, iter_frames, probe
from lvdm.data.shots import THUMBNAIL, find_cuts
from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.progress import bar
from lvdm.weights import cache_dir

VERSION = 3  # of what is kept of a file; what another version kept is not read
SAVE_EVERY = 30.0  # seconds of looking that a killed build may lose
SILENCE = 120.0  # seconds without a new frame after which a file is given up
NAMED = 20  # broken files named one by one
_told: set[tuple[Path, str]] = set()  # what this process has said of an index


@dataclass
class IndexRow:
    """One video. `path` is relative to the root, `cuts` are the first frames of all shots but the first.

    `frames` counts those of the file that can be decoded: the readable head of a damaged file is used, and `reason`
    says so. Of a clip that a list cuts out of a longer file, `start` and `end` (excluded) are frames of that file; an
    `end` of None is its last. A row of state "broken" has nothing to show. `whole` says that the file has given a sound
    frame for every packet, at its time, so that its frames can be reached from key frames (see `read_frames`).
    """

    path: str
    label: str | None = None
    frames: int = 0
    fps: float = 0.0
    width: int = 0
    height: int = 0
    vfr: bool = False
    cuts: list[int] = field(default_factory=list)
    state: Literal["ok", "broken"] = "ok"
    reason: str = ""
    start: int = 0
    end: int | None = None
    caption: str = ""
    whole: bool = False

    def shots(self) -> list[tuple[int, int]]:
        """The shots as (start, end) in frames of the file, end excluded."""
        end = self.frames if self.end is None else self.end
        return list(pairwise([self.start, *(cut for cut in self.cuts if self.start < cut < end), end]))

    @property
    def length(self) -> int:
        """Frames from the start to the end."""
        return (self.frames if self.end is None else self.end) - self.start


@dataclass
class Index:
    """All videos of a dataset, sorted by path; `labels` says what their labels are ("folder", "file", "none").

    `official` are all classes of a dataset that numbers them itself, whether videos of them are there or not.
    """

    root: Path
    labels: str
    rows: list[IndexRow]
    official: list[str] | None = None

    @property
    def ok(self) -> list[IndexRow]:
        return [row for row in self.rows if row.state == "ok"]

    @property
    def broken(self) -> list[IndexRow]:
        return [row for row in self.rows if row.state == "broken"]

    @property
    def damaged(self) -> list[IndexRow]:
        """Usable rows of which only the head can be decoded; `reason` tells."""
        return [row for row in self.ok if row.reason]

    @property
    def classes(self) -> list[str]:
        """The official classes, else the sorted labels of usable videos; a class's number is its place in this list."""
        return self.official or self._labels()

    @property
    def empty_classes(self) -> list[str]:
        """Official classes of which no video can be used; they keep their numbers."""
        present = set(self._labels())
        return [name for name in self.classes if name not in present]

    def _labels(self) -> list[str]:
        return sorted({row.label for row in self.ok if row.label is not None})

    def hash(self) -> str:
        """Hex digest of what training sees of the videos: paths below the root, labels, sizes, frames and cuts, and
        where there are such: bounds of clips, captions, numbers of classes."""
        seen: list = []
        for row in self.ok:
            clip = [row.start, row.end] if row.start or row.end is not None else []
            caption = [row.caption] if row.caption else []
            seen.append([row.path, row.label, row.frames, row.width, row.height, row.cuts, *clip, *caption])
        if self.classes != self._labels():
            seen.append(self.classes)
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes JSON lines, a head line and one a video, all at once or not at all."""
        head = {"root": str(self.root), "labels": self.labels, "official": self.official}
        write_text(path, "".join(json.dumps(line) + "\n" for line in (head, *map(asdict, self.rows))))

    @classmethod
    def load(cls, path: str | Path) -> "Index":
        """Reads what `save` wrote; raises UserError when it is something else."""
        try:
            head, *rows = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
            return cls(Path(head["root"]), head["labels"], [IndexRow(**row) for row in rows], head.get("official"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not a video index ({error}); delete it to have it built again") from error


# ---------------------------------------------------------------------------------------------------------------------
# Building


def build_index(
    videos: str | Path,
    labels: str = "auto",
    subset: str = "all",
    *,
    on_file: Callable[[int, int], None] = lambda done, total: None,
    workers: int = 0,
) -> Index:
    """Looks at every file of the dataset `videos` (see `open_dataset`), whatever is known, and keeps nothing.

    Each file is decoded once at thumbnail size by one of `workers` processes (0: one a core); then
    `on_file(done, total)` is called. Raises UserError when there is no video, or none that can be read.
    """
    dataset = open_dataset(str(videos), labels, subset)
    files, seen = files_of(dataset), {}
    for row in survey(dataset.root, files, workers):
        seen[row.path] = row
        on_file(len(seen), len(files))
    return _index(dataset, seen)


def open_index(
    videos: str | Path,
    labels: str = "auto",
    subset: str = "all",
    cache: str | Path | None = None,
    *,
    again: bool = False,
    workers: int = 0,
) -> Index:
    """As `build_index`, but looks only at files that are new or changed, or at all `again`, and keeps what it saw.

    That is kept in the folder `cache`, else `cache_dir()/index`, by path, size and time of the file; nothing is written
    beside the videos. Names the broken and damaged files on stderr, once a process.
    """
    dataset = open_dataset(str(videos), labels, subset)
    files = files_of(dataset)
    known = _Known(dataset.root, Path(cache) if cache else cache_dir() / "index")
    unknown = [path for path in files if not known.has(path) or again]
    with bar(f"index {dataset.root.name}", len(files), len(files) - len(unknown), show=bool(unknown)) as progress:
        try:
            for row in survey(dataset.root, unknown, workers):
                known.add(row)
                progress.advance()
        finally:
            known.save()
    index = _index(dataset, known.rows)
    _tell(index)
    return index


def files_of(dataset: Dataset) -> list[str]:
    """The files of a dataset, each once, in the order of their parts: the content of "a" before "a b"."""
    return sorted({entry.path for entry in dataset.entries}, key=lambda path: path.split("/"))


def _index(dataset: Dataset, seen: dict[str, IndexRow]) -> Index:
    place = {path: i for i, path in enumerate(files_of(dataset))}
    entries = sorted(dataset.entries, key=lambda entry: (place[entry.path], entry.start))
    rows = [_row(entry, seen[entry.path]) for entry in entries]
    index = Index(dataset.root.resolve(), dataset.labels, rows, dataset.classes)
    if not index.ok:
        first = rows[0]
        raise UserError(f"{dataset.root}: none of the {len(rows)} videos can be read; {first.path}: {first.reason}")
    return index


def _row(entry: Entry, file: IndexRow) -> IndexRow:
    """What is known of the file, as the dataset speaks of it."""
    row = replace(file, label=entry.label, caption=entry.caption)
    if row.state == "ok" and (entry.start or entry.end is not None):
        row.start = round(entry.start * row.fps)
        row.end = row.frames if entry.end is None else min(row.frames, round(entry.end * row.fps))
        if row.length < 1:
            until = "its end" if entry.end is None else f"{entry.end:g} s"
            why = f"no frame from {entry.start:g} s to {until}: the file has {row.frames} at {row.fps:g} fps"
            row = IndexRow(row.path, row.label, state="broken", reason=f"{why}; {row.reason}".removesuffix("; "))
    return row


def _tell(index: Index) -> None:
    """Says on stderr what is wrong with an index, once a process."""
    lines = [f"{row.path}: {row.reason}" for row in [*index.broken, *index.damaged]]
    if len(lines) > NAMED:
        rest = len(lines) - NAMED
        lines[NAMED:] = [f"... and {rest} more files; lvdm data index {index.root} out=FILE writes all of them down"]
    if index.broken:
        lines.append(f"{len(index.broken)} of {len(index.rows)} videos are broken and left out")
    if empty := index.empty_classes:
        names = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        lines.append(
            f"{len(empty)} of {len(index.classes)} classes have no usable video and keep their number: {names}"
        )
    text = "\n".join(lines)
    if text and (index.root, text) not in _told:
        _told.add((index.root, text))
        print(text, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# What is known of files


class _Known:
    """What was seen of the files below `root`, each as it was then; one file of JSON lines in `folder`."""

    def __init__(self, root: Path, folder: Path):
        digest = hashlib.sha256(json.dumps([VERSION, str(root.resolve())]).encode()).hexdigest()[:16]
        self.root, self.file = root, folder / f"{root.resolve().name[:40]}-{digest}.jsonl"
        self.rows: dict[str, IndexRow] = {}
        self._lines: dict[str, str] = {}
        self._stamps: dict[str, str] = {}
        self._saved, self._changed = time.monotonic(), False
        if self.file.is_file():
            for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        """Takes a line; one that is damaged is left out, and its file is looked at again."""
        try:
            values = json.loads(line)
            stamp, row = values.pop("stamp"), IndexRow(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        self.rows[row.path], self._lines[row.path], self._stamps[row.path] = row, line, stamp

    def has(self, path: str) -> bool:
        """Whether the file is still what it was when it was looked at. If not, `add` expects what it is now."""
        stamp = stamp_of(self.root / path)
        before, self._stamps[path] = self._stamps.get(path), stamp
        return bool(stamp) and stamp == before

    def add(self, row: IndexRow) -> None:
        self.rows[row.path] = row
        self._lines[row.path] = json.dumps({"stamp": self._stamps[row.path], **vars(row)})
        self._changed = True
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes the whole file anew, without what is no longer there."""
        if not self._changed:
            return
        lines = [line for path, line in self._lines.items() if os.path.lexists(self.root / path)]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise UserError(f"cannot keep the index: {error}; name a folder you can write by LVDM_CACHE") from None
        self._saved, self._changed = time.monotonic(), False


def stamp_of(path: Path) -> str:
    """Size and time of a file, a digest of them for a folder of frames, "" where there is nothing.

    Of an array those of the .json that says its rate, too.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISDIR(found.st_mode):
            note = stamp_of(arrays.beside(path)) if arrays.is_array(path) else ""
            return f"{found.st_size}-{found.st_mtime_ns}" + (f"+{note}" if note else "")
        with os.scandir(path) as entries:
            stats = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:24]
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Looking at files


def look(root: Path, path: str, alive: Callable[[], None] = lambda: None, full: bool = False) -> IndexRow:
    """The row of one file: its head, then every frame as a thumbnail, or in `full` size and without looking for cuts.

    `alive` is called after each frame. Whatever a damaged file brings up becomes the row's reason.
    """
    row = IndexRow(path)
    thumbnails, reason, odd = [], "", []
    try:
        info = probe(root / path)
        row.fps, row.width, row.height, row.vfr = info.fps, info.width, info.height, info.vfr
        pictures = iter_frames(root / path, None if full else THUMBNAIL, lambda: odd.append(row.frames))
        for picture in islice(pictures, info.frames):
            row.frames += 1
            if not full:
                thumbnails.append(picture)
            alive()
        reason = "the file ends early"
    except Unreadable as error:
        reason = error.reason
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if not row.frames:
        row.state, row.reason = "broken", reason
    elif row.frames < info.frames:
        row.reason = f"only the first {row.frames} of {info.frames} frames can be decoded: {reason}"
    row.whole = row.state == "ok" and not row.reason and not odd
    if thumbnails:
        row.cuts = find_cuts(np.stack(thumbnails))
    return row


def survey(root: Path, files: Iterable[str], workers: int = 0, full: bool = False) -> Iterator[IndexRow]:
    """`look` at `files` below `root` by `workers` processes (0: one a core); rows come in the order they are done in.

    A file that brings its process down, or shows no new frame for `SILENCE` seconds, is a broken row that says so.
    """
    rest = list(files)[::-1]
    crew = [_Worker(root, full) for _ in range(min(len(rest), workers or _cores()))]
    try:
        for worker in crew:
            worker.take(rest.pop(), crew)
        while busy := {worker.pipe: worker for worker in crew if worker.path is not None}:
            heard = wait(busy, timeout=1.0)
            for pipe, worker in busy.items():
                row = worker.hear() if pipe in heard else worker.give_up()
                if row:
                    worker.take(rest.pop() if rest else None, crew)
                    yield row
    finally:
        for worker in crew:
            worker.kill()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that looks at one file after the other, and the file that it looks at now (None: none is left).

    Forked, so that it starts at once. A new one takes its place when it dies.
    """

    def __init__(self, root: Path, full: bool):
        self.root, self.full = root, full
        self.path: str | None = None
        self.process, self.pipe, self.heard = None, None, 0.0

    def take(self, path: str | None, crew: list["_Worker"]) -> None:
        """Hands over the next file, of a `crew` whose pipes a new process must not keep open."""
        self.path, self.heard = path, time.monotonic()
        if path is None:
            return
        if self.process and not self.process.is_alive():  # while it had nothing to do
            self.kill()
        if self.process is None:
            fork = multiprocessing.get_context("fork")
            self.pipe, theirs = fork.Pipe()
            ours = [worker.pipe for worker in crew if worker.pipe]
            self.process = fork.Process(target=_work, args=(theirs, ours, self.root, self.full), daemon=True)
            self.process.start()
            theirs.close()  # else its death would not end the pipe
        with suppress(OSError):  # a death in this moment: `hear` finds out
            self.pipe.send(path)

    def hear(self) -> IndexRow | None:
        """The row, once it is there; None for a sign of life."""
        try:
            row = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return self._failed(f"the process that decoded it died ({how})")
        self.heard = time.monotonic()
        return row

    def give_up(self) -> IndexRow | None:
        """A broken row after too long a silence."""
        return self._failed(f"no new frame in {SILENCE:g} s") if time.monotonic() - self.heard > SILENCE else None

    def _failed(self, reason: str) -> IndexRow:
        self.kill()
        return IndexRow(self.path, state="broken", reason=reason)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join(5)  # not for ever: a call to a file server may hold even a killed process
            self.pipe.close()
        self.process, self.pipe = None, None


def _work(pipe: Connection, others: list[Connection], root: Path, full: bool) -> None:
    """What a worker does until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    for other in others:
        other.close()
    torch.set_num_threads(1)
    said = 0.0

    def alive() -> None:
        nonlocal said
        if time.monotonic() - said > 1:
            said = time.monotonic()
            pipe.send(None)

    try:
        while True:
            pipe.send(look(root, pipe.recv(), alive, full))
    except (EOFError, OSError):
        pass
