"""The contract of every video autoencoder: diffusers' `encode` / `decode`, and `spec`, `refine`, streams, tiles on top.

Videos are (B, 3, T, H, W) floats in [-1, 1], latents (B, z, t, h, w). A 4-D input is a batch of images (T = 1)
and gives 4-D back, which is how diffusers' own video pipelines call an image VAE frame by frame.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from lvdm.errors import UserError
from lvdm.latents import weights_hash
from vae import memory
from vae.blocks import StreamState
from vae.spec import VAESpec
from vae.streams import Stage, Stream
from vae.tiling import Tiling, reach, tiled


class Posterior(DiagonalGaussianDistribution):
    """`sample(generator)`, `mode()`, `mean`, `logvar`, `std`, each (B, z, t, h, w); `kl()` to N(0, 1), (B,)."""

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        mean, var, logvar = (0.0, 1.0, 0.0) if other is None else (other.mean, other.var, other.logvar)
        terms = (self.mean - mean) ** 2 / var + self.var / var - 1.0 - self.logvar + logvar
        return 0.5 * terms.flatten(1).sum(1)


class VideoVAE(ModelMixin, ConfigMixin):
    """Base of the video autoencoders. A subclass gives `spec`, `_moments`, `_frames` and, if it refines, `_refined`."""

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["ResBlock"]  # noqa: RUF012
    _tiling: Tiling | None = None
    _slicing = False

    # ---- what a subclass gives ---------------------------------------------------------------------------------------

    @property
    def spec(self) -> VAESpec:
        raise TypeError(f"{type(self).__name__} gives no spec")

    @property
    def last_layer(self) -> Tensor:
        """The weight of the layer that draws the frames, which the adaptive weight of training looks at."""
        raise TypeError(f"{type(self).__name__} names no last layer")

    def _moments(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, 3, T, H, W) of valid length, or the next chunk of a stream -> (B, 2z, t, h, w)."""
        raise TypeError(f"{type(self).__name__} gives no encoder")

    def _frames(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, T, H, W)."""
        raise TypeError(f"{type(self).__name__} gives no decoder")

    def _refined(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, 2T - 1, H, W), where `spec.refines`."""
        raise TypeError(f"{type(self).__name__} gives no refinement decoder")

    def _pad(self, x: Tensor, frames: int) -> Tensor:
        """A clip of `frames` frames: the last frame is repeated. With `_trim`, what a model does off its frame rule."""
        return _right_replicate(x, frames)

    def _trim(self, x: Tensor, frames: int | None) -> Tensor:
        """The frames that were there before `_pad`."""
        return x[:, :, :frames]

    def to(self, *args: Any, **kwargs: Any) -> "VideoVAE":
        """As of any module. (The one of diffusers warns, at each dtype, of modules kept in float32, even of none.)"""
        return nn.Module.to(self, *args, **kwargs)

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compiles the residual blocks, in place, once for each shape: a kernel for all shapes fails on their norms.
        Streams run them as they are. `options` are those of torch.compile. UserError for a model of other blocks."""
        torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
        try:
            super().compile_repeated_blocks(**{"dynamic": False, **options})
        except ValueError:
            raise UserError(f"compile=true: {self.title} has no blocks to compile; leave it out") from None

    @property
    def title(self) -> str:
        """What it is called in tables and messages."""
        return type(self).__name__

    # ---- config ------------------------------------------------------------------------------------------------------

    @property
    def options(self) -> FrozenDict:
        """What the model was built with: `type(model)(**model.options)` is the same architecture."""
        given = {key: value for key, value in self._internal_dict.items() if not key.startswith("_")}
        return FrozenDict({key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})  # JSON has lists

    @property
    def config(self) -> FrozenDict:
        """The options, and the keys that diffusers' pipelines ask an image VAE for (which are not saved)."""
        spec = self.spec
        asked = {
            "scaling_factor": len(spec.latent_std) / sum(spec.latent_std),
            "latent_channels": spec.latent_channels,
            "block_out_channels": (spec.latent_channels,) * spec.space_factor.bit_length(),  # only counted: log2(f) + 1
            "force_upcast": False,
        }
        return FrozenDict({**asked, **self._internal_dict})

    def approximation(self, frames: int) -> str:
        """What to tell of a video of `frames` frames that is longer than the runs of `enable_tiling`, where those are
        not exact; else nothing."""
        if self.spec.exact_streaming or self.spec.discrete or not (self._tiling and 0 < self._tiling.frames < frames):
            return ""
        return (
            f"{self.title} does not stream exactly ({self.spec.inexact}): {frames} frames go {self._tiling.frames} at a"
            " time, an approximation; tile_frames=0 takes them at once"
        )

    def require_posterior(self, name: str) -> None:
        """A UserError, beginning with `name`, for a model that quantises."""
        if self.spec.discrete:
            raise UserError(
                f"{name}: {self.title} is discrete, it has codes and no posterior: for reconstruction only"
                " (reconstruct(), or codes() and decode()); for training, streams or diffusion take a continuous VAE"
            )

    def identity(self) -> str:
        """Hash of all that decides what this model makes of a video: class, options, weights, dtype, tiles."""
        facts = [type(self).__name__, dict(self.options), str(self.dtype), str(self._tiling)]
        told = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        return hashlib.sha256((told.hexdigest() + weights_hash(self.state_dict())).encode()).hexdigest()

    def latent_sha256(self) -> str:
        """Hash of the weights that make and read latents; a refinement decoder may come and go."""
        return weights_hash({k: v for k, v in self.state_dict().items() if not k.startswith("refiner.")})

    # ---- whole clips -------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor, pad: bool = True, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """`.latent_dist`, the `Posterior` of a clip (B, 3, T, H, W) or of images (B, 3, H, W), in [-1, 1].

        Lengths off the frame rule are padded to the next valid one, or a UserError with `pad=False`; H and W off the
        spatial factor are a UserError.
        """
        moments = self._sliced(self._whole_moments, self._clip(x, pad))
        posterior = Posterior(moments.squeeze(2) if x.ndim == 4 else moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _clip(self, x: Tensor, pad: bool) -> Tensor:
        """Images or a clip as a clip of valid size and length."""
        spec, video = self.spec, self._checked(x, 3, "encode", "a clip (B, 3, T, H, W) or images (B, 3, H, W)")
        spec.check_size(*x.shape[-2:])
        if not pad:
            spec.check_frames(video.shape[2])
        return self._pad(video, spec.valid_frames(video.shape[2]))

    def _require_refiner(self) -> None:
        if not self.spec.refines:
            raise UserError(
                f"this {self.title} has no refinement decoder: give a UniVAE after stage 2 (lvdm train refine),"
                " or render without refine"
            )

    def _checked(self, x: Tensor, channels: int, what: str, expected: str, images: bool = True) -> Tensor:
        """A clip, or images as clips of one frame; a UserError where the shape or dtype is neither's, or the dtype is
        not the model's (autocast takes any)."""
        if not isinstance(x, Tensor):
            raise UserError(f"{what}: expected a tensor, {expected}, got {type(x).__name__}")
        if (
            x.ndim not in ((4, 5) if images else (5,))
            or x.shape[1] != channels
            or not x.is_floating_point()
            or not x.numel()
        ):
            raise UserError(f"{what}: expected floats, {expected}, got {_described(x)}")
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            raise UserError(f"{what}: expected {self.dtype}, the model's dtype, got {x.dtype}; use .to(model.dtype)")
        return x.unsqueeze(2) if x.ndim == 4 else x

    def _checked_chunks(self, chunks: Iterable[Tensor], channels: int, what: str, expected: str) -> Iterator[Tensor]:
        """Chunks of one video: the later ones are like the first in all but their length."""
        first = None
        for chunk in chunks:
            chunk = self._checked(chunk, channels, what, expected, images=False)
            kind = (len(chunk), *chunk.shape[3:], chunk.dtype, chunk.device)
            if first is None:
                first, told = kind, _described(chunk)
            elif kind != first:
                raise UserError(f"{what}: expected a chunk like the first, {told}, but for t, got {_described(chunk)}")
            yield chunk

    def decode(
        self,
        z: Tensor,
        num_frames: int | None = None,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """Frames of latents (B, z, t, h, w), trimmed to `num_frames` when given; (B, z, h, w) gives images.

        Nothing is drawn: `generator` is there for diffusers' pipelines, which pass theirs.
        """
        return self._render(z, num_frames, False, return_dict)

    def refine(self, z: Tensor, num_frames: int | None = None, return_dict: bool = True) -> DecoderOutput | tuple:
        """2T - 1 frames from the latents of T frames; `num_frames` trims, counted in rendered frames."""
        self._require_refiner()
        return self._render(z, num_frames, True, return_dict)

    def reconstruct(self, x: Tensor) -> Tensor:
        """A clip (B, 3, T, H, W) or images (B, 3, H, W) through the mode of the posterior and back, T frames."""
        return self.decode(self.encode(x).latent_dist.mode(), num_frames=x.shape[2] if x.ndim == 5 else None).sample

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, mean, logvar) of clips (B, 3, T, H, W); `noise` (B, z, t, h, w) draws the posterior, None
        takes its mean. The training step goes through here, so that a wrapped model synchronises its gradients."""
        posterior = self.encode(x).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return self.decode(z, num_frames=x.shape[2]).sample, posterior.mean, posterior.logvar

    # ---- streams -----------------------------------------------------------------------------------------------------

    def stream_encode(self, chunks: Iterable[Tensor], chunk_frames: int | None = None) -> Iterator[Posterior]:
        """Posteriors of an endless video: `chunks` are (B, 3, t, H, W) of any t >= 1, in order.

        Every level of the encoder works on at most about `chunk_frames` frames of the video at a time, by default as
        many as pay and fit into free memory (a UserError where not even one does). So memory does not grow with the
        video. Equals `encode` of the whole where the model streams exactly; the others need
        `enable_tiling(frames=...)`, see `streams`. The tail is right-replicated to the frame rule. No gradients.
        """
        self._require_stream("stream_encode", chunk_frames)
        checked = self._checked_chunks(chunks, 3, "stream_encode", "chunks (B, 3, t, H, W)")
        return self._posteriors(checked, chunk_frames)

    @torch.no_grad()
    def _posteriors(self, chunks: Iterable[Tensor], chunk_frames: int | None) -> Iterator[Posterior]:
        for moments in self._moment_stream(chunks, chunk_frames):
            yield Posterior(moments)

    def stream_decode(
        self,
        chunks: Iterable[Tensor],
        refine: bool = False,
        num_frames: int | None = None,
        chunk_frames: int | None = None,
    ) -> Iterator[Tensor]:
        """Frames (B, 3, t, H, W) of latents that arrive as (B, z, t, h, w) of any t >= 1; `refine` renders 2T - 1.

        `chunk_frames`, counted in rendered frames, is as in `stream_encode`; at 1 the largest pictures are drawn one by
        one. `num_frames` trims the total, in rendered frames. No gradients.
        """
        self._require_stream("stream_decode", chunk_frames)
        if refine:
            self._require_refiner()
        _check_num_frames(num_frames)
        z = self.spec.latent_channels
        checked = self._checked_chunks(chunks, z, "stream_decode", f"chunks of latents (B, {z}, t, h, w)")
        return self._rendered(checked, "refine" if refine else "decode", num_frames, chunk_frames)

    @torch.no_grad()
    def _rendered(
        self, chunks: Iterable[Tensor], work: str, left: int | None, chunk_frames: int | None
    ) -> Iterator[Tensor]:
        """Frames, at most `left` of them."""
        for frames in self._frame_stream(chunks, work, chunk_frames):
            if left is not None:
                frames, left = frames[:, :, :left], left - frames.shape[2]
            if frames.shape[2]:
                yield frames
            if left is not None and left <= 0:
                return

    @property
    def streams(self) -> bool:
        """Whether `stream_encode` and `stream_decode` work: exactly, or in the runs of `enable_tiling`."""
        return self.spec.exact_streaming or bool(self._tiling and self._tiling.frames)

    def _require_stream(self, name: str, chunk_frames: int | None) -> None:
        if chunk_frames is not None and (not isinstance(chunk_frames, int) or chunk_frames < 1):
            raise UserError(f"{name}: chunk_frames={chunk_frames}: expected at least 1, or None for what fits")
        if not self.streams:
            asked = self._tiling and self._tiling.frames  # and yet it does not: no runs make it stream
            hint = "" if asked else ", after enable_tiling(frames=17) for long clips"
            raise UserError(
                f"{name}: this {self.title} does not stream exactly ({self.spec.inexact}); use encode / decode{hint}"
            )

    def _stages(self, work: str) -> list[Stage]:
        """The parts that a stream goes through to "encode", "decode" or "refine", where the model streams exactly. A
        model that has several goes through each in its own pieces, which takes less memory."""
        spec = self.spec
        if work == "encode":
            return [Stage(self._moments, 1, spec.time_factor, spec.first_frames % spec.time_factor)]
        run, times = (self._refined, 2) if work == "refine" else (self._frames, 1)
        return [Stage(run, times * spec.time_factor)]

    def _moment_stream(self, chunks: Iterable[Tensor], chunk_frames: int | None) -> Iterator[Tensor]:
        """Moments, where the tail repeats its last frame until a latent is full."""
        spec = self.spec
        f, first, last = spec.time_factor, spec.first_frames, None
        filled = _filled(chunks, f, first % f)
        if spec.exact_streaming:
            yield from self._exact_stream("encode", filled, chunk_frames)
            return
        run = f * max(1, (self._tiling.frames - 1) // f)
        for piece in _regroup(filled, run, run + first % f):
            spec.check_size(*piece.shape[-2:])
            if first > 1 or last is None:
                yield self._tiled_moments(piece)
            else:  # a run shares its first frame with the run before
                yield self._tiled_moments(torch.cat([last, piece], 2))[:, :, 1:]
            last = piece[:, :, -1:].clone()

    def _frame_stream(self, chunks: Iterable[Tensor], work: str, chunk_frames: int | None) -> Iterator[Tensor]:
        """Frames of latents."""
        spec = self.spec
        if spec.exact_streaming:
            yield from self._exact_stream(work, chunks, chunk_frames)
            return
        alone, last = spec.first_frames > 1, None
        run = max(1, (self._tiling.frames - 1) // spec.time_factor)
        for piece in _regroup(chunks, run, run if alone else run + 1):
            if alone or last is None:
                yield self._tiled_frames(piece, work)
            else:  # a run shares its first latent with the run before
                yield self._tiled_frames(torch.cat([last, piece], 2), work)[:, :, 1:]
            last = piece[:, :, -1:].clone()

    def _exact_stream(self, work: str, chunks: Iterable[Tensor], chunk_frames: int | None) -> Iterator[Tensor]:
        """What the stages of `work` make of the chunks; in tiles, if enabled, each of which is a stream of its own."""
        chunks = iter(chunks)
        if (head := next(chunks, None)) is None:
            return
        encode, factor = work == "encode", self.spec.time_factor
        if encode:
            self.spec.check_size(*head.shape[-2:])
        most = chunk_frames or memory.chunk_frames(self, work, head)
        if self._tiling and self._tiling.frames:
            most = min(most, self._tiling.frames)
        on_cpu = head.device.type == "cpu"
        chunks, stages = chain([head], chunks), self._stages(work)
        del head
        streams: dict[object, Stream] = defaultdict(lambda: Stream(stages, most))
        step, first = (factor, self.spec.first_frames % factor) if encode else (1, 0)
        length = step * max(1, most // factor)
        for piece in _regroup(chunks, length, length - step + (first or step)):  # as short as every tile gives frames
            if self._tiling and self._tiling.size:
                unit = self.spec.space_factor if encode else 1
                yield self._tiled(lambda part, tile: torch.cat(list(streams[tile].push(part)), 2), piece, unit)
            else:
                yield from streams[None].push(piece)
        if on_cpu:
            memory.return_freed_memory()

    # ---- tiles and slices --------------------------------------------------------------------------------------------

    def enable_tiling(self, size: int = 256, overlap: float = 0.25, frames: int = 17) -> None:
        """Cuts what is larger than memory: tiles of `size` pixels, blended linearly over `overlap` of a tile, and runs
        of about `frames` frames. 0 keeps frames, or clips, whole. UserError where the numbers do not fit the model, or
        a tile is smaller than `least_tile`.

        Tiles in space are an approximation: each sees its own pixels only. Runs in time are exact where the model
        streams exactly; the others repeat the last frame of a run as the first of the next and drop it (as OD-VAE and
        CV-VAE do), or, where the first frame is no image, run independently.
        """
        tiling = Tiling(size, overlap, frames).check(self.spec.space_factor)
        if 0 < size < self.least_tile:
            raise UserError(
                f"tile size={size}: a pixel of this {self.title} sees {self.reach} to each side through its"
                f" convolutions; at least {self.least_tile}, or 0 for none"
            )
        self._tiling = tiling

    @cached_property
    def reach(self) -> int:
        """Pixels that a pixel sees to each side, see `tiling.reach`."""
        return reach(self)

    @property
    def least_tile(self) -> int:
        """Pixels of the smallest tile that `enable_tiling` takes: of latents, the next number that has the `reach`."""
        factor = self.spec.space_factor
        return max(1, -(-self.reach // factor)) * factor

    def disable_tiling(self) -> None:
        """Whole frames and whole clips again."""
        self._tiling = None

    def enable_slicing(self) -> None:
        """One clip of a batch at a time: less memory, the same result."""
        self._slicing = True

    def disable_slicing(self) -> None:
        """Whole batches again."""
        self._slicing = False

    def _render(self, z: Tensor, num_frames: int | None, refine: bool, return_dict: bool) -> DecoderOutput | tuple:
        channels = self.spec.latent_channels
        what = "refine" if refine else "decode"
        latents = self._checked(z, channels, what, f"latents (B, {channels}, t, h, w) or (B, {channels}, h, w)")
        _check_num_frames(num_frames)
        video = self._sliced(lambda part: self._whole_frames(part, what), latents)
        video = self._trim(video, 1).squeeze(2) if z.ndim == 4 else self._trim(video, num_frames)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def _sliced(self, run: Any, x: Tensor) -> Tensor:
        return torch.cat([run(part) for part in x.split(1)]) if self._slicing and len(x) > 1 else run(x)

    def _whole_moments(self, x: Tensor) -> Tensor:
        if self._in_pieces("encode", x, x.shape[2]):
            return torch.cat(list(self._moment_stream([x], None)), 2)
        return self._tiled_moments(x)

    def _whole_frames(self, z: Tensor, work: str) -> Tensor:
        if self._in_pieces(work, z, self.spec.frames(z.shape[2])):
            return torch.cat(list(self._frame_stream([z], work, None)), 2)
        return self._tiled_frames(z, work)

    def _in_pieces(self, work: str, x: Tensor, frames: int) -> bool:
        """Whether a clip is longer than the runs that were asked for, or, of an exact model, larger than memory."""
        if self._tiling and 0 < self._tiling.frames < frames:
            return True
        return self.spec.exact_streaming and not torch.is_grad_enabled() and not memory.fits(self, work, x)

    def _tiled_moments(self, x: Tensor) -> Tensor:
        return self._tiled(lambda piece, _: self._moments(piece), x, self.spec.space_factor)

    def _tiled_frames(self, z: Tensor, work: str) -> Tensor:
        run = self._refined if work == "refine" else self._frames
        return self._tiled(lambda piece, _: run(piece), z, 1)

    def _tiled(self, run: Callable[[Tensor, object], Tensor], x: Tensor, unit: int) -> Tensor:
        if not self._tiling or not self._tiling.size:
            return run(x, None)
        return tiled(run, x, self._tiling.size // self.spec.space_factor, self._tiling.overlap, unit)


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"


def _check_num_frames(num_frames: int | None) -> None:
    if num_frames is not None and (not isinstance(num_frames, int) or num_frames < 1):
        raise UserError(f"num_frames={num_frames}: expected at least 1, or None for all")


def _right_replicate(x: Tensor, frames: int) -> Tensor:
    missing = frames - x.shape[2]
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2) if missing else x


def _filled(chunks: Iterable[Tensor], step: int, first: int) -> Iterator[Tensor]:
    """The stream, whose last frame is repeated until its length is `first` and a multiple of `step`."""
    length, last = 0, None
    for chunk in chunks:
        length += chunk.shape[2]
        last = chunk[:, :, -1:].clone()
        yield chunk
    missing = (first - length) % step
    if length and missing:
        yield last.expand(-1, -1, missing, -1, -1)


def _regroup(chunks: Iterable[Tensor], length: int, begin: int) -> Iterator[Tensor]:
    """A stream in pieces of `length` frames, the first one of `begin`, the last one of what is left."""
    waiting: Tensor | None = None
    wanted = begin
    for chunk in chunks:
        waiting = chunk if waiting is None else torch.cat([waiting, chunk], 2)
        del chunk
        while waiting.shape[2] >= wanted:
            piece, waiting = waiting.tensor_split([wanted], 2)
            wanted = length
            yield piece
        waiting = waiting.clone()  # let go of the chunk it was a view of
    if waiting is not None and waiting.shape[2]:
        yield waiting
