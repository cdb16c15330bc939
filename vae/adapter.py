"""Any autoencoder of diffusers behind our contract: `DiffusersVAE` holds the model and knows how its class is called.

Image models see a clip frame by frame; video models see whole clips, padded to their frame rule. What must be known of
a class is one entry of `CLASSES`.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from torch import Tensor, nn

from lvdm.errors import UserError, nearest
from lvdm.registry import class_name, pretrained
from vae.base import VideoVAE
from vae.blocks import StreamState, batch_to_frames, frames_to_batch
from vae.options import check_counts
from vae.spec import VAESpec

PREFIX = "diffusers:"
FRAME_BATCH = 8
CERTAIN = -30.0
"""Log-variance of an encoder that gives a latent and no distribution: the least that a posterior keeps."""

# ---------------------------------------------------------------------------------------------------------------------
# What must be known of each class

Factor = Callable[[Any], int]
"""Model -> frames, or pixels, a latent."""


@dataclass(frozen=True)
class Rule:
    """How one class of diffusers is called, and what its latents stand for."""

    space: Factor
    time: Factor | None = None
    """None for an image model, which sees a clip frame by frame."""
    inexact: str = ""
    """Why its clips cannot be streamed (see `VAESpec`)."""
    certain: bool = False
    """Whether the distribution that its encoder gives has no variance of its own."""
    encode: Callable[[Any, Tensor], Any] = lambda inner, x: inner.encode(x)
    """(model, frames or clip) -> what diffusers' `encode` gives."""
    decode: Callable[[Any, Tensor], Tensor] | None = None
    """(model, latents of a clip) -> clip, where that is not diffusers' `decode` alone."""
    recomputes: bool = True
    """Whether its gradient checkpointing keeps the gradients: it does not where blocks run anew on changed caches."""


def _given(key: str) -> Factor:
    return lambda inner: inner.config[key]


def _levels(key: str) -> Factor:
    """Each level but the last halves."""
    return lambda inner: 2 ** (len(inner.config[key]) - 1)


def _product(key: str) -> Factor:
    return lambda inner: math.prod(inner.config[key])


def _ratio(inner: Any) -> int:
    return inner.temporal_compression_ratio


def _wan_time(inner: Any) -> int:
    return 2 ** sum(inner.config.temperal_downsample)  # diffusers' spelling


def _wan_space(inner: Any) -> int:
    return _levels("dim_mult")(inner) * (inner.config.get("patch_size") or 1)


def _ltx(patch: str, *kinds: str) -> Factor:
    """Counts downsamplings, since the ratios in its config are those of one published size."""

    def factor(inner: Any) -> int:
        scales, types = inner.config.spatio_temporal_scaling, inner.config.downsample_type
        scales = [scales] * len(types) if isinstance(scales, bool) else scales
        halved = [kind in kinds for kind, scaled in zip(types, scales, strict=False) if scaled]
        return inner.config[patch] * 2 ** sum(halved)

    return factor


def _decode_svd(inner: Any, z: Tensor) -> Tensor:
    return batch_to_frames(inner.decode(frames_to_batch(z), num_frames=z.shape[2]).sample, len(z))


def _one_more(time: Factor, unfit: Callable[[int], bool]) -> Callable[[Any, Tensor], Tensor]:
    """Gives the last latent twice, and cuts its frames, where the number of latents would render another number."""

    def decode(inner: Any, z: Tensor) -> Tensor:
        if not unfit(z.shape[2]):
            return inner.decode(z).sample
        return inner.decode(torch.cat([z, z[:, :, -1:]], 2)).sample[:, :, : -time(inner)]

    return decode


def _decode_ltx(inner: Any, z: Tensor) -> Tensor:
    """A decoder that can denoise is told that there is no noise."""
    return inner.decode(z, z.new_zeros(len(z)) if inner.config.timestep_conditioning else None).sample


