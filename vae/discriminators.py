"""The adversary of VAE training: a patch discriminator over space and time."""

import torch.nn.functional as F
from torch import Tensor, nn

from vae.blocks import norm_groups


class PatchGAN3D(nn.Module):
    """3D PatchGAN: (B, 3, T, H, W) in [-1, 1] -> logits a patch (B, 1, ~T/4, ~H/8, ~W/8); images are T = 1.

    Five 3x3x3 convolutions (space by 8, time by 4, three layers after the first), as OD-VAE trains against
    (4,665,729 parameters at width 64). `norm="group"` is the default: `"batch"`, as published, makes the loss depend on
    how a global batch is split over processes.
    """

    def __init__(self, width: int = 64, norm: str = "group"):
        super().__init__()
        strides = ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 1))
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = 3
        for i, stride in enumerate(strides):
            out = width * 2**i
            self.convs.append(nn.Conv3d(channels, out, 3, stride, 1, bias=i == 0))
            if i:
                self.norms.append(nn.BatchNorm3d(out) if norm == "batch" else nn.GroupNorm(norm_groups(out), out))
            channels = out
        self.out = nn.Conv3d(channels, 1, 3, 1, 1)
        self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.convs[0](x), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.out(h)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm3d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
