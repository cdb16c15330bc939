"""Clips out of an index: which frames of which video, as a pure function of policy, seed and sample index."""

import logging
import math
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm.data.index import Index, IndexRow
from lvdm.data.reader import Unreadable, iter_frames, read_frames
from lvdm.errors import UserError
from lvdm.rng import generator, item_at

logger = logging.getLogger(__name__)

FPS_TOLERANCE = 0.005  # 29.97 frames a second are 30, and every second of them 15


@dataclass(frozen=True)
class ClipPolicy:
    """How clips are cut. The last `holdout` part of every shot is the validation split, the rest the training split.

    A clip has `frames` frames, every `stride`-th of the video, of `size` x `size` pixels; `flip` mirrors half of them.
    `fps` > 0 asks for a rate instead of a stride, which must then be exact. Shots too short for a clip are left out
    (`short="drop"`), begin again ("loop") or run back and forth ("reflect"). `across_cuts` takes a video for one shot.
    """

    frames: int
    stride: int
    size: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    split: Literal["train", "val", "all"] = "train"
    holdout: float = 0.2
    fps: float = 0.0
    short: Literal["drop", "loop", "reflect"] = "drop"
    across_cuts: bool = False

    def __post_init__(self):
        if self.frames < 1 or self.stride < 1:
            raise UserError(f"frames and stride must be at least 1, not {self.frames} and {self.stride}")
        if self.size < 8 or self.size % 8:
            below = max(8, self.size // 8 * 8)
            raise UserError(f"size: {self.size} is not divisible by 8; the nearest sizes are {below} and {below + 8}")
        if self.crop not in ("center", "random"):
            raise UserError(f"crop: {self.crop!r} is neither center nor random")
        if self.split not in ("train", "val", "all"):
            raise UserError(f"split: {self.split!r} is none of train, val, all")
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout: {self.holdout} is not a share from 0 to below 1")
        if self.short not in ("drop", "loop", "reflect"):
            raise UserError(f"short: {self.short!r} is none of drop, loop, reflect")
        if self.fps < 0:
            raise UserError(f"fps: {self.fps} is no frame rate; 0 takes every stride-th frame")

    def stride_of(self, row: IndexRow) -> int:
        """Every how many frames of `row` one is taken; a UserError where its rate makes no whole stride for `fps`."""
        if not self.fps:
            return self.stride
        ratio = row.fps / self.fps
        if abs(ratio - round(ratio)) > FPS_TOLERANCE * ratio or ratio < 1 - FPS_TOLERANCE:
            low = max(1, math.floor(ratio))
            exact = " or ".join(f"{row.fps / k:.4g}" for k in (low, low + 1))
            raise UserError(
                f"fps={self.fps:g}: {row.path} has {row.fps:.4g} frames a second, every {ratio:.2f}th would be taken;"
                f" exact are {exact}, or set stride and fps=0"
            )
        return round(ratio)

    def span(self, row: IndexRow) -> int:
        """Frames of the video from the first to the last of a clip, both counted."""
        return (self.frames - 1) * self.stride_of(row) + 1

    def segments(self, row: IndexRow) -> list[tuple[int, int]]:
        """The part of each shot of `row` that is in the split, as (start, end) in frames, end excluded."""
        segments, shots = [], row.shots()
        for start, end in [(shots[0][0], shots[-1][1])] if self.across_cuts else shots:
            border = end - round((end - start) * self.holdout)
            segments.append({"train": (start, border), "val": (border, end), "all": (start, end)}[self.split])
        return segments

    def starts(self, row: IndexRow) -> list[Tensor]:
        """All first frames that a clip of `row` can have, a segment; a shot that is too short has its own first one,
        or none."""
        span, starts = self.span(row), []
        for start, end in self.segments(row):
            if end - start >= span:
                starts.append(torch.arange(start, end - span + 1))
            elif end > start and self.short != "drop":
                starts.append(torch.tensor([start]))
        return starts

    def places(self, row: IndexRow, start: int) -> list[int]:
        """The frames of the clip of `row` that begins at `start`."""
        end = next(end for a, end in self.segments(row) if a <= start < end)
        length, stride = end - start, self.stride_of(row)
        steps = [i * stride for i in range(self.frames)]
        if self.short == "loop":
            steps = [step % length for step in steps]
        elif self.short == "reflect" and length > 1:
            turns = (step % (2 * length - 2) for step in steps)
            steps = [min(turn, 2 * length - 2 - turn) for turn in turns]
        elif self.short == "reflect":
            steps = [0 for _ in steps]
        return [start + step for step in steps]


class Window(NamedTuple):
    """A clip to be read: a row of `Clips.rows`, its first frame, and whether it is mirrored."""

    row_index: int
    start: int
    flip: bool = False


class Skipped(NamedTuple):
    """What is too short for a clip: shots, videos of which no shot is long enough, and of the shots those that are
    taken all the same, by `short`."""

    shots: int
    videos: int
    stretched: int = 0


class Cut(NamedTuple):
    """How a clip is cut out of its frames: the short side resized to `size`, a `size` x `size` crop placed by `top` and
    `left` (0 to 1 over all places it can have, 0.5 is the centre), mirrored or not."""

    size: int
    top: float
    left: float
    flip: bool

    def of(self, frames: Tensor) -> Tensor:
        """uint8 (T, H, W, 3), on any device -> uint8 (3, T, size, size). CUDA may round to the next level of 255."""
        small = resize(frames, self.size)
        video = crop(small, self.size, self.top, self.left).transpose(0, 1)
        return (video.flip(-1) if self.flip else video).contiguous()


@dataclass
class Clip:
    """`video` uint8 RGB (3, T, H, W), or frames (T, H, W, 3) still to be cut as `cut` says; `label` the number of its
    class (-1: none), where it is from (`row` is the number of its row in the index), at which rate."""

    video: Tensor
    label: int
    source: str
    start: int
    flip: bool
    fps: float
    row: int
    cut: Cut | None = None


class Memory:
    """Room for `gib` GiB of whole videos, decoded and resized, in this process; any number of `Clips` may share it."""

    def __init__(self, gib: float):
        self.free = gib * 2**30
        self.videos: dict[Hashable, Tensor] = {}
        self._reserved: set[Hashable] = set()

    def reserve(self, wanted: dict[Hashable, int]) -> bool:
        """Whether all of these videos (bytes of each) find room beside those reserved before, which then count."""
        new = {key: size for key, size in wanted.items() if key not in self._reserved}
        if sum(new.values()) > self.free:
            return False
        self.free -= sum(new.values())
        self._reserved |= new.keys()
        return True


class Clips:
    """The clips of an index under a policy; `len` is the number of usable videos, `rows` are those videos.

    Whole videos, decoded and resized, stay in the memory of this process when all of them take at most `cache_gib` GiB
    (a `Memory` for several `Clips` to share); else the frames of a clip are decoded each time. The pixels are the same
    both ways. `uncut` leaves frames that are decoded each time as they are, to be resized and cropped elsewhere (see
    `Cut`).
    """

    def __init__(
        self, index: Index, policy: ClipPolicy, seed: int, cache_gib: float | Memory = 2.0, uncut: bool = False
    ):
        self.index, self.policy, self.seed, self.uncut = index, policy, seed, uncut
        self.rows: list[IndexRow] = []
        self._numbers: list[int] = []  # of the rows in the index
        self._starts: list[Tensor] = []  # all valid first frames, a row
        short = stretched = longest = 0
        for number, row in enumerate(index.rows):
            if row.state != "ok":
                continue
            lengths = [end - start for start, end in policy.segments(row)]
            span, starts = policy.span(row), policy.starts(row)
            longest = max([longest, *lengths])
            short += sum(length < span for length in lengths)
            stretched += sum(0 < length < span for length in lengths) if policy.short != "drop" else 0
            if starts:
                self.rows.append(row)
                self._numbers.append(number)
                self._starts.append(torch.cat(starts))
        self.skipped = Skipped(short, len(index.ok) - len(self.rows), stretched)
        if not self.rows and policy.split == "val" and not policy.holdout:
            raise UserError(f"{index.root}: split=val, but nothing is held out: set holdout=0.2, or split=all")
        if not self.rows:
            how = f"at {policy.fps:g} fps" if policy.fps else f"at stride {policy.stride}"
            raise UserError(
                f"{index.root}: no shot is long enough: {policy.frames} frames {how} need "
                f"{min(map(policy.span, index.ok))} consecutive frames in the {policy.split} split, the longest shot"
                f" there has {longest}; fewer frames, a smaller stride, or short=loop"
            )
        self._class_of = {name: number for number, name in enumerate(index.classes)}
        memory = cache_gib if isinstance(cache_gib, Memory) else Memory(cache_gib)
        sizes = (row.length * 3 * math.prod(_fit(row.height, row.width, policy.size)) for row in self.rows)
        fits = memory.reserve(dict(zip(map(self._key, self.rows), sizes, strict=True)))
        self._cache = memory.videos if fits else None
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def say_skipped(self) -> "Clips":
        """Tells on stderr how many shots and videos are too short for a clip, if any are; returns itself."""
        p, left = self.policy, self.skipped.shots - self.skipped.stretched
        clip = f"{p.frames} frames at {f'{p.fps:g} fps' if p.fps else f'stride {p.stride}'}"
        if left:
            videos = self.skipped.videos
            print(
                f"{p.split}: {left} shots and {videos} whole videos are too short for {clip} and left out",
                file=sys.stderr,
            )
        if self.skipped.stretched:
            how = {"loop": "begin again", "reflect": "run back and forth"}[p.short]
            print(f"{p.split}: {self.skipped.stretched} shots are too short for {clip} and {how}", file=sys.stderr)
        return self

    def at(self, sample_index: int) -> Clip:
        """The clip of the sample `sample_index` (counted since the start of training).

        A video that turns out unreadable is reported once by a log line, and the next row that can be read takes its
        place, with the same draws; raises UserError when none is left.
        """
        draws = torch.rand(4, generator=generator(self.seed, "clip", sample_index), dtype=torch.float64)
        draw, flip, *corner = draws.tolist()
        top, left = corner if self.policy.crop == "random" else (0.5, 0.5)
        first = item_at(self.seed, sample_index, len(self))
        for row_index in ((first + step) % len(self) for step in range(len(self))):
            if row_index in self._unreadable:
                continue
            starts = self._starts[row_index]
            window = Window(row_index, int(starts[int(draw * len(starts))]), self.policy.flip and flip < 0.5)
            try:
                return self._read(window, top, left)
            except Unreadable as error:
                self._unreadable.add(row_index)
                logger.warning("%s; the next video takes its place", error)
        raise UserError(f"{self.index.root}: none of the {len(self)} videos can be read any more")

    def grid(self, per_video: int) -> list[Window]:
        """`per_video` evenly spaced windows of each video (all of them where there are fewer), none of them mirrored;
        0 asks for every window that overlaps no other, from the start of each shot. The same for every seed."""
        windows = []
        for row_index, (row, valid) in enumerate(zip(self.rows, self._starts, strict=True)):
            span = self.policy.span(row)
            if per_video:
                middles = (torch.arange(per_video) + 0.5) / per_video
                starts = valid[(middles * len(valid)).long()].unique().tolist()
            else:
                starts = [s for part in self.policy.starts(row) for s in part[::span].tolist()]
            windows.extend(Window(row_index, start) for start in starts)
        return windows

    def read(self, window: Window) -> Clip:
        """The clip of `window`, cropped at the centre; raises `Unreadable`."""
        return self._read(window, 0.5, 0.5)

    def _read(self, window: Window, top: float, left: float) -> Clip:
        row = self.rows[window.row_index]
        frames = self._frames(window.row_index, self.policy.places(row, window.start))
        cut = Cut(self.policy.size, top, left, window.flip)
        later = self.uncut and self._cache is None
        return Clip(
            video=frames if later else cut.of(frames),
            label=self._class_of.get(row.label, -1),
            source=row.path,
            start=window.start,
            flip=window.flip,
            fps=row.fps / self.policy.stride_of(row),
            row=self._numbers[window.row_index],
            cut=cut if later else None,
        )

    def _frames(self, row_index: int, indices: list[int]) -> Tensor:
        """Frames of a row, uint8 (T, H, W, 3): resized already (which resizing leaves alone), unless `uncut`."""
        row = self.rows[row_index]
        path = self.index.root / row.path
        if self._cache is None:
            return read_frames(path, indices, row.whole, self._small if not self.uncut else lambda frame: frame)
        key = self._key(row)
        if key not in self._cache:
            frames = islice(iter_frames(path), row.start, row.start + row.length)
            small = torch.cat([self._small(torch.from_numpy(frame)[None]) for frame in frames])
            if len(small) < row.length:
                raise Unreadable(path, f"changed since it was indexed: {len(small)} frames, not {row.length}")
            self._cache[key] = small
        return self._cache[key][[index - row.start for index in indices]]

    def _key(self, row: IndexRow) -> Hashable:
        """What a decoded video is kept under: those that share a memory may be of several indexes and sizes."""
        return self.index.root, row.path, row.start, row.end, self.policy.size

    def _small(self, frames: Tensor) -> Tensor:
        return resize(frames, self.policy.size).permute(0, 2, 3, 1)


def resize(frames: Tensor, size: int) -> Tensor:
    """Antialiased bilinear, the short side to `size`, frame by frame: uint8 (T, H, W, 3) -> uint8 (T, 3, h, w)."""
    shape, pictures = _fit(*frames.shape[1:3], size), frames.permute(0, 3, 1, 2)
    if pictures.shape[2:] == shape:
        return pictures
    if frames.is_cuda:  # where there is no resizing of bytes
        pictures = F.interpolate(pictures.float(), shape, mode="bilinear", antialias=True)
        return pictures.round().clamp(0, 255).to(torch.uint8)
    return F.interpolate(pictures, shape, mode="bilinear", antialias=True)


def crop(pictures: Tensor, size: int, top: float = 0.5, left: float = 0.5) -> Tensor:
    """`size` x `size` pixels of (..., H, W); `top` and `left` are 0 to 1 over all places there are, 0.5 the centre."""
    y, x = (int(part * (room - size + 1)) for part, room in zip((top, left), pictures.shape[-2:], strict=True))
    return pictures[..., y : y + size, x : x + size]


def _fit(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) scaled so that the short side is `size`."""
    short = min(height, width)
    return round(height * size / short), round(width * size / short)
