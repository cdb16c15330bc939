"""Frames out of video files, folders of frames and images, exactly: frame i is the i-th frame of a full decode, however
it was reached.

decord reads the files whose every frame it is known to hit: MP4 or MOV of constant frame rate with closed groups of
pictures, which is what most tools write. PyAV reads all other videos, and all within the workers of a DataLoader, whose
cores decord's own threads would take: from the key frame before the first frame asked for, where that is known to give
what a full decode gives, else from the start. The pixels are the same. Pillow reads pictures (`lvdm.data.frames`), and
NumPy arrays (`lvdm.data.arrays`).
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import ModuleType
from typing import Any, TypeVar

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.utils.data import get_worker_info

from lvdm.data import arrays, frames
from lvdm.data.frames import Unreadable, VideoInfo, check_pixels, stat_file
from lvdm.errors import UserError

T = TypeVar("T")

TIMEOUT = 60.0  # seconds for one clip, and for one wait for data
MAX_FRAMES = 2**22  # of one video, 38 hours at 30 fps: a damaged head may promise anything

# Containers only: by its contents alone a file could be a playlist, and have FFmpeg open what that names.
_FORMATS = "asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,yuv4mpegpipe"

# Every packet shows one frame, and a time stamp leads to it; VP8 has packets that show nothing.
_INDEXED_CODECS = {"h264", "hevc", "vp9"}

# Titles and the like need not be UTF-8: PyAV raises before version 19, which reads them and lacks the option.
_TEXT = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}

_VOP = re.compile(rb"\x00\x00\x01\xb6(.)", re.DOTALL)  # the start of an MPEG-4 frame; two bits tell its kind
_INTRA, _BOTH_WAYS = 0, 2


@dataclass(frozen=True)
class _Scan:
    """One pass over the packets: times of all frames in order of display, and where decoding can start."""

    info: VideoInfo
    look: tuple[int, int, int]  # of the first frame, see `_look`
    pts: np.ndarray
    keys: np.ndarray  # (K, 3): pts, dts and place in the file of the key frames, in order of decoding
    indexed: bool  # a time stamp leads to its frame
    counted: bool  # time stamps are numbers of packets, and an index that is damaged leads to others
    droppable: bool  # frames that no other refers to need not be decoded
    for_decord: bool  # decord gives every frame, in the colours of a full decode


def probe(path: str | Path) -> VideoInfo:
    """Counts the frames of `path` from its packets (or pictures) and decodes the first one, no more.

    Raises `Unreadable`, after TIMEOUT seconds at the latest.
    """
    return _in_time(path, lambda: _info(path))


def read_frames(
    path: str | Path,
    indices: Sequence[int],
    whole: bool = False,
    each: Callable[[Tensor], Tensor] = lambda frame: frame,
) -> Tensor:
    """The frames `indices` (any order, repeats allowed) of `path` as uint8 RGB (T, H, W, 3), or what `each` makes of
    every frame (1, H, W, 3) as it comes (a clip that is resized so is never there in full).

    `whole` says that a full decode has given a sound frame for every packet, at its time (`IndexRow.whole`). Only then
    are frames reached from key frames: damage may swallow a frame, and all after it would be counted wrong.

    Raises `Unreadable`, after TIMEOUT seconds at the latest. What cannot be interrupted (a file server that does not
    answer, a decoder that never returns) is then left behind in a thread of its own, with its file and memory, until
    it comes back or the process ends.
    """
    return _in_time(path, lambda: _read(path, list(indices), whole, each))


def iter_frames(
    path: str | Path, size: tuple[int, int] | None = None, odd: Callable[[], None] | None = None
) -> Iterator[np.ndarray]:
    """All frames of `path` in order as uint8 RGB (H, W, 3), in memory that does not grow with the video.

    `size` (width, height) asks for thumbnails of that size instead, averaged over areas (and not rotated, where `path`
    is a video). `odd` is called before a frame in which the decoder has filled in what damage took, or which
    does not come at the time that the packets promise.

    Raises `Unreadable` at the first frame that cannot be decoded, or when FFmpeg waits for data longer
    than TIMEOUT seconds; a call to the system or to a decoder that never returns is not interrupted.
    """
    if reader := _undecoded(path):
        yield from reader.iter_frames(path, size)
        return
    with _decoder(path) as (container, stream):
        colours, times = None, iter(_scan(path).pts.tolist()) if odd else None
        for frame in container.decode(stream):
            colours = colours or _Colours(_look(frame), size)
            if odd and (frame.is_corrupt or frame.pts != next(times, None)):
                odd()
            yield colours.of(frame)


def _undecoded(path: str | Path) -> ModuleType | None:
    """The module that reads `path`; None where that is FFmpeg."""
    return frames if frames.is_pictures(path) else arrays if arrays.is_array(path) else None


def _info(path: str | Path) -> VideoInfo:
    reader = _undecoded(path)
    return reader.probe(path) if reader else _scan(path).info


def _read(path: str | Path, indices: list[int], whole: bool, each: Callable[[Tensor], Tensor]) -> Tensor:
    """`read_frames` in this thread, however long it takes."""
    info = _info(path)
    if not all(0 <= index < info.frames for index in indices):
        raise Unreadable(path, f"frames {min(indices)} to {max(indices)} asked of a video of {info.frames} frames")
    wanted = sorted(set(indices))
    reader = _undecoded(path)
    pictures = reader.pick(path, wanted) if reader else _pick(path, wanted, _scan(path), whole)
    found = {index: each(torch.from_numpy(picture)[None]) for index, picture in zip(wanted, pictures, strict=True)}
    return torch.cat([found[index] for index in indices])


class _Hand(Thread):
    """A thread that does one piece of work after the other: to start one for each clip takes as long as to read it."""

    def __init__(self):
        super().__init__(name="reader", daemon=True)
        self.todo: SimpleQueue[tuple[Callable[[], Any], Future] | None] = SimpleQueue()
        self.start()

    def run(self) -> None:
        while self._do(self.todo.get()):
            pass

    @staticmethod
    def _do(job: tuple[Callable[[], Any], Future] | None) -> bool:
        if job is None:
            return False
        work, future = job
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        finally:
            del job, future  # or an error would hold itself, and all frames read so far, through its traceback
        return True


_idle: list[_Hand] = []
os.register_at_fork(after_in_child=_idle.clear)  # threads stay with the parent


def _in_time(path: str | Path, work: Callable[[], T]) -> T:
    """What `work()` gives or raises, or `Unreadable` after TIMEOUT seconds."""
    future: Future[T] = Future()
    try:
        hand = _idle.pop()
    except IndexError:
        hand = _Hand()
    hand.todo.put((work, future))
    try:
        return future.result(TIMEOUT)
    except TimeoutError as error:
        raise Unreadable(path, f"not read within {TIMEOUT:g} seconds") from error
    finally:
        if future.done():
            _idle.append(hand)
        else:
            hand.todo.put(None)  # it ends when it comes back
        del future  # likewise


def _while_awaited(path: str | Path, items: Iterable[T]) -> Iterator[T]:
    """`items` until nobody waits for them any more."""
    end = time.monotonic() + TIMEOUT
    for item in items:
        if time.monotonic() > end:
            raise Unreadable(path, f"not read within {TIMEOUT:g} seconds")
        yield item


@contextmanager
def _decoder(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """An open container and its first video stream, decoding on one thread; all errors become `Unreadable`."""
    stat_file(path)
    try:
        with av.open(
            os.path.abspath(path),  # "pipe:0" is a file here, and not a protocol
            container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
            timeout=TIMEOUT,
            **_TEXT,
        ) as container:
            if not container.streams.video:
                raise Unreadable(path, "no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise Unreadable(path, "no decoder for its video stream")
            check_pixels(path, stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(frames.MAX_PIXELS)}  # a stream may change size
            yield container, stream
    except av.error.ExitError as error:
        raise Unreadable(path, f"no data within {TIMEOUT:g} seconds") from error
    except (av.error.FFmpegError, OSError, MemoryError) as error:
        raise Unreadable(path, error) from error
    except Unreadable:
        raise
    except Exception as error:  # what PyAV makes of fields that hold nonsense
        raise Unreadable(path, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _look(frame: Any) -> tuple[int, int, int]:
    """Width and height before it is turned, and its turn in degrees."""
    return frame.width, frame.height, frame.rotation


class _Colours:
    """Frames of a video as RGB (H, W, 3), which `look` as its first one (some streams change size), or thumbnails."""

    def __init__(self, look: tuple[int, int, int], thumbnail: tuple[int, int] | None = None):
        self.size, self.turns = (thumbnail, 0) if thumbnail else (look[:2], look[2] // 90)
        self.how = "AREA" if thumbnail else None
        self.reformatter = VideoReformatter()

    def of(self, frame: Any) -> np.ndarray:
        # one thread: to start and await more for each frame takes ten times as long as a small one
        picture = self.reformatter.reformat(frame, *self.size, "rgb24", interpolation=self.how, threads=1).to_ndarray()
        return np.ascontiguousarray(np.rot90(picture, self.turns)) if self.turns else picture


def _scan(path: str | Path) -> _Scan:
    found = stat_file(path)
    return _scan_version(str(path), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4096)
def _scan_version(path: str, mtime_ns: int, size: int) -> _Scan:
    """Kept for as long as the file does not change; reading a clip then costs no second pass over the packets."""
    with _decoder(path) as (container, stream):
        codec, counted = stream.codec_context.name, container.format.name == "avi"
        packets, first, indexed = [], None, codec == "mpeg4" if counted else codec in _INDEXED_CODECS
        for packet in _while_awaited(path, container.demux(stream)):
            first = first or next(iter(packet.decode()), None)
            # discarded packets are decoded for the sake of others and never shown (edit lists)
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.dts, packet.pos or 0, packet.is_keyframe))
                indexed = indexed and (not counted or _shows_in_order(packet))
            if len(packets) > MAX_FRAMES:
                raise Unreadable(path, f"holds more than {MAX_FRAMES} frames")
        if first is None:
            raise Unreadable(path, "no frame can be decoded")
        stamped = all(pts is not None for pts, *_ in packets)
        if not stamped:
            packets = [(i, dts, pos, key) for i, (_, dts, pos, key) in enumerate(packets)]
        keys = [(pts, pts if dts is None else dts, pos) for pts, dts, pos, key in packets if key]
        coded = np.array([pts for pts, *_ in packets])
        pts = np.sort(coded)
        gaps = np.diff(pts)
        vfr = bool(len(gaps) and gaps.max() - gaps.min() > 1)  # one tick is rounding
        rate = 1 / (gaps.mean() * stream.time_base) if vfr else stream.average_rate or stream.guessed_rate or 0
        width, height, turn = look = _look(first)
        shown = (height, width) if turn % 180 else (width, height)
        indexed = indexed and stamped and bool((gaps > 0).all())
        for_decord = (
            indexed
            and not (counted or vfr)
            # a table of all frames in the file: decord misses frames in fragments, transport streams and edit lists ...
            and stream.frames == len(packets)
            # ... and where a frame stored after a key frame is shown before it (open GOP)
            and bool((coded == np.minimum.accumulate(coded[::-1])[::-1])[[key for *_, key in packets]].all())
            # its colours differ for other pictures than these
            and first.format.name == "yuv420p"
            and not (first.interlaced_frame or width % 2 or height % 2)
        )
        return _Scan(
            info=VideoInfo(len(pts), float(rate), *shown, vfr),
            look=look,
            pts=pts,
            keys=np.array(keys, dtype=np.int64).reshape(-1, 3),
            indexed=indexed,
            counted=counted,
            droppable=codec == "h264",
            for_decord=for_decord,
        )


def _shows_in_order(packet: Any) -> bool:
    """Whether an MPEG-4 packet is one frame, shown before the next, and as a key frame refers to no other."""
    kinds = [kind[0] >> 6 for kind in _VOP.findall(bytes(packet))]
    return len(kinds) == 1 and kinds[0] != _BOTH_WAYS and (kinds[0] == _INTRA or not packet.is_keyframe)


def _pick(path: str | Path, wanted: list[int], scan: _Scan, whole: bool) -> Iterator[np.ndarray]:
    """The frames `wanted`, which ascend, by decord or from a key frame as far as it is certain that they are right."""
    ways = [_by_decord] if whole and scan.for_decord and _prefers_decord() else []
    ways += [_from_key_frame] if whole and scan.indexed else []
    found = 0
    for way in ways:
        with suppress(Unreadable):
            for picture in way(path, wanted[found:], scan):
                found += 1
                yield picture
        if found == len(wanted):
            return
    yield from _from_start(path, wanted[found:], scan)


def _prefers_decord() -> bool:
    """Whether files that decord reads exactly are for decord: not in a worker, unless the environment says so."""
    chosen = os.environ.get("LVDM_DECODER", "auto")
    if chosen not in ("auto", "decord", "pyav"):
        raise UserError(f"LVDM_DECODER={chosen}: expected decord (where it is exact, else PyAV), pyav, or auto")
    return chosen == "decord" or (chosen == "auto" and get_worker_info() is None)


def _by_decord(path: str | Path, wanted: list[int], scan: _Scan) -> Iterator[np.ndarray]:
    """Ends early where decord fails, as on some narrow pictures, or is not there."""
    try:
        import decord  # here, because its import is slow
    except ImportError:
        return
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(os.path.abspath(path), num_threads=1)
        for first in range(0, len(wanted), 8):  # a long clip is never there in full
            found = reader.get_batch(wanted[first : first + 8]).asnumpy()
            if found.shape[1:] != (scan.info.height, scan.info.width, 3):
                return
            yield from found
    except (decord.DECORDError, RuntimeError, IndexError, MemoryError):
        return


def _from_start(path: str | Path, wanted: list[int], scan: _Scan) -> Iterator[np.ndarray]:
    left, colours = wanted[::-1], _Colours(scan.look)
    with _decoder(path) as (container, stream):
        for index, frame in enumerate(_while_awaited(path, container.decode(stream))):
            if index == left[-1]:
                yield colours.of(frame)
                left.pop()
                if not left:
                    return
    raise Unreadable(path, f"frame {left[-1]} of {scan.info.frames} cannot be decoded")


def _from_key_frame(path: str | Path, wanted: list[int], scan: _Scan) -> Iterator[np.ndarray]:
    """Ends early where anything is not as in a full decode: a seek leads elsewhere, a frame is missing or mended."""
    times, colours = scan.pts[wanted].tolist(), _Colours(scan.look)
    keys_before = scan.keys[scan.keys[:, 0] <= times[0]].tolist()
    if not keys_before:
        return
    pts, dts, place = keys_before[-1]
    shown, left = set(times), times[::-1]
    with _decoder(path) as (container, stream):
        container.seek(dts, stream=stream)
        for number, packet in enumerate(_while_awaited(path, container.demux(stream))):
            if scan.counted and number == 0 and (packet.pts, packet.pos) != (pts, place):
                return
            if scan.droppable:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in shown else "NONREF"
            for frame in packet.decode():
                if frame.is_corrupt or frame.pts is None or frame.pts > left[-1]:
                    return
                if frame.pts == left[-1]:
                    if _look(frame) != scan.look:
                        return
                    yield colours.of(frame)
                    left.pop()
                    if not left:
                        return
