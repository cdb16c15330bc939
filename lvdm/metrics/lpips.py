"""LPIPS v0.1, learned perceptual distance of frames (Zhang et al. 2018, arXiv:1801.03924), as metric and as loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from lvdm import weights
from lvdm.errors import UserError, nearest
from lvdm.metrics.frames import require_pair


@dataclass(frozen=True)
class Trunk:
    """The convolutional part of a classifier, up to the last layer that is compared."""

    convs: tuple[tuple[int, int, int, int, int], ...]
    """in, out, kernel, stride, padding; each is followed by a ReLU."""
    pool: int
    """Window of the maximum pools, whose stride is 2."""
    pool_before: tuple[int, ...]
    """The convolutions with a pool before them."""
    taps: tuple[int, ...]
    """The convolutions whose activations are compared."""
    smallest: int
    """Sides in pixels below which nothing is left at the last layer."""


_VGG = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
TRUNKS = {
    "alex": Trunk(
        convs=((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)),
        pool=3,
        pool_before=(1, 2),
        taps=(0, 1, 2, 3, 4),
        smallest=31,
    ),
    "vgg": Trunk(
        convs=tuple((c_in, c_out, 3, 1, 1) for c_in, c_out in pairwise(_VGG)),
        pool=2,
        pool_before=(2, 4, 7, 10),
        taps=(1, 3, 6, 9, 12),
        smallest=16,
    ),
}


class LPIPS(nn.Module):
    """Distance of two batches of frames. Frozen, but gradients reach the frames; under autocast the trunk runs in the
    lower precision and the comparison in fp32.

    `net` is "alex" (the usual metric) or "vgg" (the usual loss; the two scales differ). `spatial` enlarges each layer's
    map of distances to the size of the frames before its mean is taken, as OD-VAE's evaluation does: other numbers,
    hence another `name`. `weights_sha256` names the published weights; it is None with `pretrained=False` (random
    trunk, equal heads), which is for tests.
    """

    def __init__(self, net: str = "alex", spatial: bool = False, pretrained: bool = True):
        super().__init__()
        if net not in TRUNKS:
            raise UserError(f"unknown LPIPS net {net!r}{nearest(net, TRUNKS)}; known: {', '.join(TRUNKS)}")
        self.net, self.spatial, self.trunk, self.weights_sha256 = net, spatial, TRUNKS[net], None
        self.name = f"lpips-{net}{'-spatial' if spatial else ''}"
        self.convs = nn.ModuleList(nn.Conv2d(*conv) for conv in self.trunk.convs)
        widths = [self.trunk.convs[tap][1] for tap in self.trunk.taps]
        self.heads = nn.ParameterList(torch.full((width,), 1 / width) for width in widths)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        if pretrained:
            state, self.weights_sha256 = weights.load(f"lpips-{net}")
            self.load_state_dict(state)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Frames (N, 3, H, W) twice, in [-1, 1], to distances (N,) in fp32. Raises UserError for frames too small."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < self.trunk.smallest:
            raise UserError(
                f"LPIPS ({self.net}) expects two batches of one shape (N, 3, H, W), sides of at least "
                f"{self.trunk.smallest}, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        total = torch.zeros(len(x), device=x.device)
        for head, a, b in zip(self.heads, self._features(x), self._features(y), strict=True):
            with torch.autocast(x.device.type, enabled=False):
                difference = (_unit(a.float()) - _unit(b.float())).square()
                distances = (difference * head.float().view(-1, 1, 1)).sum(dim=1, keepdim=True)
                if self.spatial:
                    distances = F.interpolate(distances, x.shape[2:], mode="bilinear", align_corners=False)
                total = total + distances.mean(dim=(1, 2, 3))
        return total

    def video(self, x: torch.Tensor, y: torch.Tensor, chunk: int = 16) -> torch.Tensor:
        """Distances of all frames: (B, 3, T, H, W) twice, in [-1, 1], to (B, T); `chunk` frames at a time."""
        require_pair(x, y)
        frames_x, frames_y = x.transpose(1, 2).flatten(0, 1), y.transpose(1, 2).flatten(0, 1)
        pairs = zip(frames_x.split(chunk), frames_y.split(chunk), strict=True)
        return torch.cat([self(a, b) for a, b in pairs]).unflatten(0, (x.shape[0], x.shape[2]))

    def _features(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The activations that are compared, (N, C, h, w) each."""
        x = (x - self.shift) / self.scale
        if x.is_cuda:  # whose convolutions are faster so, and keep it
            x = x.contiguous(memory_format=torch.channels_last)
        for i, conv in enumerate(self.convs):
            if i in self.trunk.pool_before:
                x = F.max_pool2d(x, self.trunk.pool, stride=2)
            x = F.relu(conv(x))
            if i in self.trunk.taps:
                yield x


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Scales the channels of every pixel to length 1."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
