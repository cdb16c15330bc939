"""Pictures and videos for people: mp4 files that browsers play, contact sheets, and the way from floats to bytes."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

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


def write_mp4(path: str | Path, frames: Iterable[np.ndarray | torch.Tensor], fps: float) -> None:
    """Writes `frames`, uint8 RGB (T, H, W, 3) or an iterable of (H, W, 3), as H.264 that looks lossless (crf 12).

    Frames are encoded as they come, so a generator of any length takes flat memory. Odd sizes are padded to even ones
    by repeating the border. The file appears when it is complete. Raises UserError when `fps` is not
    positive or there is no frame.
    """
    path = Path(path)
    rate = Fraction(fps).limit_denominator(1001)  # 29.97... is 30000/1001
    if rate <= 0:
        raise UserError(f"{path}: {fps} is not a frame rate")
    options = {"movflags": "faststart"}
    with replacing(path) as part, av.open(str(part), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, pix_fmt="yuv420p", options=H264)
        for frame in frames:
            frame = np.asarray(frame)
            height, width = frame.shape[:2]
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if not stream.codec_context.is_open:
            raise UserError(f"{path}: there are no frames to write")
        container.mux(stream.encode())


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
