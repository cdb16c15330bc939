"""What the steps of a plan may cost, reckoned from published code on one H200, before there is data or torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PIXEL_SECONDS = 0.631 / (8 * 17 * 128 * 128)
"""A training step of a VAE, a pixel and frame at full width: OD-VAE's published code on 8x17x128x128, bf16."""
IMAGE_SHARE = 1 / 2.2
"""The same of an image, whose convolutions are 2D."""
ENCODE_SECONDS = 0.266 / (8 * 25 * 256 * 256)
"""Encoding, a pixel and frame: OD-VAE's published code on 8x25x256x256."""
DECODE_SECONDS = 0.827 / (8 * 25 * 256 * 256)
"""Decoding, likewise."""
LATENT_SECONDS = 0.3206 / (8 * 16 * 32 * 32)
"""A training step of Latte-XL/2, a latent pixel and frame: Latte's published code on 8x16x32x32."""
FORWARD_SHARE = 0.1155 / 0.3206
"""Of such a step, the forward pass."""
PARAMETERS = {"train vae": 240e6, "train refine": 380e6, "vae init": 240e6}
"""Of the full width, about."""
LATTES = {"xl": (28, 1152), "l": (24, 1024), "b": (12, 768), "s": (12, 384)}
"""Depth and width."""
IMAGE_VAES = ("sdvae", "svdvae", "vqgan")
"""Those of the registry that keep the number of frames; all others make four one, but for the first."""


@dataclass(frozen=True)
class Chain:
    """What follows a VAE on a dataset, as far as its steps ask."""

    videos: int = 0
    """Of the dataset."""
    vae: str = ""
    """The VAE's name in the registry."""
    channels: int = 4
    """Of its latents."""
    configs: Mapping[str, Any] = field(default_factory=dict)
    """By verb."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a latent."""
        latents = self.configs["train latents"]
        frames = latents.frames if self.vae in IMAGE_VAES else (latents.frames - 1) // 4 + 1
        return self.channels, frames, latents.size // 8, latents.size // 8

    @property
    def items(self) -> int:
        """Clips in the latent store, mirrored ones too."""
        latents = self.configs["train latents"]
        return self.videos * max(1, latents.per_video) * (1 + latents.flip)

    @property
    def pixels(self) -> int:
        """Of a clip of the store, and so of a sample."""
        latents = self.configs["train latents"]
        return latents.frames * latents.size**2

    @property
    def guided(self) -> bool:
        """Whether samples are drawn with guidance, which takes two passes a step."""
        transformer, guidance = self.configs["train dit"], self.configs["sample"].guidance
        return transformer.condition == "class" and transformer.label_dropout > 0 and guidance != 1


NO_CHAIN = Chain()


def start(verb: str) -> float:
    """Seconds that a step takes to begin with: in small plans what counts."""
    return {"train vae": 10.0, "train refine": 10.0, "train dit": 3.0}.get(verb, 1.0)


def seconds(verb: str, config: Any, width: int, chain: Chain = NO_CHAIN) -> float:
    """About what a step takes; VAEs of a first level of `width` channels. The networks of metrics are not in it."""
    narrow = width / 128
    match verb:
        case "train vae" | "train refine":
            shown = [(p.samples * kind.share, kind) for p in config.phases for kind in p.kinds]
            pixels = sum(clips * k.frames * k.size**2 * (1 if k.frames > 1 else IMAGE_SHARE) for clips, k in shown)
            return pixels * PIXEL_SECONDS * narrow
        case "train latents":
            return chain.items * chain.pixels * ENCODE_SECONDS * narrow
        case "train dit":
            return config.total * step_seconds(chain)
        case "sample":
            forward = step_seconds(chain) * FORWARD_SHARE * (1 + chain.guided)
            return config.count * (config.steps * forward + chain.pixels * DECODE_SECONDS * narrow)
        case "evaluate generation":
            return chain.configs["sample"].count * chain.pixels * DECODE_SECONDS * narrow
        case "evaluate reconstruction":
            pixels = chain.videos * config.per_video * config.frames * config.size**2
            return pixels * (ENCODE_SECONDS + DECODE_SECONDS) * narrow
        case _:
            return 0.0


def step_seconds(chain: Chain) -> float:
    """A training step of one sample."""
    _, frames, height, width = chain.shape
    size = parameters(chain.configs["train dit"]) / latte(*LATTES["xl"])
    return frames * height * width * LATENT_SECONDS * size


def parameters(config: Any) -> float:
    """Of the transformer that a config trains: latte-b/2 with its options."""
    depth, width = LATTES[config.model.split("-")[1].split("/")[0]]
    return latte(config.model_args.get("depth", depth), config.model_args.get("width", width))


def latte(depth: int, width: int) -> float:
    """Parameters of so many blocks: attention 4, feed-forward 8 and modulation 6 matrices of `width` squared."""
    return depth * 18.0 * width**2


def disk(verb: str, config: Any, width: int, chain: Chain = NO_CHAIN) -> float:
    """About the bytes of what a step leaves: a training its checkpoints (weights, Adam's moments, average) and the
    exported model, a chain its latents and samples."""
    match verb:
        case "train latents":
            return config.bytes_of(chain.shape, chain.items)
        case "sample":
            return config.count * config.bytes_of(chain.shape, 3 * chain.pixels)
        case "train dit":
            return (16 * (config.keep + 1) + 4) * parameters(config)
        case _:
            checkpoints = getattr(config, "keep", -1) + 1
            return (16 * checkpoints + 4) * PARAMETERS.get(verb, 0.0) * (width / 128) ** 2
