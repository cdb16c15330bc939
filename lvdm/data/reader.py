"""Frames out of video files, exactly: frame i is the i-th frame of a full decode, however it was reached.

decord reads the files whose every frame it is known to hit: MP4 or MOV of constant frame rate with closed groups of
pictures, which is what most tools write. PyAV reads all others, and those at which decord fails; the pixels are the
same.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from lvdm.errors import UserError

# Decoding is bit exact by the standard and every packet shows one frame; MPEG-4 part 2 and MJPEG differ by a level
# between decoders, VP8 has packets that show nothing.
_INDEXED_CODECS = {"h264", "hevc", "vp9"}


class Unreadable(UserError):
    """A video that cannot be decoded (so far as was asked); the message names the file and the reason."""

    def __init__(self, path: str | Path, reason: object):
        # FFmpeg's errors carry number and file name as well; the sentence is enough
        self.reason = getattr(reason, "strerror", None) or str(reason).strip().splitlines()[-1]
        super().__init__(f"{path}: {self.reason}")


@dataclass(frozen=True)
class VideoInfo:
    """What a file promises: exact number of `frames`, mean `fps`, `width` and `height` as shown (after rotation), and
    `vfr`, whether the time between frames varies."""

    frames: int
    fps: float
    width: int
    height: int
    vfr: bool


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
    """Counts the frames of `path` from its packets and decodes the first one, no more; raises `Unreadable`."""
    return _scan(path).info


def read_frames(path: str | Path, indices: Sequence[int]) -> torch.Tensor:
    """The frames `indices` (any order, repeats allowed) of `path` as uint8 RGB (T, H, W, 3); raises `Unreadable`."""
    scan = _scan(path)
    indices = list(indices)
    if not all(0 <= index < scan.info.frames for index in indices):
        raise Unreadable(path, f"frames {min(indices)} to {max(indices)} asked of a video of {scan.info.frames} frames")
    frames = _read_decord(path, indices, scan.info) if scan.decord_exact else None
    return torch.from_numpy(_read_pyav(path, indices, scan) if frames is None else frames)


def iter_frames(path: str | Path, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """All frames of `path` in order as uint8 RGB (H, W, 3), in memory that does not grow with the video.

    `size` (width, height) asks for thumbnails of that size instead, averaged over areas and not rotated. Raises
    `Unreadable` at the first frame that cannot be decoded.
    """
    with _decoder(path) as (container, stream):
        first = None
        for frame in container.decode(stream):
            first = first or frame
            if size:
                yield frame.to_ndarray(format="rgb24", width=size[0], height=size[1], interpolation="AREA")
            else:
                yield _rgb(frame, first)


@contextmanager
def _decoder(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """An open container and its first video stream, decoding on one thread; FFmpeg's errors become `Unreadable`."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Unreadable(path, "no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.error.FFmpegError as error:
        raise Unreadable(path, error) from error


def _rgb(frame: Any, first: Any) -> np.ndarray:
    """`frame` as RGB of the size of the `first` one (some streams change size), turned as its metadata says."""
    image = frame.to_ndarray(format="rgb24", width=first.width, height=first.height)
    return np.ascontiguousarray(np.rot90(image, first.rotation // 90)) if first.rotation else image


def _scan(path: str | Path) -> _Scan:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise Unreadable(path, error) from error
    return _scan_version(str(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def _scan_version(path: str, mtime_ns: int, size: int) -> _Scan:
    """Kept for as long as the file does not change; reading a clip then costs no second pass over the packets."""
    with _decoder(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise Unreadable(path, "no frame can be decoded")
    with _decoder(path) as (container, stream):
        # discarded packets are decoded for the sake of others and never shown (edit lists)
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        stamped = all(p.pts is not None for p in packets)
        coded = np.array([p.pts if stamped else i for i, p in enumerate(packets)])  # in the order of decoding
        keys = np.array([i for i, p in enumerate(packets) if p.is_keyframe], dtype=int)
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
        key_dts = np.array([packets[i].pts if packets[i].dts is None else packets[i].dts for i in keys])
        return _Scan(
            VideoInfo(len(pts), float(rate), width, height, vfr), pts, coded[keys], key_dts, indexed, decord_exact
        )


def _read_decord(path: str | Path, indices: list[int], info: VideoInfo) -> np.ndarray | None:
    """The frames by decord, or None where it fails: on damaged or cut-off files, and on some narrow pictures."""
    import decord  # here, because its import is slow

    decord.logging.set_level(decord.logging.QUIET)
    try:
        frames = decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError):
        return None
    return frames if frames.shape[1:] == (info.height, info.width, 3) else None


def _read_pyav(path: str | Path, indices: list[int], scan: _Scan, seek: bool = True) -> np.ndarray:
    """The frames by PyAV: from the key frame before them where time stamps can be trusted, else from the start."""
    wanted, found = set(indices), {}
    keys_before = scan.key_dts[scan.key_pts <= scan.pts[min(wanted)]] if seek and scan.indexed else []
    with _decoder(path) as (container, stream):
        if len(keys_before):
            container.seek(int(keys_before[-1]), stream=stream)
        first = None
        for count, frame in enumerate(container.decode(stream)):
            first = first or frame
            index = int(np.searchsorted(scan.pts, frame.pts)) if len(keys_before) else count
            if index in wanted:
                found[index] = _rgb(frame, first)
                if len(found) == len(wanted):
                    return np.stack([found[index] for index in indices])
    if len(keys_before):  # the container landed too late
        return _read_pyav(path, indices, scan, seek=False)
    raise Unreadable(path, f"frame {min(wanted - found.keys())} of {scan.info.frames} cannot be decoded")
