"""Inflated 3D Inception (Carreira and Zisserman 2017, arXiv:1705.07750), the network behind FVD.

The layers keep the names of the original TensorFlow graph. Batch norms are folded into the convolutions.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

Window = tuple[int, int, int]

MIXED = {  # channels in, and out of the six convolutions
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}


def pad_same(x: torch.Tensor, kernel: Window, stride: Window) -> torch.Tensor:
    """Zero-pads (B, C, T, H, W) as TensorFlow's "SAME" does: by the input's size, the odd one at the end."""
    pads = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - (size % s or s), 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit(nn.Conv3d):
    """Convolution and ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1):
        super().__init__(c_in, c_out, kernel, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(pad_same(x, self.kernel_size, self.stride)), inplace=True)


class Pool(nn.Module):
    """Maximum over a window; padding with zeros is harmless because it always follows a ReLU."""

    def __init__(self, kernel: Window, stride: Window):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Inception block: four branches side by side, concatenated."""

    def __init__(self, c_in: int, c: tuple[int, ...]):
        super().__init__()

        def branch(**layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(OrderedDict(layers))

        self.Branch_0 = branch(Conv3d_0a_1x1=Unit(c_in, c[0], 1))
        self.Branch_1 = branch(Conv3d_0a_1x1=Unit(c_in, c[1], 1), Conv3d_0b_3x3=Unit(c[1], c[2], 3))
        self.Branch_2 = branch(Conv3d_0a_1x1=Unit(c_in, c[3], 1), Conv3d_0b_3x3=Unit(c[3], c[4], 3))
        self.Branch_3 = branch(MaxPool3d_0a_3x3=Pool((3, 3, 3), (1, 1, 1)), Conv3d_0b_1x1=Unit(c_in, c[5], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.children()], dim=1)


class I3D(nn.Sequential):
    """Videos (B, 3, T >= 9, 224, 224) in [-1, 1] to the 400 Kinetics logits (B, 400), averaged over time."""

    def __init__(self):
        def mixed(*names: str) -> dict[str, nn.Module]:
            return {name: Mixed(*MIXED[name]) for name in names}

        layers = {
            "Conv3d_1a_7x7": Unit(3, 64, 7, stride=2),
            "MaxPool3d_2a_3x3": Pool((1, 3, 3), (1, 2, 2)),
            "Conv3d_2b_1x1": Unit(64, 64, 1),
            "Conv3d_2c_3x3": Unit(64, 192, 3),
            "MaxPool3d_3a_3x3": Pool((1, 3, 3), (1, 2, 2)),
            **mixed("Mixed_3b", "Mixed_3c"),
            "MaxPool3d_4a_3x3": Pool((3, 3, 3), (2, 2, 2)),
            **mixed("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"),
            "MaxPool3d_5a_2x2": Pool((2, 2, 2), (2, 2, 2)),
            **mixed("Mixed_5b", "Mixed_5c"),
            "AvgPool3d": nn.AvgPool3d((2, 7, 7), stride=1),
            "Logits": nn.Sequential(OrderedDict(Conv3d_0c_1x1=nn.Conv3d(1024, 400, 1))),
        }
        super().__init__(OrderedDict(layers))

    def forward(self, videos: torch.Tensor) -> torch.Tensor:
        return super().forward(videos).mean(dim=(2, 3, 4))
