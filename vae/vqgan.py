"""VQGAN f8-8192: Taming Transformers' image autoencoder with a Gumbel codebook, frame by frame."""

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vae.blocks import FRAME, POINT, CausalConv3d, StreamState, Upsample
from vae.discrete import DiscreteVAE, best_codes
from vae.options import check_counts, check_mult
from vae.skeleton import Decoder, Encoder, Plan
from vae.spec import VAESpec

FRAMES = 8
"""Frames that are encoded or decoded at a time."""


class VQGAN(DiscreteVAE):
    """VQGAN f8-8192 (Taming Transformers, GumbelVQ): 1x8x8, any T, each frame alone.

    Codes are the argmax of the logits: the official code draws Gumbel noise at evaluation too, here nothing is drawn.

    Args:
        z: channels of the codebook and of the features before it.
        width: channels of level 0; level i has `width * mult[i]`.
        mult: channel multipliers of the levels; each but the last halves the picture, the last one has attention.
        blocks: residual blocks a level of the encoder; the decoder has one more.
        codes: size of the codebook.
    """

    @register_to_config
    def __init__(
        self,
        z: int = 256,
        width: int = 128,
        mult: tuple[int, ...] = (1, 1, 2, 4),
        blocks: int = 2,
        codes: int = 8192,
    ):
        super().__init__()
        check_counts(self.options, "z", "width", "blocks", "codes")
        check_mult(mult)
        plan = Plan(
            widths=[width * m for m in mult],
            blocks=blocks,
            kinds=("2d",) * len(mult),
            norm="frame",
            mid_kind="2d",
            attention_levels=(len(mult) - 1,),
            end=FRAME,
        )
        self.encoder = Encoder(z, plan, _down, FRAME)
        self.quant_conv = CausalConv3d(z, z, POINT)
        self.projection = CausalConv3d(z, codes, POINT)
        self.codebook = nn.Parameter(torch.randn(codes, z))
        self.decoder = Decoder(z, plan, _up, FRAME)
        self.eval()

    @property
    def spec(self) -> VAESpec:
        c = self.options
        return VAESpec(time_factor=1, space_factor=2 ** (len(c.mult) - 1), latent_channels=c.z, discrete=True)

    def _moments(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return torch.cat([self.quant_conv(self.encoder(part)) for part in x.split(FRAMES, 2)], 2)

    def _quantise(self, h: Tensor) -> Tensor:
        return best_codes(h, self.projection.weight.flatten(1), self.projection.bias)

    def _frames(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        return torch.cat([self.decoder(part) for part in z.split(FRAMES, 2)], 2)


def _down(level: int, channels: int) -> nn.Module:
    return CausalConv3d(channels, channels, FRAME, (1, 2, 2))


def _up(level: int, channels: int) -> nn.Module:
    return Upsample(channels, 1, "nearest")
