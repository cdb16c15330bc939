"""OS-VAE (Open-Sora 1.2): an image VAE frame by frame, and a second VAE over time on its latents."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vae.base import VideoVAE
from vae.blocks import (
    CUBE,
    POINT,
    Checkpointed,
    Norm,
    ResBlock,
    StreamState,
    batch_to_frames,
    frames_to_batch,
    interleaved,
    norm_groups,
    norm_silu_conv,
)
from vae.options import check_counts, check_mult
from vae.spec import VAESpec

SCALE = 0.18215  # of the 2D latents, as published, although its weights are SDXL's (0.13025)
FRAMES = 4  # frames that the 2D VAE works on at a time
MULT = (1, 2, 2, 4)
HALVED = (False, True, True)  # whether time is halved after temporal level 0, 1, 2
MEAN, STD = (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)


class OSVAE(VideoVAE):
    """Open-Sora 1.2's VAE, 4x8x8, T = 4n frames.

    Other lengths are padded in front by zeros in place of the 2D latents, so 17 frames are 3 zeros and 17 frames, 5
    latents; `decode` renders 20 frames and `num_frames` keeps the last 17. An image sees 3 zeros before it. The
    official code cuts longer clips into independent runs of 17 frames (34 are 10 latents); here they are one run (34
    are 9). The 2D posterior is taken at its mode, where the official code samples it.

    Args:
        z: latent channels of both VAEs.
        width: channels of level 0 of the 2D VAE; level i has `width * mult[i]`.
        mult: channel multipliers of its four levels.
        blocks: residual blocks a level of its encoder; its decoder has one more.
        filters: channels of level 0 of the temporal VAE, whose levels have 1, 2, 2 and 4 times as many.
        temporal_blocks: residual blocks a level of the temporal VAE.
        latent_mean, latent_std: a channel, measured on training data; None means the published ones of z = 4, else
            0 and 1.
    """

    @register_to_config
    def __init__(
        self,
        z: int = 4,
        width: int = 128,
        mult: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        filters: int = 128,
        temporal_blocks: int = 4,
        latent_mean: tuple[float, ...] | None = None,
        latent_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        check_counts(self.options, "z", "width", "blocks", "filters", "temporal_blocks")
        check_mult(mult)
        self.spatial = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(mult),
            up_block_types=("UpDecoderBlock2D",) * len(mult),
            block_out_channels=tuple(width * m for m in mult),
            layers_per_block=blocks,
            latent_channels=z,
            norm_num_groups=norm_groups(width),
        )
        self.encoder = TemporalEncoder(z, filters, temporal_blocks)
        self.decoder = TemporalDecoder(z, filters, temporal_blocks)

    @property
    def spec(self) -> VAESpec:
        c = self.options
        mean, std = (MEAN, STD) if c.z == len(MEAN) else ((), ())
        return VAESpec(
            time_factor=4,
            space_factor=2 ** (len(c.mult) - 1),
            latent_channels=c.z,
            latent_mean=tuple(c.latent_mean or mean),
            latent_std=tuple(c.latent_std or std),
            first_frames=4,
            inexact="it pads clips in front and its norms take the statistics of the whole clip",
        )

    @property
    def last_layer(self) -> Tensor:
        return self.spatial.decoder.conv_out.weight

    def _pad(self, x: Tensor, frames: int) -> Tensor:
        return x  # `_moments` pads, between the two VAEs

    def _trim(self, x: Tensor, frames: int | None) -> Tensor:
        return x if frames is None else x[:, :, max(0, x.shape[2] - frames) :]

    def image_latents(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> latents (N, 4, H/8, W/8) of the image VAE inside, in the scale of the video part."""
        return SCALE * self.spatial.encode(x).latent_dist.mode()

    def _moments(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        h = _by_frames(self.image_latents, x)
        return self.encoder(F.pad(h, (0, 0, 0, 0, -h.shape[2] % 4, 0)))

    def _frames(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        return _by_frames(lambda part: self.spatial.decode(part).sample, self.decoder(z) / SCALE)

    def _whole_moments(self, x: Tensor) -> Tensor:
        """Tiles in time: the first run has the padding, so that the others are whole and `decode` cuts alike."""
        run = max(4, (self._tiling.frames - 1) // 4 * 4) if self._tiling and self._tiling.frames else x.shape[2]
        if x.shape[2] <= run:
            return self._tiled_moments(x)
        missing = -x.shape[2] % 4
        head, rest = x.tensor_split([run - missing], 2)
        return torch.cat([self._tiled_moments(part) for part in (head, *rest.split(run, 2))], 2)

    @property
    def streams(self) -> bool:
        return False  # the padding in front depends on the length


class TemporalEncoder(Checkpointed):
    """2D latents (B, z, T, h, w) -> moments (B, 2z, T/4, h, w)."""

    def __init__(self, z: int, filters: int, blocks: int):
        super().__init__()
        widths = [filters * m for m in MULT]
        self.conv_in = ZeroCausalConv3d(z, filters, CUBE, bias=False)
        self.levels, self.downs = nn.ModuleList(), nn.ModuleList()
        for i, out in enumerate(widths):
            self.levels.append(_level(widths[max(0, i - 1)], out, blocks))
            if i < len(HALVED):
                self.downs.append(ZeroCausalConv3d(out, out, CUBE, (2, 1, 1)) if HALVED[i] else nn.Identity())
        self.mid = _level(widths[-1], widths[-1], blocks)
        self.norm_out = _norm(widths[-1])
        self.conv_out = ZeroCausalConv3d(widths[-1], 2 * z, POINT)
        self.quant_conv = ZeroCausalConv3d(2 * z, 2 * z, POINT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for i, level in enumerate([*self.levels, self.mid]):
            for block in level:
                h = self._run(block, h)
            if i < len(self.downs):
                h = self.downs[i](h)
        return self.quant_conv(norm_silu_conv(h, self.norm_out, self.conv_out))


class TemporalDecoder(Checkpointed):
    """Latents (B, z, t, h, w) -> 2D latents (B, z, 4t, h, w). `levels` and `ups` are in the order in which they run."""

    def __init__(self, z: int, filters: int, blocks: int):
        super().__init__()
        widths = [filters * m for m in reversed(MULT)]
        self.post_quant_conv = ZeroCausalConv3d(z, z, POINT)
        self.conv_in = ZeroCausalConv3d(z, widths[0])
        self.mid = _level(widths[0], widths[0], blocks)
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, out in enumerate(widths):
            self.levels.append(_level(widths[max(0, i - 1)], out, blocks))
            if i < len(HALVED):
                self.ups.append(TimeUpsample(out) if HALVED[-1 - i] else nn.Identity())
        self.norm_out = _norm(filters)
        self.conv_out = ZeroCausalConv3d(filters, z)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(self.post_quant_conv(z))
        for block in self.mid:
            h = self._run(block, h)
        for i, level in enumerate(self.levels):
            for block in level:
                h = self._run(block, h)
            if i < len(self.ups):
                h = self.ups[i](h)
        return norm_silu_conv(h, self.norm_out, self.conv_out)


class ZeroCausalConv3d(nn.Conv3d):
    """A convolution that never sees a later frame: kernel - stride zeros in front, T frames give T / stride."""

    def __init__(self, in_channels: int, out_channels: int, kernel=CUBE, stride=(1, 1, 1), bias: bool = True):
        super().__init__(in_channels, out_channels, kernel, stride, (0, kernel[1] // 2, kernel[2] // 2), bias=bias)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.kernel_size[0] - self.stride[0], 0)))


class TimeUpsample(nn.Module):
    """Time by 2 from twice the channels: channels 2c and 2c + 1 are the two frames of channel c."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = ZeroCausalConv3d(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return interleaved(h[:, ::2], h[:, 1::2])


def _by_frames(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A 2D `run` over (B, C, T, H, W), a few frames at a time."""
    return batch_to_frames(torch.cat([run(part) for part in frames_to_batch(x).split(FRAMES)]), len(x))


def _level(channels: int, out: int, blocks: int) -> nn.ModuleList:
    conv = partial(ZeroCausalConv3d, bias=False)
    return nn.ModuleList(ResBlock(out if i else channels, out, "3d", _norm, conv) for i in range(blocks))


def _norm(channels: int) -> Norm:
    return Norm(channels, "clip", eps=1e-5)
