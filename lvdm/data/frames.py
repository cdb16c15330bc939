"""Pictures as video: a folder of frames (SkyTimelapse and many others), or one image, which is a video of one frame.

`probe`, `pick` and `iter_frames` are those of `lvdm.data.reader`, which asks them here wherever a path is a folder or a
picture.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lvdm.errors import UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
FPS = 25.0  # of frames in files, which do not say
MAX_PIXELS = 2**26  # of one frame, video or not (8192 x 8192): a damaged head may promise anything
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever the name says: others run programs (EPS)
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF: the tag, and its values that swap width and height


class Unreadable(UserError):
    """A video that cannot be decoded (so far as was asked); the message names the file and the reason."""

    def __init__(self, path: str | Path, reason: object):
        self.reason = _why(reason)
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


def is_pictures(path: str | Path) -> bool:
    """Whether `path` is a folder, or has the name of a picture; all else is for FFmpeg."""
    return str(path).lower().endswith(SUFFIXES) or os.path.isdir(path)


def stat_file(path: str | Path) -> os.stat_result:
    """`os.stat` of a regular file; raises `Unreadable` for all else (opening a pipe would wait for its writer)."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise Unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable(path, "not a regular file")
    return found


def check_pixels(path: str | Path, width: int, height: int) -> None:
    """Raises `Unreadable` where a frame of this size is not worth the memory."""
    if width * height > MAX_PIXELS:
        raise Unreadable(path, f"promises frames of {width}x{height}, more than {MAX_PIXELS} pixels")


def probe(path: str | Path) -> VideoInfo:
    """Counts the pictures of `path` by name and decodes the first one, no more; `fps` is FPS, and not measured."""
    files = pictures_of(path)
    try:
        found = stat_file(files[0])
        width, height = _size(files[0], found.st_mtime_ns, found.st_size)
    except Unreadable as error:
        raise _of(path, files[0], error) from error
    return VideoInfo(len(files), FPS, width, height, False)


def pick(path: str | Path, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """The pictures `wanted` of `path` as uint8 RGB (H, W, 3). All have the size of the first one of the folder."""
    info, files = probe(path), pictures_of(path)
    for index in wanted:
        yield _picture(path, files[index], (info.width, info.height))


def iter_frames(path: str | Path, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """All pictures of `path` in order as uint8 RGB (H, W, 3), or of `size` (width, height), averaged over areas."""
    info = probe(path)
    for file in pictures_of(path):
        yield _picture(path, file, (info.width, info.height), size)


def pictures_of(path: str | Path) -> tuple[str, ...]:
    """The pictures of a folder in order, or the one that `path` is."""
    try:
        if not os.path.isdir(path):
            return (str(path),)
        files = _list(str(path), os.stat(path).st_mtime_ns)
    except OSError as error:
        raise Unreadable(path, error) from error
    if not files:
        raise Unreadable(path, f"no frames in this folder (looked for {' '.join(SUFFIXES)})")
    return files


@lru_cache(maxsize=1024)
def _list(folder: str, mtime_ns: int) -> tuple[str, ...]:
    """Kept until a file comes or goes. Hidden files are left out ("._x.jpg" of macOS)."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.name[0] != "." and not e.is_dir()]
    return tuple(os.path.join(folder, name) for name in sorted(names, key=_order))


def _order(name: str) -> tuple[bool, int, str]:
    """By the number after the last underscore of the stem, else by the last number in it, else (and last) by name."""
    stem = name.rpartition(".")[0]
    numbers = re.findall(r"_([0-9]+)$", stem) or re.findall(r"[0-9]+", stem)
    return not numbers, int(numbers[-1]) if numbers else 0, name


@lru_cache(maxsize=1024)
def _size(file: str, mtime_ns: int, size: int) -> tuple[int, int]:
    """(width, height) as shown, of a picture that can be decoded; kept for as long as the file does not change."""
    return _decode(file)[1]


def _picture(
    path: str | Path, file: str, size: tuple[int, int], thumbnail: tuple[int, int] | None = None
) -> np.ndarray:
    """One frame of `path`, whose frames have this `size` (width, height)."""
    try:
        picture, found = _decode(file, thumbnail)
        if found != size:
            raise Unreadable(file, f"is {found[0]}x{found[1]}, the first frame is {size[0]}x{size[1]}")
    except Unreadable as error:
        raise _of(path, file, error) from error
    return np.array(picture)


def _decode(file: str, thumbnail: tuple[int, int] | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture in RGB, turned as its EXIF says, and its (width, height); of an animation the first picture."""
    stat_file(file)
    try:
        with Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            check_pixels(file, width, height)
            if thumbnail:
                image.draft("RGB", thumbnail)  # JPEG decodes at 1/8, 1/4 or 1/2 of the size for little
            image.load()
            if image.getexif().get(_ORIENTATION) in _SIDEWAYS:
                width, height = height, width
            picture = _rgb(file, ImageOps.exif_transpose(image))
            return picture.resize(thumbnail, Image.Resampling.BOX) if thumbnail else picture, (width, height)
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable(file, f"not a picture that can be read ({' '.join(_FORMATS)})") from error
    except Exception as error:  # a damaged file makes Pillow raise many kinds, SyntaxError and struct.error too
        raise Unreadable(file, error) from error


def _rgb(file: str, image: Image.Image) -> Image.Image:
    """8 bits a channel without alpha; of 16 bits the upper eight, as Pillow does where there are three channels."""
    if image.mode in ("I", "F"):
        raise Unreadable(file, "its 32-bit channels have no known range: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _of(path: str | Path, file: str, error: Unreadable) -> Unreadable:
    """`error` of a `file` told as one of `path`, which may be its folder."""
    return Unreadable(path, error.reason if str(path) == file else f"{os.path.basename(file)}: {error.reason}")


def _why(reason: Any) -> str:
    """One line. FFmpeg's and the system's errors carry number and file name as well; the sentence is enough."""
    lines = str(getattr(reason, "strerror", None) or reason).strip().splitlines()
    return lines[-1] if lines else type(reason).__name__
