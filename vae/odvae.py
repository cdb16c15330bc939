"""OD-VAE: the omni-dimensional compression VAE, causal in time, in the four variants of the paper."""

from functools import partial
from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from lvdm.errors import UserError
from vae.base import VideoVAE
from vae.blocks import (
    CUBE,
    FRAME,
    POINT,
    CausalConv3d,
    Convolution,
    FrameAttention,
    GroupCausalConv3d,
    MultiScaleDown,
    Norm,
    StreamState,
    Upsample,
)
from vae.options import check_choices, check_counts, check_mult
from vae.skeleton import Decoder, Encoder, Plan
from vae.spec import VAESpec
from vae.streams import Stage

NORMS = ("frame", "clip")
UPSAMPLES = ("nearest", "trilinear")
CONVS = ("causal", "group")
RESHAPES = ("frame", "legacy")

ALL_2D_OUTSIDE = ("2d", "2d", "3d", "3d")
VARIANTS = {  # kinds of the encoder's and the decoder's levels, and of their middles; the encoder's first kernel
    1: (("3d",) * 4, ("3d",) * 4, "3d", CUBE),
    2: (("half",) * 4, ("half",) * 4, "half", CUBE),
    3: (ALL_2D_OUTSIDE, ALL_2D_OUTSIDE, "3d", FRAME),
    4: (ALL_2D_OUTSIDE, ("3d",) * 4, "3d", FRAME),
}


class ODFamily(VideoVAE):
    """What OD-VAE, its predecessors and UniVAE share: 4x8x8 compression, T = 4n + 1 frames, convolutions around z."""

    def _build(
        self,
        variant: int = 4,
        kernels: tuple[int, ...] = (3,),
        fuse: str = "none",
        conv: str = "causal",
        legacy_reshape: bool = False,
    ) -> None:
        """Makes encoder and decoder from `self.options` and what only one of the two families has."""
        c = self.options
        encoder_kinds, decoder_kinds, mid, begin = VARIANTS[variant]
        convs = convolutions(conv)
        widths = [c.width * m for m in c.mult]
        attention = partial(FrameAttention, norm=partial(Norm, mode=c.norm), legacy_reshape=legacy_reshape)
        plan = partial(Plan, widths, c.blocks, norm=c.norm, mid_kind=mid, mid_attention=attention, conv=convs)

        def down(level: int, channels: int) -> nn.Module:
            if level == 0:
                return CausalConv3d(channels, channels, FRAME, (1, 2, 2))
            return MultiScaleDown(channels, kernels, fuse, convs[level])

        self._plan, self._convs = plan(decoder_kinds), convs
        self.encoder = Encoder(2 * c.z, plan(encoder_kinds), down, begin)
        self.quant_conv = CausalConv3d(2 * c.z, 2 * c.z, POINT)
        self.decoder = Decoder(c.z, self._plan, partial(self._up, last_time=2))

    def _up(self, level: int, channels: int, last_time: int) -> Upsample:
        time = {3: 2, 2: last_time, 1: 1}[level]
        conv = self._convs[level - 1] if time == 2 else CausalConv3d  # its frames are those of the next level
        return Upsample(channels, time, self.options.upsample if time > 1 else "nearest", conv)

    def _facts(self) -> dict[str, Any]:
        """The fields of `spec` that both have."""
        c = self.options
        reasons = {
            "its norms take the statistics of the whole clip": c.norm == "clip",
            "its upsampling looks ahead": c.upsample == "trilinear",
            "its old attention mixes frames": c.get("attn_reshape") == "legacy",
        }
        why = " and ".join(text for text, holds in reasons.items() if holds)
        others = "norm=frame and upsample=nearest" + (" and attn_reshape=frame" if "attn_reshape" in c else "")
        hint = f"; {others} are exact" if why else ""
        return {
            "time_factor": 4,
            "space_factor": 8,
            "latent_channels": c.z,
            "inexact": why + hint,
            "latent_mean": tuple(c.latent_mean or ()),
            "latent_std": tuple(c.latent_std or ()),
        }

    @property
    def spec(self) -> VAESpec:
        return VAESpec(**self._facts())

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def _moments(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.quant_conv(self.encoder(x, state))

    def _frames(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        return self.decoder(z, state)

    def _stages(self, work: str) -> list[Stage]:
        if work == "encode":
            return [*self.encoder.stages(), Stage(self.quant_conv, self.spec.time_factor)]
        return self.decoder.stages()


class ODVAE(ODFamily):
    """OD-VAE (3.1 to 3.3), by default variant 4 as published; 3 compresses Latte's latents at the same encoder.

    `norm="frame", upsample="nearest"` makes it exactly causal, at the price of not being the published network.

    Args:
        z: latent channels.
        width: channels of level 0; level i has `width * mult[i]`.
        mult: channel multipliers of the four levels.
        blocks: residual blocks a level of the encoder; the decoder has one more.
        variant: 1 all blocks 3D; 2 the second convolution of each block 2D; 3 the outer blocks of encoder and decoder
            2D; 4 those of the encoder only (figure 3 of the paper).
        norm: "clip" (statistics over time, as published) or "frame" (causal).
        upsample: "trilinear" (looks one frame ahead, as published) or "nearest" (causal).
        conv: "causal", or IV-VAE's "group" causal convolution in its place.
        attn_reshape: "frame", or "legacy" for weights trained with the attention that mixed up time and channels.
        latent_mean, latent_std: a channel, measured on training data; None means 0 and 1 / 0.18215.
    """

    @register_to_config
    def __init__(
        self,
        z: int = 4,
        width: int = 128,
        mult: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        variant: int = 4,
        norm: str = "clip",
        upsample: str = "trilinear",
        conv: str = "causal",
        attn_reshape: str = "frame",
        latent_mean: tuple[float, ...] | None = None,
        latent_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        check_options(self.options)
        if variant not in VARIANTS:
            raise UserError(
                f"variant={variant}: expected one of {', '.join(map(str, VARIANTS))}; 4 is the published one"
            )
        self._build(variant, conv=conv, legacy_reshape=attn_reshape == "legacy")

    @property
    def spec(self) -> VAESpec:
        z = self.options.z
        return VAESpec(**{**self._facts(), "latent_std": tuple(self.options.latent_std or (1 / 0.18215,) * z)})


def convolutions(name: str) -> list[Convolution]:
    """The convolution of levels 0 to 3: a group of 4 frames is 2 after the first halving of time and 1 after both."""
    if name == "group":
        return [partial(GroupCausalConv3d, group=group) for group in (4, 4, 2, 1)]
    return [CausalConv3d] * 4


def check_options(options: Any) -> None:
    """Refuses, naming the key, options that make no model of this family."""
    allowed = {"norm": NORMS, "upsample": UPSAMPLES, "conv": CONVS, "attn_reshape": RESHAPES}
    check_choices(options, {key: names for key, names in allowed.items() if key in options})
    check_counts(options, "z", "width", "blocks")
    check_mult(options.mult, levels=4)
