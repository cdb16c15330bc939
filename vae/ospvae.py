"""Open-Sora-Plan's causal VAEs before OD-VAE (releases 1.0 and 1.1): steps in space and steps in time alternate."""

from functools import partial

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from lvdm.errors import UserError
from vae.blocks import CUBE, FRAME, POINT, CausalConv3d, FrameAttention, Norm, StreamState, Upsample, interpolated
from vae.odvae import ALL_2D_OUTSIDE, ODFamily, check_options
from vae.skeleton import Decoder, Encoder, Plan
from vae.spec import VAESpec

RELEASES = {  # kinds of the encoder's levels; its first kernel; the levels that halve time; blended; legacy attention
    "1.0": (("3d",) * 4, CUBE, (0, 1), False, True),
    "1.1": (ALL_2D_OUTSIDE, FRAME, (1, 2), True, False),
}


class OSPVAE(ODFamily):
    """The VAE of Open-Sora-Plan 1.0 or 1.1 ("VAE-OSP" in table 1 of CV-VAE): 4x8x8 compression, T = 4n + 1 frames.

    Args:
        z: latent channels.
        width: channels of level 0; level i has `width * mult[i]`.
        mult: channel multipliers of the four levels.
        blocks: residual blocks a level of the encoder; the decoder has one more.
        release: "1.0" (all blocks 3D, time by averages and interpolation alone, the attention that mixes up time and
            channels) or "1.1" (outer blocks of the encoder 2D, each step in time blended with a convolution).
        latent_mean, latent_std: a channel, measured on training data; None means 0 and 1 / 0.18215.
    """

    @register_to_config
    def __init__(
        self,
        z: int = 4,
        width: int = 128,
        mult: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        release: str = "1.1",
        latent_mean: tuple[float, ...] | None = None,
        latent_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        check_options(self.options)
        if str(release) not in RELEASES:  # a YAML file gives a number
            raise UserError(f"release={release}: expected one of {', '.join(RELEASES)}; OD-VAE (odvae) is 1.2")
        kinds, begin, halved, blend, legacy = RELEASES[str(release)]
        attention = partial(FrameAttention, norm=partial(Norm, mode="clip"), legacy_reshape=legacy)
        plan = partial(Plan, [width * m for m in mult], blocks, norm="clip", mid_attention=attention)
        self.encoder = Encoder(2 * z, plan(kinds), lambda i, c: Down(c, i in halved, blend), begin)
        self.quant_conv = CausalConv3d(2 * z, 2 * z, POINT)
        self.decoder = Decoder(z, plan(("3d",) * 4), lambda i, c: Up(c, i in (3, 2), blend))

    @property
    def spec(self) -> VAESpec:
        c = self.options
        return VAESpec(
            time_factor=4,
            space_factor=8,
            latent_channels=c.z,
            latent_mean=tuple(c.latent_mean or ()),
            latent_std=tuple(c.latent_std or (1 / 0.18215,) * c.z),
            inexact="its norms take the statistics of the whole clip and its upsampling looks ahead",
        )


class Down(nn.Module):
    """Space by 2, then time by 2 where `halve`."""

    def __init__(self, channels: int, halve: bool, blend: bool):
        super().__init__()
        self.space = CausalConv3d(channels, channels, FRAME, (1, 2, 2))
        self.time = TimeDown(channels, blend) if halve else nn.Identity()

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.time(self.space(x))


class Up(nn.Module):
    """Space by 2 (nearest, convolution), then time by 2 where `double`."""

    def __init__(self, channels: int, double: bool, blend: bool):
        super().__init__()
        self.space = Upsample(channels, 1, "nearest")
        self.time = TimeUp(channels, blend) if double else nn.Identity()

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.time(self.space(x))


class Blend(nn.Module):
    """A change of length without weights, alone or, with `blend`, in a learned mixture with a convolution."""

    def __init__(self, channels: int, blend: bool, stride: tuple[int, int, int]):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, CUBE, stride) if blend else None
        self.mix_factor = nn.Parameter(torch.tensor([2.0])) if blend else None

    def _blended(self, plain: Tensor, x: Tensor) -> Tensor:
        if self.conv is None:
            return plain
        share = self.mix_factor.sigmoid().to(plain.dtype)  # in fp32 it would widen both under autocast
        return share * plain + (1 - share) * self.conv(x)


class TimeDown(Blend):
    """T -> (T + 1) / 2: the mean of a frame and the two before it, the first frame replicated to the front."""

    def __init__(self, channels: int, blend: bool):
        super().__init__(channels, blend, (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.cat([*[x[:, :, :1]] * 2, x], 2)
        mean = (padded[:, :, :-2:2] + padded[:, :, 1:-1:2] + padded[:, :, 2::2]) / 3
        return self._blended(mean, x)


class TimeUp(Blend):
    """T -> 2T - 1: the first frame stays, the others are interpolated linearly (half-pixel centres)."""

    def __init__(self, channels: int, blend: bool):
        super().__init__(channels, blend, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], interpolated(x[:, :, 1:], 2, 1)], 2)
        return self._blended(x, x)