def _encode_vidtok(inner: Any, x: Tensor) -> Any:
    """Its first latent is of as many frames as the others, so the first frame is repeated in front."""
    front = x[:, :, :1].expand(-1, -1, inner.temporal_compression_ratio - 1, -1, -1)
    return inner.encode(torch.cat([front, x], 2))


_SPACE, _TIME = _given("spatial_compression_ratio"), _given("temporal_compression_ratio")
_LTX_SPACE = _ltx("patch_size", "conv", "spatial", "spatiotemporal")
_LTX_TIME = _ltx("patch_size_t", "conv", "temporal", "spatiotemporal")
_KVAE_TIME = _given("temporal_compress_times")
_CACHES = "diffusers keeps its caches within one call"
_ATTENDS = "its attention looks back over the whole clip"

CLASSES = {
    # images
    "AutoencoderKL": Rule(_levels("block_out_channels")),
    "AutoencoderKLFlux2": Rule(_levels("block_out_channels")),
    "AutoencoderKLHunyuanImage": Rule(_SPACE),
    "AutoencoderKLKVAE": Rule(_levels("ch_mult")),
    "AsymmetricAutoencoderKL": Rule(_levels("down_block_out_channels")),
    "AutoencoderTiny": Rule(_levels("encoder_block_out_channels"), recomputes=False),  # leaves out a rescaling
    "AutoencoderDC": Rule(_levels("encoder_block_out_channels")),
    "VQModel": Rule(_levels("block_out_channels")),
    # images, with a decoder that sees its neighbours
    "AutoencoderKLTemporalDecoder": Rule(
        _levels("block_out_channels"), None, "its decoder sees frames before and after", decode=_decode_svd
    ),
    # videos
    "AutoencoderKLCogVideoX": Rule(
        _levels("block_out_channels"),
        _TIME,
        "its norms take the statistics of several frames",
        decode=_one_more(_TIME, lambda latents: latents % 2 == 0),  # an even number has no first frame
    ),
    "AutoencoderKLCosmos": Rule(_SPACE, _TIME, _ATTENDS, certain=True),
    "AutoencoderKLHunyuanVideo": Rule(_SPACE, _TIME, f"{_ATTENDS}, and long clips are blended from runs"),
    "AutoencoderKLHunyuanVideo15": Rule(_SPACE, _TIME, _ATTENDS),
    "AutoencoderKLKVAEVideo": Rule(
        _levels("ch_mult"),
        _KVAE_TIME,
        _CACHES,
        certain=True,  # diffusers drops the variance that it predicts
        decode=_one_more(_KVAE_TIME, lambda latents: latents > 2 and latents % 4 == 2),  # a last run of one: an image
        recomputes=False,
    ),
    "AutoencoderKLLTXVideo": Rule(_LTX_SPACE, _LTX_TIME, "its decoder sees frames after", decode=_decode_ltx),
    "AutoencoderKLLTX2Video": Rule(_LTX_SPACE, _LTX_TIME, "diffusers runs whole clips only", decode=_decode_ltx),
    "AutoencoderKLMagvit": Rule(_levels("block_out_channels"), _ratio, _CACHES, recomputes=False),
    "AutoencoderKLMochi": Rule(_product("spatial_expansions"), _product("temporal_expansions"), _ATTENDS),
    "AutoencoderKLQwenImage": Rule(_wan_space, _wan_time, _CACHES),
    "AutoencoderKLWan": Rule(_wan_space, _wan_time, _CACHES),
    "AutoencoderVidTok": Rule(
        lambda inner: 2 ** len(inner.encoder.spatial_ds),
        _ratio,
        _CACHES,
        encode=_encode_vidtok,
        decode=lambda inner, z: inner.decode(z),
    ),
    "Kandinsky6SRVAE": Rule(_levels("encoder_block_out_channels"), _TIME, _CACHES),
}


