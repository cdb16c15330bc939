"""CV-VAE: a causal encoder and a decoder that looks ahead, latents compatible with an image VAE's."""

from functools import partial

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vae.base import VideoVAE
from vae.blocks import CUBE, CausalConv3d, CentredConv3d, FrameAttention, Norm, StreamState, interleaved, repeated
from vae.options import check_counts, check_mult
from vae.skeleton import Decoder, Encoder, Plan
from vae.spec import VAESpec


class CVVAE(VideoVAE):
    """CV-VAE (3.1, 3.2): 4x8x8 compression, T = 4n + 1 frames.

    Args:
        z: latent channels.
        width: channels of level 0; level i has `width * mult[i]`.
        mult: channel multipliers of the four levels.
        blocks: residual blocks a level of the encoder; the decoder has one more.
        half_3d: the second convolution of each block is 2D ("2D+3D", as published); False makes both 3D.
        latent_mean, latent_std: a channel, measured on training data; None means 0 and 1 / 0.18215.
    """

    @register_to_config
    def __init__(
        self,
        z: int = 4,
        width: int = 128,
        mult: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        half_3d: bool = True,
        latent_mean: tuple[float, ...] | None = None,
        latent_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        check_counts(self.options, "z", "width", "blocks")
        check_mult(mult, levels=4)
        eps, kind = 1e-5, "half" if half_3d else "3d"
        plan = partial(Plan, [width * m for m in mult], blocks, (kind,) * 4, "clip", eps, kind)
        norm = partial(Norm, mode="frame", eps=eps)
        of_frames, of_clips = partial(FrameAttention, norm=norm), partial(SpaceTimeAttention, norm=norm)
        decoder = plan(mid_attention=of_clips, conv=CentredConv3d)
        self.encoder = Encoder(2 * z, plan(mid_attention=of_frames), _down, CUBE)
        self.decoder = Decoder(z, decoder, _up, CUBE, post_quant=False)

    @property
    def spec(self) -> VAESpec:
        c = self.options
        return VAESpec(
            time_factor=4,
            space_factor=8,
            latent_channels=c.z,
            latent_mean=tuple(c.latent_mean or ()),
            latent_std=tuple(c.latent_std or (1 / 0.18215,) * c.z),
            inexact="its decoder looks ahead and its norms take the statistics of the whole clip",
        )

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def _moments(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.encoder(x, state)

    def _frames(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        return self.decoder(z, state)


def _down(level: int, channels: int) -> nn.Module:
    return CausalConv3d(channels, channels, CUBE, (1 if level == 1 else 2, 2, 2))


def _up(level: int, channels: int) -> nn.Module:
    return ChannelUpsample(channels, 1 if level == 2 else 2)


class ChannelUpsample(nn.Module):
    """Space by 2 (nearest), and time by 2 from twice the channels; the very first frame is dropped, T -> 2T - 1."""

    def __init__(self, channels: int, time: int):
        super().__init__()
        self.time = time
        self.conv = CentredConv3d(channels, time * channels, CUBE, replicate=True)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        h = self.conv(repeated(x, 1, 2), state)
        return h if self.time == 1 else interleaved(*h.chunk(self.time, 1))[:, :, 1:]


class SpaceTimeAttention(FrameAttention):
    """Attention of each frame, then of each pixel over all frames, both within one residual."""

    def __init__(self, channels: int, norm):
        super().__init__(channels, norm)
        self.time_norm = nn.LayerNorm(channels)
        self.time_q, self.time_k, self.time_v, self.time_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        h = super().forward(x) - x
        tokens = self.time_norm(h.permute(0, 3, 4, 2, 1).flatten(0, 2))  # (B*H*W, T, C)
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.time_q, self.time_k, self.time_v))
        y = self.time_out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + y.unflatten(0, (len(x), *x.shape[-2:])).permute(0, 4, 3, 1, 2)
