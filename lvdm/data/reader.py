"""Frames out of video files, folders of frames and images, exactly: frame i is the i-th frame of a full decode, however
it was reached.

decord reads the files whose every frame it is known to hit: MP4 or MOV of constant frame rate with closed groups of
pictures, which is what most tools write. PyAV reads all other videos, and those at which decord fails; the pixels are
the same. Pillow reads pictures (`lvdm.data.frames`).
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import av
import numpy as np
import torch

from lvdm.data import frames
from lvdm.data.frames import Unreadable, VideoInfo, check_pixels, stat_file

T = TypeVar("T")

TIMEOUT = 60.0  # seconds for one clip, and for one wait for data
MAX_FRAMES = 2**22  # of one video, 38 hours at 30 fps: a damaged head may promise anything

# Containers only: by its contents alone a file could be a playlist, and have FFmpeg open what that names.
_FORMATS = "asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,yuv4mpegpipe"

# Decoding is bit exact by the standard and every packet shows one frame; MPEG-4 part 2 and MJPEG differ by a level
# between decoders, VP8 has packets that show nothing.
_INDEXED_CODECS = {"h264", "hevc", "vp9"}


@dataclass(frozen=True)
class _Scan:
    """One pass over the packets: times of all frames in order of display, and where decoding can start."""

    info: VideoInfo
    pts: np.ndarray
    key_pts: np.ndarray
    key_dts: np.ndarray
    indexed: bool  # a time stamp leads to its frame
    decord_exact: bool  # decord gives every frame, and the colours that PyAV gives


def probe(path: str | Path) -> VideoInfo:
    """Counts the frames of `path` from its packets (or pictures) and decodes the first one, no more.

    Raises `Unreadable`, after TIMEOUT seconds at the latest.
    """
    return _in_time(path, lambda: _info(path))


def read_frames(path: str | Path, indices: Sequence[int]) -> torch.Tensor:
    """The frames `indices` (any order, repeats allowed) of `path` as uint8 RGB (T, H, W, 3).

    Raises `Unreadable`, after TIMEOUT seconds at the latest. What cannot be interrupted (a file server that does not
    answer, a decoder that never returns) is then left behind in a thread of its own, with its file and memory, until
    it comes back or the process ends.
    """
    return torch.from_numpy(_in_time(path, lambda: _read(path, list(indices))))


def iter_frames(path: str | Path, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """All frames of `path` in order as uint8 RGB (H, W, 3), in memory that does not grow with the video.

    `size` (width, height) asks for thumbnails of that size instead, averaged over areas (and not rotated, where `path`
    is a video). Raises `Unreadable` at the first frame that cannot be decoded, or when FFmpeg waits for data longer
    than TIMEOUT seconds; a call to the system or to a decoder that never returns is not interrupted.
    """
    if frames.is_pictures(path):
        yield from frames.iter_frames(path, size)
        return
    with _decoder(path) as (container, stream):
        first = None
        for frame in container.decode(stream):
            first = first or frame
            if size:
                yield frame.to_ndarray(format="rgb24", width=size[0], height=size[1], interpolation="AREA")
            else:
                yield _rgb(frame, first)


def _info(path: str | Path) -> VideoInfo:
    return frames.probe(path) if frames.is_pictures(path) else _scan(path).info


def _read(path: str | Path, indices: list[int]) -> np.ndarray:
    """`read_frames` in this thread, however long it takes."""
    info = _info(path)
    if not all(0 <= index < info.frames for index in indices):
        raise Unreadable(path, f"frames {min(indices)} to {max(indices)} asked of a video of {info.frames} frames")
    if frames.is_pictures(path):
        return frames.read_frames(path, indices)
    scan = _scan(path)
    found = _read_decord(path, indices, info) if scan.decord_exact else None
    return _read_pyav(path, indices, scan) if found is None else found


def _in_time(path: str | Path, work: Callable[[], T]) -> T:
    """What `work()` gives or raises, or `Unreadable` after TIMEOUT seconds."""
    future: Future[T] = Future()

    def run(future: Future[T]) -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
            del future  # or the error would hold itself, and all frames read so far, through its traceback

    Thread(target=run, args=(future,), name=f"read {path}", daemon=True).start()
    try:
        return future.result(TIMEOUT)
    except TimeoutError as error:
        raise Unreadable(path, f"not read within {TIMEOUT:g} seconds") from error
    finally:
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
            metadata_errors="replace",
            timeout=TIMEOUT,
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


def _rgb(frame: Any, first: Any) -> np.ndarray:
    """`frame` as RGB of the size of the `first` one (some streams change size), turned as its metadata says."""
    image = frame.to_ndarray(format="rgb24", width=first.width, height=first.height)
    return np.ascontiguousarray(np.rot90(image, first.rotation // 90)) if first.rotation else image


def _scan(path: str | Path) -> _Scan:
    found = stat_file(path)
    return _scan_version(str(path), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1024)
def _scan_version(path: str, mtime_ns: int, size: int) -> _Scan:
    """Kept for as long as the file does not change; reading a clip then costs no second pass over the packets."""
    with _decoder(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise Unreadable(path, "no frame can be decoded")
    with _decoder(path) as (container, stream):
        packets = []  # (pts, dts, key frame?) in the order of decoding
        for packet in _while_awaited(path, container.demux(stream)):
            # discarded packets are decoded for the sake of others and never shown (edit lists)
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.dts, packet.is_keyframe))
            if len(packets) > MAX_FRAMES:
                raise Unreadable(path, f"holds more than {MAX_FRAMES} frames")
        stamped = all(pts is not None for pts, _, _ in packets)
        coded = np.array([pts if stamped else i for i, (pts, _, _) in enumerate(packets)])
        keys = np.array([i for i, (_, _, key) in enumerate(packets) if key], dtype=int)
        pts = np.sort(coded)
        gaps = np.diff(pts)
        vfr = bool(len(gaps) and gaps.max() - gaps.min() > 1)  # one tick is rounding
        rate = 1 / (gaps.mean() * stream.time_base) if vfr else stream.average_rate or stream.guessed_rate or 0
        indexed = (
            stamped
            and bool((gaps > 0).all())
            and stream.codec_context.name in _INDEXED_CODECS
            and container.format.name != "avi"  # stores no times: those it reports are out of order with B-frames
        )
        decord_exact = (
            indexed
            and not vfr
            # a table of all frames in the file: decord misses frames in fragments, transport streams and edit lists ...
            and stream.frames == len(packets)
            # ... and where a frame stored after a key frame is shown before it (open GOP)
            and bool((coded == np.minimum.accumulate(coded[::-1])[::-1])[keys].all())
            # its colours differ for other pictures than these
            and first.format.name == "yuv420p"
            and not (first.interlaced_frame or first.width % 2 or first.height % 2)
        )
        turned = first.rotation % 180 != 0
        width, height = (first.height, first.width) if turned else (first.width, first.height)
        key_dts = np.array([pts if dts is None else dts for pts, dts, key in packets if key])
        return _Scan(
            VideoInfo(len(pts), float(rate), width, height, vfr), pts, coded[keys], key_dts, indexed, decord_exact
        )


def _read_decord(path: str | Path, indices: list[int], info: VideoInfo) -> np.ndarray | None:
    """The frames by decord, or None where it fails: on damaged or cut-off files, and on some narrow pictures."""
    import decord  # here, because its import is slow

    decord.logging.set_level(decord.logging.QUIET)
    try:
        found = decord.VideoReader(os.path.abspath(path), num_threads=1).get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError, MemoryError):
        return None
    return found if found.shape[1:] == (info.height, info.width, 3) else None


def _read_pyav(path: str | Path, indices: list[int], scan: _Scan, seek: bool = True) -> np.ndarray:
    """The frames by PyAV: from the key frame before them where time stamps can be trusted, else from the start."""
    wanted, found = sorted(set(indices)), {}
    keys_before = scan.key_dts[scan.key_pts <= scan.pts[wanted[0]]] if seek and scan.indexed else []
    with _decoder(path) as (container, stream):
        if seek := len(keys_before) > 0:
            container.seek(int(keys_before[-1]), stream=stream)
        first, index = None, wanted[0] if seek else 0
        for frame in _while_awaited(path, container.decode(stream)):
            first = first or frame
            if seek and frame.pts is not None and frame.pts < scan.pts[wanted[0]]:
                continue
            if seek and frame.pts != scan.pts[index]:
                break  # the container landed too late, or damage has swallowed a frame
            if index in wanted:
                found[index] = _rgb(frame, first)
                if len(found) == len(wanted):
                    return np.stack([found[index] for index in indices])
            index += 1
    if seek:
        return _read_pyav(path, indices, scan, seek=False)
    raise Unreadable(path, f"frame {min(set(wanted) - found.keys())} of {scan.info.frames} cannot be decoded")
