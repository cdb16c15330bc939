"""What the steps of a plan may cost, reckoned from published code on one H200, before there is data or torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

NONE: Mapping[str, Any] = MappingProxyType({})
PIXEL_SECONDS = 0.631 / (8 * 17 * 128 * 128)
"""A training step of a VAE, a pixel and frame at full width: OD-VAE's published code on 8x17x128x128, bf16."""
IMAGE_SHARE = 1 / 2.2
"""The same of an image, whose convolutions are 2D."""
ENCODE_SECONDS = 0.266 / (8 * 25 * 256 * 256)
"""Encoding, a pixel and frame: OD-VAE's published code on 8x25x256x256."""
LATENT_SECONDS = 0.3206 / (8 * 16 * 32 * 32)
"""A training step of Latte-XL/2, a latent pixel and frame: Latte's published code on 8x16x32x32."""
FORWARD_SHARE = 0.1155 / 0.3206
"""Of such a step, the forward pass."""
PARAMETERS = {"train vae": 240e6, "train refine": 380e6, "vae init": 240e6}
"""Of the full width, about."""
LATTES = {"xl": (28, 1152), "l": (24, 1024), "b": (12, 768), "s": (12, 384)}
"""Depth and width."""


def start(verb: str) -> float:
    """Seconds that a step takes to begin with: in small plans what counts."""
    return {"train vae": 10.0, "train refine": 10.0, "train dit": 3.0}.get(verb, 1.0)


def seconds(verb: str, config: Any, width: int, before: Mapping[str, Any] = NONE, videos: int = 0) -> float:
    """About what a step takes; `before` has the configs of the steps before it in a chain, by verb, whose latents are
    made of so many `videos`. VAEs that keep the number of frames take up to four times as long as said here."""
    match verb:
        case "train vae" | "train refine":
            shown = [(p.samples * kind.share, kind) for p in config.phases for kind in p.kinds]
            pixels = sum(clips * k.frames * k.size**2 * (1 if k.frames > 1 else IMAGE_SHARE) for clips, k in shown)
            return pixels * PIXEL_SECONDS * width / 128
        case "train latents":
            clips = videos * max(1, config.per_video) * (1 + config.flip)
            return clips * config.frames * config.size**2 * ENCODE_SECONDS * width / 128
        case "train dit":
            return config.total * step_seconds(before["train latents"], config)
        case "sample":
            forward = step_seconds(before["train latents"], before["train dit"]) * FORWARD_SHARE
            return config.count * config.steps * forward
        case _:
            return 0.0


def step_seconds(latents: Any, transformer: Any) -> float:
    """A training step of one sample."""
    pixels = ((latents.frames - 1) // 4 + 1) * (latents.size // 8) ** 2
    return pixels * LATENT_SECONDS * parameters(transformer) / latte(*LATTES["xl"])


def parameters(config: Any) -> float:
    """Of the transformer that a config trains: latte-b/2 with its options."""
    depth, width = LATTES[config.model.split("-")[1].split("/")[0]]
    return latte(config.model_args.get("depth", depth), config.model_args.get("width", width))


def latte(depth: int, width: int) -> float:
    """Parameters of so many blocks: attention 4, feed-forward 8 and modulation 6 matrices of `width` squared."""
    return depth * 18.0 * width**2


def disk(verb: str, config: Any, width: int) -> float:
    """About the bytes of checkpoints (weights, Adam's moments, average) and the exported model."""
    if verb == "train dit":
        return (16 * (config.keep + 1) + 4) * parameters(config)
    checkpoints = getattr(config, "keep", -1) + 1
    return (16 * checkpoints + 4) * PARAMETERS.get(verb, 0.0) * (width / 128) ** 2
