"""Videos and pictures as files: mp4 that browsers play, files without loss, contact sheets, from floats to bytes."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from PIL import Image, ImageDraw

from lvdm.errors import UserError
from lvdm.files import replacing

# The matrix is the one that FFmpeg converts RGB with; players guess another one for large untagged pictures.
# One thread: with several, equal frames may give other bytes.
H264 = {
    "crf": "12",
    "threads": "1",
    "colorspace": "smpte170m",
    "color_primaries": "smpte170m",
    "color_trc": "smpte170m",
}


def to_float(video: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return video.to(torch.float32) / 127.5 - 1


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Floats of any shape, clamped to [-1, 1], -> the nearest uint8; the inverse of `to_float`."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def write_video(path: str | Path, frames: Iterable[np.ndarray | torch.Tensor], fps: float) -> None:
    """Writes `frames`, uint8 RGB (T, H, W, 3) or an iterable of (H, W, 3), in the format of the path's suffix.

    .mp4 looks lossless (see `write_mp4`); .mkv (FFV1) and .npy (uint8 (T, H, W, 3), which keeps no `fps`) are so, bit
    by bit. Frames are written as they come, so a generator of any length takes flat memory. The file appears when it is
    complete. Raises UserError for another suffix, where `fps` is not positive and where there is no frame.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise UserError(f"{path}: expected a name that ends in {', '.join(WRITERS)}")
    WRITERS[path.suffix](path, frames, fps)


def write_mp4(path: str | Path, frames: Iterable[np.ndarray | torch.Tensor], fps: float) -> None:
    """`write_video` as H.264 of crf 12. Odd sizes are padded to even ones by repeating the border."""

    def even(frame: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    codec = {"codec_name": "libx264", "pix_fmt": "yuv420p", "options": H264}
    options = {"movflags": "faststart"}
    _encode(Path(path), (even(np.asarray(frame)) for frame in frames), fps, codec, format="mp4", options=options)


def _write_ffv1(path: Path, frames: Iterable[np.ndarray | torch.Tensor], fps: float) -> None:
    codec = {"codec_name": "ffv1", "pix_fmt": "bgr0"}  # RGB as it is: any YUV rounds
    _encode(path, map(np.asarray, frames), fps, codec, format="matroska")


def _encode(path: Path, frames: Iterable[np.ndarray], fps: float, codec: dict[str, Any], **container: Any) -> None:
    rate = Fraction(fps).limit_denominator(1001)  # 29.97... is 30000/1001
    if rate <= 0:
        raise UserError(f"{path}: {fps} is not a frame rate")
    with replacing(path) as part, av.open(str(part), "w", **container) as file:
        stream = file.add_stream(rate=rate, **codec)
        for frame in frames:
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if not stream.codec_context.is_open:
            raise UserError(f"{path}: there are no frames to write")
        file.mux(stream.encode())


def _write_npy(path: Path, frames: Iterable[np.ndarray | torch.Tensor], fps: float) -> None:
    with replacing(path) as part, open(part, "wb") as file:
        shape: tuple[int, ...] = ()
        for frame in map(np.asarray, frames):
            if not shape:
                _npy_header(file, shape := (0, *frame.shape))
            file.write(frame.tobytes())
            shape = (shape[0] + 1, *shape[1:])
        if not shape:
            raise UserError(f"{path}: there are no frames to write")
        file.seek(0)
        _npy_header(file, shape)  # of the same length: NumPy leaves room for a first axis that grows


def _npy_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


WRITERS = {".mp4": write_mp4, ".mkv": _write_ffv1, ".npy": _write_npy}


def read_video(path: str | Path) -> torch.Tensor:
    """The frames of a file that `write_video` wrote, uint8 (T, H, W, 3)."""
    if Path(path).suffix == ".npy":
        return torch.from_numpy(np.load(path))
    with av.open(str(path)) as file:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)])


def contact_sheet(
    videos: Sequence[torch.Tensor], path: str | Path, columns: int = 8, labels: Sequence[str] | None = None
) -> None:
    """Writes a PNG with a row a video, uint8 (T, H, W, 3): `columns` frames evenly spaced from its first to its last,
    the label above. Videos may differ in length and size."""
    path = Path(path)
    head = 16 if labels else 0
    strips = []
    for video in videos:
        picks = torch.linspace(0, len(video) - 1, min(columns, len(video))).round().long()
        strips.append(torch.cat(list(video[picks]), dim=1).numpy())
    width, height = max(strip.shape[1] for strip in strips), sum(strip.shape[0] + head for strip in strips)
    sheet, y = Image.new("RGB", (width, height), "white"), 0
    for i, strip in enumerate(strips):
        if labels:
            ImageDraw.Draw(sheet).text((2, y + 2), labels[i], fill="black")
        sheet.paste(Image.fromarray(strip), (0, y + head))
        y += head + strip.shape[0]
    with replacing(path) as part:
        sheet.save(part, format="PNG")
