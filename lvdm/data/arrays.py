"""Videos as .npy files, uint8 RGB (T, H, W, 3), what `lvdm sample format=npy` writes: memory-mapped, never unpickled.

The functions are those of `lvdm.data.reader`, which asks them here wherever a path ends in .npy. Such a file does not
say its frame rate: `clip.json` beside `clip.npy` may, as {"fps": 24}; without it the rate is taken to be FPS.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lvdm.data.frames import FPS, Unreadable, VideoInfo, check_pixels, stat_file

SUFFIX = ".npy"


def is_array(path: str | Path) -> bool:
    """Whether `path` has the name of an array."""
    return str(path).lower().endswith(SUFFIX)


def probe(path: str | Path) -> VideoInfo:
    """What the head of `path` promises; raises `Unreadable` for all but uint8 (T, H, W, 3) of the size of the file."""
    count, height, width, _ = _open(path).shape
    return VideoInfo(count, rate_of(path) or FPS, width, height, False)


def pick(path: str | Path, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames `wanted` of `path` as uint8 RGB (H, W, 3), copied out of the file one by one."""
    video = _open(path)
    for index in wanted:
        yield np.array(video[index])


def iter_frames(path: str | Path, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """All frames of `path` in order as uint8 RGB (H, W, 3), or of `size` (width, height), averaged over areas."""
    for frame in pick(path, range(len(_open(path)))):
        yield np.array(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) if size else frame


def rate_of(path: str | Path) -> float | None:
    """The frames a second that the .json beside `path` states, None without one; raises `Unreadable` for nonsense."""
    note = beside(path)
    if not note.is_file():
        return None
    try:
        rate = float(json.loads(note.read_text())["fps"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Unreadable(path, f'{note.name} beside it does not say {{"fps": 24}}: {error}') from error
    if not (math.isfinite(rate) and rate > 0):
        raise Unreadable(path, f"{note.name} beside it gives {rate:g} frames a second")
    return rate


def beside(path: str | Path) -> Path:
    """The .json that may say the rate of an array."""
    return Path(path).with_suffix(".json")


def _open(path: str | Path) -> np.ndarray:
    stat_file(path)
    try:
        video = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:  # pickles and files cut short among them
        raise Unreadable(path, f"not an array of numbers that can be mapped ({error})") from error
    if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3:
        raise Unreadable(path, f"expected uint8 (T, H, W, 3), it holds {_what(video)}")
    if not all(video.shape):
        raise Unreadable(path, f"holds no frame: {video.shape}")
    check_pixels(path, video.shape[2], video.shape[1])
    return video


def _what(video: object) -> str:
    """What an array is, and that its numbers are not finite where that is so."""
    if not isinstance(video, np.ndarray):
        return type(video).__name__
    odd = video.dtype.kind == "f" and video.size and not np.isfinite([video.min(), video.max()]).all()
    return f"{video.dtype} {video.shape}" + (", NaN or infinity among it" if odd else "")
