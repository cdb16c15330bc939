"""What turns videos into the feature vectors that distribution metrics compare."""

import typing
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from lvdm import weights
from lvdm.errors import UserError
from lvdm.metrics.i3d import I3D


class FeatureExtractor(typing.Protocol):
    """Maps videos to vectors, each row on its own; the attributes go into the metric's protocol."""

    name: str
    weights_sha256: str
    resize: str
    """How frames are brought to the network's size, in words."""
    dim: int
    min_frames: int

    def __call__(self, videos: torch.Tensor) -> torch.Tensor:
        """(B, 3, T >= min_frames, H, W) in [-1, 1], any size, to (B, dim) fp32."""


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


class I3DFeatures:
    """The 400 logits of I3D on Kinetics-400: the features of FVD (Unterthiner et al. 2018, arXiv:1812.01717)."""

    name = "i3d"
    resize = "bilinear 224x224, whole frame, align_corners=False"
    dim = 400
    min_frames = 9

    def __init__(self, device: torch.device | str = "cpu"):
        state, self.weights_sha256 = weights.load("i3d")
        self.device, self.model = device, I3D().eval().requires_grad_(False)
        self.model.load_state_dict(state)
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, videos: torch.Tensor) -> torch.Tensor:
        """(B, 3, T >= 9, H, W) in [-1, 1], any size, to (B, 400) fp32 on the extractor's device.

        Each frame is resized as a whole: the aspect is not kept. Raises UserError for fewer frames than `min_frames`
        and for values outside [-1, 1] (clamp first).
        """
        b, c, t = videos.shape[:3]
        if c != 3 or t < self.min_frames:
            raise UserError(f"I3D expects (B, 3, T >= {self.min_frames}, H, W), got {tuple(videos.shape)}")
        if videos.abs().amax() > 1:
            raise UserError(f"I3D expects values in [-1, 1], got up to {videos.abs().amax().item():g}: scale or clamp")
        with full_precision(self.device):
            frames = videos.to(self.device, torch.float32).transpose(1, 2).flatten(0, 1)
            frames = F.interpolate(frames, size=(224, 224), mode="bilinear", align_corners=False)
            return self.model(frames.unflatten(0, (b, t)).transpose(1, 2))
