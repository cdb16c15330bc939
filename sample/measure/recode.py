"""What storing clips in a lossy format does to them."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import av
import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from lvdm.media import to_float, to_uint8
from sample.measure.sets import VideoSet


class Recoded(VideoSet):
    """Clips after a codec: what storing them does. `codec` is a name of `CODECS`."""

    def __init__(self, of: VideoSet, codec: str):
        self.of, self.codec, self.name, self.sources = of, codec, f"{of.name}, {codec}", of.sources
        self.frames, self.size, self.stride, self.fps = of.frames, of.size, of.stride, of.fps
        self.libraries = of.libraries
        self.paces, self.note = of.paces, ", then ".join(filter(None, [of.note, codec]))

    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        return {"recoded": self.of.key(numbers), "codec": self.codec, "libraries": [av.__version__, PIL.__version__]}

    def grouped(self, groups: Sequence[Sequence[int]], workers: int) -> Iterator[Tensor]:
        for x in self.of.grouped(groups, workers):
            clips = [CODECS[self.codec](clip.permute(1, 2, 3, 0).numpy()) for clip in to_uint8(x.cpu())]
            yield to_float(torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).to(x.device))


def jpeg(frames: np.ndarray, quality: int) -> np.ndarray:
    """uint8 (T, H, W, 3) after JPEG, frame by frame."""
    pictures = []
    for frame in frames:
        Image.fromarray(frame).save(data := io.BytesIO(), format="JPEG", quality=quality)
        pictures.append(np.array(Image.open(data)))
    return np.stack(pictures)


def h264(frames: np.ndarray, crf: int) -> np.ndarray:
    """uint8 (T, H, W, 3) after H.264 in yuv420p."""
    with av.open(data := io.BytesIO(), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=25, pix_fmt="yuv420p", options={"crf": str(crf), "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    data.seek(0)
    with av.open(data) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


CODECS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "npy (8 bits)": lambda frames: frames,
    "mp4, crf 18": lambda frames: h264(frames, 18),
    "mp4, crf 28": lambda frames: h264(frames, 28),
    "jpg, quality 75": lambda frames: jpeg(frames, 75),
}
