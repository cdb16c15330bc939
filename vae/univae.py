"""UniVAE: OD-VAE with multi-scale temporal downsampling, and a refinement decoder for twice the frame rate."""

from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from lvdm.errors import UserError, nearest
from vae.base import VAESpec, VideoVAE
from vae.blocks import CausalConv3d, StreamState
from vae.skeleton import Decoder, Encoder

NORMS = ("frame", "clip")
UPSAMPLES = ("nearest", "trilinear")
FUSES = ("none", "conv1x1")
INJECTIONS = ("add",)
INITS = ("d1", "fresh")


class UniVAE(VideoVAE):
    """E + D1 (UniVAE 3.1, 3.2) and, with `refine=True`, D2 (3.3). 4x8x8 compression, T = 4n + 1 frames.

    Args:
        z: latent channels.
        width: channels of level 0; level i has `width * mult[i]`.
        mult: channel multipliers of the four levels.
        blocks: residual blocks a level of the encoder; the decoders have one more.
        kernels: temporal kernels of the multi-scale downsampling, odd; (3,) is OD-VAE.
        fuse: "none", or "conv1x1" to mix the groups after it.
        norm: "frame" (causal, the default) or "clip" (statistics over time, as OD-VAE was published).
        upsample: "nearest" (causal, the default) or "trilinear" (looks one frame ahead, as OD-VAE was published).
        refine: whether to build D2.
        inject: how D1's features enter D2: "add" (eq. 2).
        latent_mean, latent_std: a channel, measured on training data; None means 0 and 1.
    """

    @register_to_config
    def __init__(
        self,
        z: int = 4,
        width: int = 128,
        mult: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        kernels: tuple[int, ...] = (3, 5, 7, 9),
        fuse: str = "none",
        norm: str = "frame",
        upsample: str = "nearest",
        refine: bool = False,
        inject: str = "add",
        latent_mean: tuple[float, ...] | None = None,
        latent_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        _check(self.config)
        self.encoder = Encoder(z, width, mult, blocks, kernels, fuse, norm)
        self.quant_conv = CausalConv3d(2 * z, 2 * z, (1, 1, 1))
        self.decoder = Decoder(z, width, mult, blocks, norm, upsample)
        self.refiner = Decoder(z, width, mult, blocks, norm, upsample, last_time=4) if refine else None
        self._name_streamed_modules()

    @property
    def spec(self) -> VAESpec:
        c = self.config
        return VAESpec(
            time_factor=4,
            space_factor=8,
            latent_channels=c.z,
            exact_streaming=c.norm == "frame" and c.upsample == "nearest",
            refines=self.refiner is not None,
            latent_mean=tuple(c.latent_mean or (0.0,) * c.z),
            latent_std=tuple(c.latent_std or (1.0,) * c.z),
        )

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def _moments(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.quant_conv(self.encoder(x, state))

    def _frames(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        return self.decoder(z, state)

    def _refined(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        if self.refiner is None:
            return super()._refined(z, state)
        features = self.decoder.trunk(z, state)
        return self.refiner.head(inject(self.refiner.trunk(z, state), features, state), state)

    def add_refiner(self, init: str) -> "UniVAE":
        """A new UniVAE with the same E and D1 and a D2: `init="d1"` copies D1's weights, "fresh" draws new ones."""
        if "refine" not in self.config:
            raise UserError(f"{type(self).__name__} cannot have a refinement decoder; give a UniVAE")
        if init not in INITS:
            raise UserError(f"init={init!r}: expected one of {', '.join(INITS)}{nearest(init, INITS)}")
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        grown = type(self)(**{**config, "refine": True})
        weights = self.state_dict()
        if init == "d1":
            weights |= {k.replace("decoder.", "refiner.", 1): v for k, v in weights.items() if k.startswith("decoder.")}
        missing, unexpected = grown.load_state_dict(weights, strict=False)
        assert not unexpected and all(key.startswith("refiner.") for key in missing)
        return grown


def inject(refined: Tensor, features: Tensor, state: StreamState | None = None) -> Tensor:
    """Adds D1's features of N + 1 frames to frames 0, 2, ..., 2N of D2's 2N + 1 (UniVAE eq. 2).

    In a later chunk of a stream the even frames of the video are the odd ones of the chunk.
    """
    first = 1 if state is not None and state.started else 0
    out = refined.clone()
    out[:, :, first::2] += features
    return out


def _check(config: Any) -> None:
    """Refuses, naming the key, options that make no UniVAE."""
    for key in ("z", "width", "blocks"):
        if not _positive(config[key]):
            raise UserError(f"{key}={config[key]!r}: expected a whole number of at least 1")
    for key, options in (("fuse", FUSES), ("norm", NORMS), ("upsample", UPSAMPLES), ("inject", INJECTIONS)):
        value = config.get(key, options[0])
        if value not in options:
            raise UserError(f"{key}={value!r}: expected one of {', '.join(options)}{nearest(str(value), options)}")
    mult, kernels = config.mult, config.get("kernels", (3,))
    if not isinstance(mult, list | tuple) or len(mult) != 4 or not all(map(_positive, mult)):
        raise UserError(f"mult={mult}: expected four whole multipliers, one a level, e.g. [1, 2, 4, 4]")
    if (
        not isinstance(kernels, list | tuple)
        or not kernels
        or not all(_positive(k) and k % 2 and k > 1 for k in kernels)
    ):
        raise UserError(f"kernels={kernels}: expected odd temporal kernels of at least 3, e.g. [3, 5, 7, 9]")
    if any(config.width * m % len(kernels) for m in mult[1:3]):
        raise UserError(f"width={config.width}: levels 1 and 2 must split into {len(kernels)} equal groups of channels")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