def class_of(kind: str, where: str = "kind") -> type[ModelMixin]:
    """The class of diffusers by its name; a UserError, beginning with `where`, if `CLASSES` or diffusers lacks it."""
    if kind not in CLASSES:
        raise UserError(
            f"{where}: {kind!r} is no image or video autoencoder of diffusers that we know{nearest(kind, CLASSES)};"
            f" known: {', '.join(sorted(CLASSES))}"
        )
    if not hasattr(diffusers, kind):
        raise UserError(f"{where}: diffusers {diffusers.__version__} has no {kind}; pip install -U diffusers")
    return getattr(diffusers, kind)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class DiffusersVAE(VideoVAE):
    """An autoencoder of diffusers, `self.inner`, behind our contract.

    Args:
        kind: its class, one of `CLASSES`.
        arguments: what that is constructed with; what is left out takes diffusers' defaults.
        frame_batch: frames that an image model sees at a time, so that memory does not grow with the clip.
        latent_mean, latent_std: a channel, measured on training data; None means those of the inner model's config.
    """

    @register_to_config
    def __init__(
        self,
        kind: str = "AutoencoderKL",
        arguments: dict[str, Any] | None = None,
        frame_batch: int = FRAME_BATCH,
        latent_mean: tuple[float, ...] | None = None,
        latent_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        check_counts(self.options, "frame_batch")
        cls = class_of(kind)
        try:
            self.inner = cls(**(arguments or {}))
        except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            if "unexpected keyword" in str(error) or "required" in str(error):
                raise
            first = " ".join(str(error).split())[:200]
            raise UserError(f"arguments={arguments}: make no {kind} of diffusers: {first}") from None

    @classmethod
    def wrap(cls, inner: ModelMixin) -> "DiffusersVAE":
        """A model of diffusers, as it is, behind our contract."""
        kind = type(inner).__name__
        known = inspect.signature(class_of(kind)).parameters  # some models register more than they take
        arguments = {key: value for key, value in inner.config.items() if key in known}
        stored = {key: value.tolist() for key, value in inner.named_buffers() if key in ("latents_mean", "latents_std")}
        mean, std = _statistics({**inner.config, **stored}) if stored else (None, None)  # LTX has them with its weights
        vae = cls.__new__(cls)
        super(DiffusersVAE, vae).__init__()
        vae.register_to_config(
            kind=kind, arguments=arguments, frame_batch=FRAME_BATCH, latent_mean=mean, latent_std=std
        )
        vae.inner = inner
        return vae

    @property
    def title(self) -> str:
        return self.options.kind

    @property
    def rule(self) -> Rule:
        """What is known of the inner model's class."""
        return CLASSES[self.options.kind]

    @property
    def spec(self) -> VAESpec:
        c, config = self.options, self.inner.config
        mean, std = _statistics(config)
        return VAESpec(
            time_factor=self.rule.time(self.inner) if self.rule.time else 1,
            space_factor=self.rule.space(self.inner),
            latent_channels=_channels(config),
            latent_mean=tuple(c.latent_mean or mean),
            latent_std=tuple(c.latent_std or std),
            inexact=self.rule.inexact,
        )

    @property
    def last_layer(self) -> Tensor:
        decoder = self.inner.decoder
        ends = (getattr(decoder, name, None) for name in ("time_conv_out", "conv_out", "proj_out"))
        end = next((module for module in ends if module is not None), decoder)
        return [m for m in end.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)][-1].weight

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Recomputes the inner model's blocks in the backward pass; a UserError where diffusers cannot."""
        if not (self.inner._supports_gradient_checkpointing and self.rule.recomputes):
            raise UserError(
                f"gradient_checkpointing: none that works for diffusers' {self.options.kind}; set it to false"
            )
        super().enable_gradient_checkpointing(*args, **kwargs)

    def _moments(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        moments = self._call(self._encoded, x, apart=self.rule.time is None)
        z, *shape = self.spec.latent_shape(*x.shape[2:])
        return self._fits(moments, (len(x), 2 * z, *shape))

    def _frames(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        decode, apart = self.rule.decode, self.rule.time is None
        if decode:
            video = self._call(lambda clip: decode(self.inner, clip), z, apart=False)
        else:
            video = self._call(lambda part: self.inner.decode(part).sample, z, apart)
        spec, (height, width) = self.spec, z.shape[3:]
        f = spec.space_factor
        return self._fits(video, (len(z), 3, spec.frames(z.shape[2]), f * height, f * width))

    def _encoded(self, x: Tensor) -> Tensor:
        """Frames or a clip -> moments, channels 2z."""
        code = self.rule.encode(self.inner, x)[0]
        if isinstance(code, Tensor) or self.rule.certain:
            mean = code if isinstance(code, Tensor) else code.mode()
            return torch.cat([mean, torch.full_like(mean, CERTAIN)], 1)
        return code.parameters

    def _call(self, run: Callable[[Tensor], Tensor], x: Tensor, apart: bool) -> Tensor:
        """`run` on a clip, or on `frame_batch` of its frames at a time."""
        try:
            if not apart:
                return run(x)
            parts = frames_to_batch(x).split(self.options.frame_batch)
            return batch_to_frames(torch.cat([run(part) for part in parts]), len(x))
        finally:
            if hasattr(self.inner, "_clear_conv_cache"):  # MAGVIT's decode leaves its frames to the next call
                self.inner._clear_conv_cache()

    def _fits(self, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        if y.shape != shape:
            raise UserError(
                f"{self.options.kind} gave {tuple(y.shape)} where {shape} was expected: its arguments make a model"
                " whose frame rule we do not know"
            )
        return y


def _channels(config: Mapping[str, Any]) -> int:
    return next(config[key] for key in ("z_dim", "z_channels", "vq_embed_dim", "latent_channels") if config.get(key))


def _statistics(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents, a channel, of which diffusers makes 0 and 1 for its transformers.

    It scales `(z - shift_factor) * scaling_factor`, or `(z - latents_mean) / latents_std * scaling_factor`.
    """
    z, scale = _channels(config), config.get("scaling_factor") or 1.0
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * z
    std = config.get("latents_std") or [1.0] * z
    return _a_channel(mean, z), [s / scale for s in _a_channel(std, z)]


def _a_channel(values: Sequence[float], z: int) -> list[float]:
    """Cosmos has a value a channel and latent frame, of which this is the mean."""
    n = len(values) // z
    return [sum(values[i * n : (i + 1) * n]) / n for i in range(z)]


# ---------------------------------------------------------------------------------------------------------------------
# From names and folders


def build(kind: str, **arguments: Any) -> DiffusersVAE:
    """The class `kind` of diffusers with fresh weights, constructed with its own `arguments`."""
    return DiffusersVAE(kind, arguments)


def read(spec: str) -> DiffusersVAE | None:
    """The trained autoencoder of diffusers that `spec` names, or None where it names none.

    `spec` is the folder of a model, or of a pipeline with the model in `vae/`; with "diffusers:" in front also a hub
    id, and then what is no autoencoder is a UserError.
    """
    source, named = spec.removeprefix(PREFIX), spec.startswith(PREFIX)
    try:
        name, subfolder = _find(spec, source, hub=named)
    except UserError:
        if named:
            raise
        return None
    if not named and not hasattr(diffusers, str(name)):
        return None
    with _quiet():
        return DiffusersVAE.wrap(pretrained(class_of(name, spec), spec, source, subfolder=subfolder))


def _find(spec: str, source: str, hub: bool) -> tuple[str, str]:
    """Class and subfolder of the model in a folder or a repository: itself, or the `vae/` of a pipeline."""
    for subfolder in ("", "vae"):
        if (Path(source) / subfolder / "config.json").is_file():
            return class_name(spec, str(Path(source) / subfolder)), subfolder
    if Path(source).is_dir() or not hub:
        raise UserError(f"{spec}: no config.json here and none in vae/, so no autoencoder of diffusers")
    try:
        return class_name(spec, source), ""
    except UserError:
        return class_name(spec, source, "vae/config.json"), "vae"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warnings: what is wrong is raised."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
