"""IV-VAE: every feature has a 2D half, for the first frame of each group of four, and a 3D half, for the motion in it.

The channels are (2D half, 3D half) everywhere, in latents too. A convolution sees both and writes both; norm, attention
and the changes of size treat each half alone. Nothing looks past its group of frames, so streams are exact.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from lvdm.errors import UserError
from vae.base import VideoVAE
from vae.blocks import (
    CUBE,
    FRAME,
    POINT,
    CausalConv3d,
    Checkpointed,
    FrameAttention,
    GroupCausalConv3d,
    MidBlock,
    ResBlock,
    StreamState,
    batch_to_frames,
    begins,
    frames_to_batch,
    interleaved,
    norm_silu_conv,
    repeated,
)
from vae.options import check_counts, check_mult
from vae.spec import VAESpec
from vae.streams import Stage, down_stages, up_stages

GROUPS = (4, 4, 2, 1)
"""Frames a group at levels 0 to 3; time is halved between levels 1 and 2, and between 2 and 3."""
DILATIONS = (1, 3, 6, 9, 12)
PUBLISHED = {
    (4, 64): (1.3196, 0.1250),
    (8, 64): (1.0940, -0.0322),
    (16, 64): (0.9697, -0.1553),
    (16, 96): (0.7619, -0.0483),
}
"""(z, dim) -> the scale s and the mean m of the published latents, s * (z - m)."""


class IVVAE(VideoVAE):
    """IV-VAE (main paper 3; supplement 2.1, 2.2): 4x8x8 compression, T = 4n + 1 frames.

    Args:
        z: latent channels of both halves, even.
        dim: channels of a half at level 0, even; a half of level i has `dim * mult[i]`.
        mult: channel multipliers of the four levels.
        blocks: residual blocks a level of the encoder; the decoder has one more.
        latent_mean, latent_std: a channel, measured on training data; None means the published ones of this z and dim,
            0 and 1 where none were published.
    """

    @register_to_config
    def __init__(
        self,
        z: int = 4,
        dim: int = 64,
        mult: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        latent_mean: tuple[float, ...] | None = None,
        latent_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        _check_options(self.options)
        widths = [2 * dim * m for m in mult]
        self.encoder = IVEncoder(2 * z, widths, blocks)
        self.quant_conv = CausalConv3d(2 * z, 2 * z, POINT)
        self.post_quant_conv = CausalConv3d(z, z, POINT)
        self.decoder = IVDecoder(z, widths, blocks + 1)

    @property
    def spec(self) -> VAESpec:
        c = self.options
        scale, mean = PUBLISHED.get((c.z, c.dim), (1.0, 0.0))
        return VAESpec(
            time_factor=4,
            space_factor=8,
            latent_channels=c.z,
            latent_mean=tuple(c.latent_mean or (mean,) * c.z),
            latent_std=tuple(c.latent_std or (1 / scale,) * c.z),
        )

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.keyframe.weight  # of the 2D half: the one that draws images, too

    def _moments(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self._quantised(self.encoder(x, state))

    def _quantised(self, h: Tensor, state: StreamState | None = None) -> Tensor:
        mean_2d, logvar_2d, mean_3d, logvar_3d = self.quant_conv(h).chunk(4, 1)
        return torch.cat([mean_2d, mean_3d, logvar_2d, logvar_3d], 1)

    def _frames(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        return select_frames(self.decoder(self.post_quant_conv(z), state), state)

    def _stages(self, work: str) -> list[Stage]:
        if work == "encode":
            return [*down_stages(self.encoder), Stage(self._quantised, 4)]
        return [Stage(self.post_quant_conv, 4), *up_stages(self.decoder), Stage(select_frames, 1, step=GROUPS[0])]


class IVEncoder(Checkpointed):
    """(B, 3, T, H, W) -> (B, channels, t, H/8, W/8); `widths` are those of both halves."""

    def __init__(self, channels: int, widths: list[int], blocks: int):
        super().__init__()
        self.conv_in = KTCConv(3, widths[0], group=GROUPS[0])
        self.levels, self.downs = nn.ModuleList(), nn.ModuleList()
        for i, out in enumerate(widths):
            self.levels.append(_level(i, widths[max(0, i - 1)], out, blocks))
            if i < 3:
                self.downs.append(Down(out, GROUPS[i] // GROUPS[i + 1]))
        self.levels[3].insert(0, _attention(widths[2]))
        self.mid = _middle(widths[3])
        self.norm_out = RMSNorm(widths[3])
        self.conv_out = PyramidHead(widths[3], channels)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        for i in range(4):
            x = self.level(i, x, state)
            if i < 3:
                x = self.downs[i](x, state)
        return x

    def level(self, i: int, h: Tensor, state: StreamState | None = None) -> Tensor:
        """Level `i`, and what comes before the first or after the last."""
        if i == 0:
            h = self.conv_in(h, state)
        for block in self.levels[i]:
            h = self._run(block, h, state)
        return h if i < 3 else norm_silu_conv(self.mid(h, state), self.norm_out, self.conv_out)


class IVDecoder(Checkpointed):
    """(B, z, t, h, w) -> (B, 6, T, 8h, 8w): the frames as the 2D half draws them, and as the 3D half does.

    `self.levels` are in the order in which they run, from level 3 to level 0.
    """

    def __init__(self, z: int, widths: list[int], blocks: int):
        super().__init__()
        channels = widths[3]
        self.conv_in = CausalConv3d(z, channels, FRAME)
        self.mid = _middle(channels)
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for i in (3, 2, 1, 0):
            self.levels.append(_level(i, channels, widths[i], blocks))
            if i:
                self.ups.append(Up(widths[i], GROUPS[i - 1] // GROUPS[i]))
                channels = widths[i] // 2
        self.norm_out = RMSNorm(widths[0])
        self.conv_out = KTCConv(widths[0], 6, group=GROUPS[0])

    def forward(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        for i in range(4):
            z = self.level(i, z, state)
            if i < 3:
                z = self.ups[i](z, state)
        return z

    def level(self, i: int, h: Tensor, state: StreamState | None = None) -> Tensor:
        """The `i`-th level to run, and what comes before the first or after the last."""
        if i == 0:
            h = self.mid(self.conv_in(h), state)
        for block in self.levels[i]:
            h = self._run(block, h, state)
        return h if i < 3 else norm_silu_conv(h, self.norm_out, self.conv_out, state)


def select_frames(h: Tensor, state: StreamState | None = None) -> Tensor:
    """(B, 6, T, H, W) -> (B, 3, T, H, W): the first frame of the video and of each group from the 2D half, the others
    from the 3D half. What is not taken was never trained (supplement 3.6)."""
    keyframe, motion = h.chunk(2, 1)
    first = 1 if begins(select_frames, state) else 0
    video = motion.clone()
    video[:, :, :first] = keyframe[:, :, :first]
    video[:, :, first::4] = keyframe[:, :, first::4]
    return video


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of two halves


class KTCConv(nn.Module):
    """Both halves from all channels: a 2D convolution a frame gives the 2D half, a group causal one the 3D half."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = CUBE, group: int = 4):
        super().__init__()
        self.keyframe = CausalConv3d(in_channels, out_channels // 2, (1, *kernel[1:]))
        self.motion = GroupCausalConv3d(in_channels, out_channels // 2, kernel, group=group)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return torch.cat([self.keyframe(x), self.motion(x, state)], 1)


class RMSNorm(nn.Module):
    """Divides by the root mean square of the channels at each pixel, of each half alone, or of all with `halves=1`."""

    def __init__(self, channels: int, halves: int = 2):
        super().__init__()
        self.halves = halves
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = x.unflatten(1, (self.halves, -1))
        h = F.normalize(h, dim=2) * h.shape[2] ** 0.5
        return (h.flatten(1, 2) * self.weight.view(-1, 1, 1, 1)).to(x.dtype)  # autocast widens both


class Halves(nn.Module):
    """A module for the 2D half of the channels and one for the 3D half."""

    def __init__(self, keyframe: nn.Module, motion: nn.Module):
        super().__init__()
        self.keyframe, self.motion = keyframe, motion

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        keyframe, motion = x.chunk(2, 1)
        return torch.cat([self.keyframe(keyframe, state), self.motion(motion, state)], 1)


class PyramidHead(nn.Module):
    """The end of the encoder, a frame at a time: a 1x1 and five dilated 3x3 convolutions, mixed by a 1x1."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        dilated = (nn.Conv2d(in_channels, out_channels, 3, padding=d, dilation=d) for d in DILATIONS)
        self.branches = nn.ModuleList([nn.Conv2d(in_channels, out_channels, 1), *dilated])
        self.mix = nn.Conv2d(len(self.branches) * out_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = frames_to_batch(x)
        keyframes, motions = zip(*(branch(h).chunk(2, 1) for branch in self.branches), strict=True)
        return batch_to_frames(self.mix(torch.cat([*keyframes, *motions], 1)), len(x))


class Down(nn.Module):
    """Space by 2, then time by `time` but for the first frame: of two frames the 2D half takes the first, the 3D half
    a learned sum, which starts as the second (supplement 2.2, eq. 3)."""

    def __init__(self, channels: int, time: int):
        super().__init__()
        half = channels // 2
        self.time = self.step = time
        self.space = Halves(*(CausalConv3d(half, half, FRAME, (1, 2, 2)) for _ in range(2)))
        self.merge = nn.Conv3d(half, half, (2, 1, 1), (2, 1, 1)) if time == 2 else None
        if self.merge is not None:
            with torch.no_grad():
                nn.init.zeros_(self.merge.weight)
                nn.init.dirac_(self.merge.weight[:, :, 1:])
                nn.init.zeros_(self.merge.bias)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        h = self.space(x)
        if self.merge is None:
            return h
        first = 1 if begins(self, state) else 0
        keyframe, motion = h[:, :, first:].chunk(2, 1)
        pairs = motion.movedim(1, -1).unflatten(1, (-1, 2)).flatten(0, 1)  # none of an image: its gradient is 0
        motion = batch_to_frames(self.merge(pairs.movedim(-1, 1)).squeeze(2), len(x))
        return torch.cat([h[:, :, :first], torch.cat([keyframe[:, :, ::2], motion], 1)], 2)


class Up(nn.Module):
    """Time by `time` but for the first frame, then space by 2 and half the channels: the 2D half repeats its frames,
    the 3D half makes two of twice the channels, equal at the start of training (supplement 2.2, eq. 4)."""

    def __init__(self, channels: int, time: int):
        super().__init__()
        half = channels // 2
        self.time = time
        self.split = CausalConv3d(half, 2 * half, POINT) if time == 2 else None
        self.space = Halves(*(CausalConv3d(half, half // 2, FRAME) for _ in range(2)))
        if self.split is not None:
            nn.init.dirac_(self.split.weight, groups=2)
            nn.init.zeros_(self.split.bias)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.draw(self.lengthen(x, state), state)

    def lengthen(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """The change of time."""
        if self.split is None:
            return x
        first = 1 if begins(self, state) else 0
        keyframe, motion = x.chunk(2, 1)
        pairs = (torch.cat([keyframe, half], 1)[:, :, first:] for half in self.split(motion).chunk(2, 1))
        return torch.cat([x[:, :, :first], interleaved(*pairs)], 2)

    def draw(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """The change of size."""
        return self.space(repeated(x, 1, 2))


def _level(level: int, channels: int, out: int, blocks: int) -> nn.ModuleList:
    """The residual blocks of a level: 2D ones at level 3, where a group is one frame, each followed by attention."""
    kind, conv = ("2d", CausalConv3d) if level == 3 else ("3d", partial(KTCConv, group=GROUPS[level]))
    parts = []
    for _ in range(blocks):
        parts.append(ResBlock(channels, out, kind, RMSNorm, conv))
        if level == 3:
            parts.append(_attention(out))
        channels = out
    return nn.ModuleList(parts)


def _middle(channels: int) -> MidBlock:
    return MidBlock(channels, "2d", RMSNorm, _attention)


def _attention(channels: int) -> Halves:
    """Attention of each frame, of each half alone."""
    return Halves(*(FrameAttention(channels // 2, partial(RMSNorm, halves=1)) for _ in range(2)))


def _check_options(options: Any) -> None:
    check_counts(options, "z", "dim", "blocks")
    for key in ("z", "dim"):
        if options[key] % 2:
            raise UserError(f"{key}={options[key]}: expected an even number, e.g. {options[key] + 1}")
    check_mult(options.mult, levels=4)
