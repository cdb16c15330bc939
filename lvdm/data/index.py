"""The index of a folder of videos: what is there, what is broken, whose class it is, and where its shots begin."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from lvdm.data.reader import Unreadable, iter_frames, probe
from lvdm.errors import UserError, nearest
from lvdm.files import write_text
from lvdm.progress import bar
from lvdm.weights import cache_dir

VERSION = 1  # of what an index says of a file; a newer one is built anew
SUFFIXES = (".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
LABELS = ("auto", "folder", "file", "none")
THUMBNAIL = (32, 18)  # width, height of what the shot detector sees
_told: set[str] = set()  # indexes whose broken files this process has named
CUT = 13.0  # distance of two thumbnails, in levels of 255, from which they may be of different shots


@dataclass
class IndexRow:
    """One video. `path` is relative to the root, `cuts` are the first frames of all shots but the first.

    `frames` counts those that can be decoded: the readable head of a damaged file is used, and `reason` says so.
    A row of state "broken" has no frames at all.
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

    def shots(self) -> list[tuple[int, int]]:
        """The shots as (start, end) in frames, end excluded."""
        edges = [0, *self.cuts, self.frames]
        return list(pairwise(edges))


@dataclass
class Index:
    """All videos below `root`, sorted by path; `labels` says what their labels are ("folder", "file", "none")."""

    root: Path
    labels: str
    rows: list[IndexRow]

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
        """Sorted names of the labels of usable videos; the number of a class is its place in this list."""
        return sorted({row.label for row in self.ok if row.label is not None})

    def hash(self) -> str:
        """Hex digest of what training sees of the videos: paths below the root, labels, sizes, frames and cuts."""
        seen = [(row.path, row.label, row.frames, row.width, row.height, row.cuts) for row in self.ok]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes JSON lines, a head line and one a video, all at once or not at all."""
        path = Path(path)
        lines = [{"root": str(self.root), "labels": self.labels}, *(asdict(row) for row in self.rows)]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    @classmethod
    def load(cls, path: str | Path) -> "Index":
        """Reads what `save` wrote; raises UserError when it is something else."""
        try:
            head, *rows = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
            return cls(Path(head["root"]), head["labels"], [IndexRow(**row) for row in rows])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: not a video index ({error}); delete it to have it built again") from error


def build_index(
    folder: str | Path, labels: str = "auto", on_file: Callable[[int, int], None] = lambda done, total: None
) -> Index:
    """Looks at every video below `folder` once (a full decode at thumbnail size) and calls `on_file(done, total)`.

    Labels are the name of the parent folder ("folder"), the file's stem ("file") or absent ("none"). "auto" takes
    "folder" when videos lie in more than one sub-folder, else "file" when there are at most 20, else "none".
    Raises UserError when there is no video, or none that can be read.
    """
    folder = Path(folder)
    if labels not in LABELS:
        raise UserError(f"labels: {labels!r} is not one of {', '.join(LABELS)}{nearest(labels, LABELS)}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of videos")
    paths = sorted(_videos(folder))
    if not paths:
        raise UserError(f"{folder}: no video in or below it (looked for {' '.join(SUFFIXES)})")
    if labels == "auto":
        labels = "folder" if len({path.parent for path in paths}) > 1 else "file" if len(paths) <= 20 else "none"

    rows = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # FFmpeg works outside the interpreter's lock
        for row in pool.map(lambda path: _look(folder, path, labels), paths):
            rows.append(row)
            on_file(len(rows), len(paths))
    index = Index(folder.resolve(), labels, rows)
    if not index.ok:
        raise UserError(f"{folder}: none of the {len(rows)} videos can be read; {rows[0].path}: {rows[0].reason}")
    return index


def open_index(folder: str | Path, labels: str = "auto") -> Index:
    """`build_index`, kept in the cache folder until a file below `folder` comes, goes or changes (path, size, time).

    Names the broken and damaged files on stderr, once a process. Nothing is written into `folder`.
    """
    if not str(folder) or not Path(folder).is_dir():
        raise UserError(f"videos={folder}: expected a folder of videos")
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(_videos(Path(folder)))]
    key = hashlib.sha256(json.dumps([VERSION, str(Path(folder).resolve()), labels, files]).encode()).hexdigest()[:24]
    cached = cache_dir() / "index" / f"{key}.jsonl"
    if cached.is_file():
        index = Index.load(cached)
    else:
        with bar(f"index {Path(folder).name}", len(files)) as progress:
            index = build_index(folder, labels, lambda done, total: progress.advance())
        cached.parent.mkdir(parents=True, exist_ok=True)
        index.save(cached)
    if key not in _told:
        _told.add(key)
        for row in [*index.broken, *index.damaged]:
            print(f"{row.path}: {row.reason}", file=sys.stderr)
        if index.broken:
            print(f"{len(index.broken)} of {len(index.rows)} videos are broken and left out", file=sys.stderr)
    return index


def find_cuts(thumbnails: np.ndarray) -> list[int]:
    """The first frame of every new shot among `thumbnails`, uint8 (N, h, w, 3), about 32 pixels wide.

    Hard cuts only, no dissolves. The distance of two frames forgives motion of one thumbnail pixel (1/32 of the
    picture); a cut is a distance that is large, that stands out from its neighbours (fast motion does not), and that
    parts all frames just before from all just after (a flash does not).
    """
    if len(thumbnails) < 2:
        return []
    frames = torch.from_numpy(thumbnails).permute(0, 3, 1, 2)
    pairs = zip(frames[:-1].split(4096), frames[1:].split(4096), strict=True)
    step = torch.cat([_distance(a, b) for a, b in pairs])  # step[i - 1] leads to frame i
    cuts = []
    for i in (torch.nonzero(step > CUT).flatten() + 1).tolist():
        neighbours = torch.cat([step[max(0, i - 9) : i - 1], step[i : i + 8]])
        motion = neighbours.sort(descending=True).values[2:3].sum()  # two other cuts or flashes may be near
        before, after = frames[max(0, i - 3) : i], frames[i : i + 3]
        apart = min(_distance(before, frame.expand_as(before)).min() for frame in after)
        if step[i - 1] > 3 * (motion + 1) and apart > CUT:
            cuts.append(i)
    return cuts


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean distance (levels of 255) of each pixel to the range of the 3x3 pixels around it in the other frame, the
    larger of both directions; uint8 (N, 3, h, w) twice -> (N,)."""
    a, b = a.float(), b.float()

    def outside(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        high, low = F.max_pool2d(y, 3, 1, 1), -F.max_pool2d(-y, 3, 1, 1)
        return ((x - high).clamp_min(0) + (low - x).clamp_min(0)).mean((1, 2, 3))

    return torch.maximum(outside(a, b), outside(b, a))


def _videos(folder: Path) -> Iterator[Path]:
    """Files with a video's suffix; hidden files and folders are left out (".part", "._x.mp4" of macOS)."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, f) for f in files if f.lower().endswith(SUFFIXES) and not f.startswith("."))


def _look(root: Path, path: Path, labels: str) -> IndexRow:
    """The row of one file: its head, then every frame as a thumbnail."""
    label = {"folder": path.parent.name, "file": path.stem, "none": None}[labels]
    row = IndexRow(path.relative_to(root).as_posix(), label)
    thumbnails, reason = [], ""
    try:
        info = probe(path)
        row.fps, row.width, row.height, row.vfr = info.fps, info.width, info.height, info.vfr
        for thumbnail in islice(iter_frames(path, THUMBNAIL), info.frames):
            thumbnails.append(thumbnail)
        reason = "the file ends early"
    except Unreadable as error:
        reason = error.reason
    row.frames = len(thumbnails)
    if not thumbnails:
        row.state, row.reason = "broken", reason
        return row
    if row.frames < info.frames:
        row.reason = f"only the first {row.frames} of {info.frames} frames can be decoded: {reason}"
    row.cuts = find_cuts(np.stack(thumbnails))
    return row
