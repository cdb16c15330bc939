"""What turns videos into the feature vectors that set metrics compare."""

import typing
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm import weights
from lvdm.errors import UserError, nearest
from lvdm.metrics.i3d import I3D

NAMES = ("i3d", "i3d-torchscript", "videomae", "inception", "c3d", "pixels", "timm:NAME")
"""What `make_extractor` takes."""


class FeatureExtractor(typing.Protocol):
    """Maps videos to vectors, each row on its own; the attributes go into the metric's protocol."""

    name: str
    weights_sha256: str | None
    resize: str
    """How frames are brought to the network's size, in words."""
    dim: int
    min_frames: int
    per: typing.Literal["clip", "frame"]
    """What a row is of."""

    def __call__(self, videos: Tensor) -> Tensor:
        """(B, 3, T >= min_frames, H, W) in [-1, 1], any size, to (B, dim) fp32; (B * T, dim) with per="frame"."""


def make_extractor(name: str, device: torch.device | str = "cpu", weights: str = "") -> FeatureExtractor:
    """The extractor called `name`, see `NAMES`; `weights` is the user's file, folder or hub id where it takes one.

    UserError for an unknown name, weights that are missing or of another kind, and a package that is not installed.
    """
    from lvdm.metrics import backbones as b  # some of these import much

    takes_none = {"i3d": I3DFeatures, "pixels": PixelFeatures}
    takes = {"i3d-torchscript": b.I3DScript, "videomae": b.VideoMAE, "inception": b.Inception, "c3d": b.C3D}
    if name in takes_none:
        if weights:
            raise UserError(f"weights={weights}: features={name} takes no weights; they are for {', '.join(takes)}")
        return takes_none[name](device)
    if name in takes:
        return takes[name](device, weights)
    if name.startswith("timm:"):
        return b.Timm(name.removeprefix("timm:"), device, weights)
    raise UserError(f"unknown features {name!r}{nearest(name, NAMES)}; known: {', '.join(NAMES)}")


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """Convolutions in true fp32, whatever the program has chosen: autocast and TF32 move a metric's features."""
    convolutions = torch.backends.cudnn.conv
    chosen, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision = chosen


def require_videos(videos: Tensor, name: str, min_frames: int) -> None:
    """UserError unless these are (B, 3, T >= min_frames, H, W) with finite values in [-1, 1]."""
    if videos.ndim != 5 or videos.shape[1] != 3 or videos.shape[2] < min_frames:
        raise UserError(f"{name} expects (B, 3, T >= {min_frames}, H, W), got {tuple(videos.shape)}")
    low, high = (value.item() for value in videos.aminmax())
    if not (low >= -1 and high <= 1):
        raise UserError(f"{name} expects values in [-1, 1], got {low:g} to {high:g}: scale or clamp")


def resized(frames: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) to (N, 3, size, size), bilinear, whole: the aspect is not kept."""
    if frames.shape[-2:] == (size, size):
        return frames
    return F.interpolate(frames, size=(size, size), mode="bilinear", align_corners=False)


class I3DFeatures:
    """The 400 logits of I3D on Kinetics-400: the features of FVD (Unterthiner et al. 2018, arXiv:1812.01717)."""

    name = "i3d"
    resize = "bilinear 224x224, whole frame, align_corners=False"
    dim = 400
    min_frames = 9
    per = "clip"

    def __init__(self, device: torch.device | str = "cpu"):
        state, self.weights_sha256 = weights.load("i3d")
        self.device, self.model = device, I3D().eval().requires_grad_(False)
        self.model.load_state_dict(state)
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """(B, 3, T >= 9, H, W) in [-1, 1], any size, to (B, 400) fp32 on the extractor's device.

        Each frame is resized as a whole: the aspect is not kept. Raises UserError for fewer frames than `min_frames`
        and for values outside [-1, 1] (clamp first).
        """
        require_videos(videos, "I3D", self.min_frames)
        with full_precision(self.device):
            frames = videos.to(self.device, torch.float32).transpose(1, 2).flatten(0, 1)
            return self.model(resized(frames, 224).unflatten(0, (len(videos), -1)).transpose(1, 2))


class PixelFeatures:
    """The video shrunk to 8x8 pixels and 2 frames: 384 numbers without weights, for tests and trial runs only."""

    name = "pixels"
    weights_sha256 = None
    resize = "average-pooled to 2x8x8"
    dim = 384
    min_frames = 1
    per = "clip"

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] to (B, 384) fp32."""
        require_videos(videos, "pixels", self.min_frames)
        return F.adaptive_avg_pool3d(videos.to(self.device, torch.float32), (2, 8, 8)).flatten(1)
