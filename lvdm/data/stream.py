"""One video of any length and size in float pieces, for programs that never hold all of it."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm.data.clips import resize
from lvdm.data.reader import iter_frames
from lvdm.media import to_float


def read_pieces(
    path: str | Path, count: int, short_side: int = 0, stride: int = 1, length: int = 8
) -> Iterator[Tensor]:
    """Every `stride`-th of the first `count` frames as (1, 3, `length`, H, W) floats in [-1, 1], the last one shorter.

    `short_side` > 0 resizes (antialiased) until the shorter side has so many pixels. Raises `Unreadable` at the first
    frame that cannot be decoded.
    """
    pictures = islice(iter_frames(path), 0, count, stride)
    while piece := list(islice(pictures, length)):
        video = torch.stack([torch.as_tensor(picture) for picture in piece])
        video = resize(video, short_side) if short_side else video.permute(0, 3, 1, 2)
        yield to_float(video.transpose(0, 1)[None])


def pad_to(video: Tensor, factor: int) -> Tensor:
    """(B, C, T, H, W) whose border is repeated to the right and below until `factor` divides H and W."""
    height, width = video.shape[-2:]
    return F.pad(video, (0, -width % factor, 0, -height % factor, 0, 0), mode="replicate")
