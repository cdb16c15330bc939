"""TATS: a 3D VQGAN of strided and transposed convolutions that look both ways in time."""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vae.blocks import CUBE, POINT, Normalisation, ResBlock, StreamState
from vae.discrete import DiscreteVAE, nearest_codes
from vae.options import check_choices, check_counts
from vae.spec import VAESpec

NORMS = ("batch", "group")
STRIDES = (2, 2, 2), (2, 2, 2), (1, 2, 2)
"""Of the encoder's convolutions, and in the same order of the decoder's."""


class TATS(DiscreteVAE):
    """TATS's VQGAN (3.1), 4x8x8, T = 4n frames.

    The codebook is a running mean, so a buffer and no parameter; the features go to the nearest code.

    Args:
        z: channels of the codebook and of the features before it.
        width: channels of the first convolution, doubled by each strided one.
        blocks: residual blocks a level of the encoder; the decoder has one more.
        codes: size of the codebook.
        norm: "batch" (the published weights) or "group" (the default of the code), 32 groups.
    """

    @register_to_config
    def __init__(self, z: int = 256, width: int = 32, blocks: int = 1, codes: int = 16384, norm: str = "batch"):
        super().__init__()
        check_counts(self.options, "z", "width", "blocks", "codes")
        check_choices(self.options, {"norm": NORMS})
        norms = nn.BatchNorm3d if norm == "batch" else _group_norm
        widths = [width * 2**i for i in range(len(STRIDES) + 1)]
        self.encoder = Encoder(z, widths, blocks, norms)
        self.register_buffer("codebook", torch.randn(codes, z))
        self.decoder = Decoder(z, widths, blocks + 1, norms)
        self.eval()

    @property
    def spec(self) -> VAESpec:
        statistics = " and its norms take the statistics of the whole clip" if self.options.norm == "group" else ""
        return VAESpec(
            time_factor=4,
            space_factor=8,
            latent_channels=self.options.z,
            first_frames=4,
            inexact="its convolutions look ahead" + statistics,
            discrete=True,
        )

    def _moments(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.encoder(x / 2)  # trained on [-0.5, 0.5]

    def _quantise(self, h: Tensor) -> Tensor:
        return nearest_codes(h, self.codebook)

    def _frames(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        return 2 * self.decoder(z)


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> (B, z, T/4, H/8, W/8)."""

    def __init__(self, z: int, widths: list[int], blocks: int, norm: Normalisation):
        super().__init__()
        self.conv_in = SameConv3d(3, widths[0])
        self.downs, self.levels = nn.ModuleList(), nn.ModuleList()
        for stride, channels, out in zip(STRIDES, widths[:-1], widths[1:], strict=True):
            self.downs.append(SameConv3d(channels, out, (4, 4, 4), stride))
            self.levels.append(_blocks(out, blocks, norm))
        self.norm_out = norm(widths[-1])
        self.quant_conv = SameConv3d(widths[-1], z, POINT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for down, level in zip(self.downs, self.levels, strict=True):
            h = level(down(h))
        return self.quant_conv(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, z, t, h, w) -> (B, 3, 4t, 8h, 8w). The first level keeps its channels, the others halve them."""

    def __init__(self, z: int, widths: list[int], blocks: int, norm: Normalisation):
        super().__init__()
        self.post_quant_conv = SameConv3d(z, widths[-1], POINT)
        self.norm_in = norm(widths[-1])
        self.ups, self.levels = nn.ModuleList(), nn.ModuleList()
        channels = widths[-1]
        for stride, out in zip(STRIDES, reversed(widths[1:]), strict=True):
            self.ups.append(SameConvTranspose3d(channels, out, (4, 4, 4), stride))
            self.levels.append(_blocks(out, blocks, norm))
            channels = out
        self.conv_out = SameConv3d(channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = F.silu(self.norm_in(self.post_quant_conv(z)))
        for up, level in zip(self.ups, self.levels, strict=True):
            h = level(up(h))
        return self.conv_out(h)


class SameConv3d(nn.Conv3d):
    """n values give n / stride: kernel - stride border values are repeated, the larger half in front."""

    def __init__(self, in_channels: int, out_channels: int, kernel=CUBE, stride=(1, 1, 1)):
        super().__init__(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return super().forward(_same(x, self.kernel_size, self.stride))


class SameConvTranspose3d(nn.ConvTranspose3d):
    """n values give n * stride: as in `SameConv3d` kernel - stride values are added, and what they grow is cut off."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...], stride: tuple[int, ...]):
        super().__init__(in_channels, out_channels, kernel, stride, padding=tuple(k - 1 for k in kernel))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_same(x, self.kernel_size, self.stride))


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    missing = [k - s for k, s in zip(kernel, stride, strict=True)]
    return F.pad(x, [side for n in reversed(missing) for side in (n - n // 2, n // 2)], mode="replicate")


def _blocks(channels: int, blocks: int, norm: Normalisation) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(channels, channels, "3d", norm, SameConv3d) for _ in range(blocks)))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)
