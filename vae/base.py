"""The contract of every video autoencoder: diffusers' `encode` / `decode`, and `spec`, `refine` and streams on top.

Videos are (B, 3, T, H, W) floats in [-1, 1], latents (B, z, t, h, w). A 4-D input is a batch of images (T = 1)
and gives 4-D back, which is how diffusers' own video pipelines call an image VAE frame by frame.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from lvdm.errors import UserError
from lvdm.latents import weights_hash
from vae.blocks import Streamed, StreamState


@dataclass(frozen=True)
class VAESpec:
    """What a program must know of a VAE before it sees a frame. Frame counts follow T = time_factor * n + 1."""

    time_factor: int
    space_factor: int
    latent_channels: int
    exact_streaming: bool
    """Whether any chunking and any prefix give the whole clip's result."""
    refines: bool
    """Whether `refine` renders 2T - 1 frames."""
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    """Defaults a channel, for users without statistics of their own data."""

    def valid_frames(self, frames: int) -> int:
        """The least length >= `frames` that the frame rule allows."""
        return -(-(frames - 1) // self.time_factor) * self.time_factor + 1

    def latent_frames(self, frames: int) -> int:
        """Latents of a clip of `frames` frames, after padding to a valid length."""
        return (self.valid_frames(frames) - 1) // self.time_factor + 1

    def frames(self, latent_frames: int) -> int:
        """Frames that `decode` renders from so many latents."""
        return (latent_frames - 1) * self.time_factor + 1

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(z, t, h, w) of a clip; a UserError where the size is not divisible by the spatial factor."""
        self.check_size(height, width)
        f = self.space_factor
        return self.latent_channels, self.latent_frames(frames), height // f, width // f

    def check_size(self, height: int, width: int) -> None:
        f = self.space_factor
        if height % f or width % f:
            fits = " or ".join(f"{max(f, height // f * f + k)}x{max(f, width // f * f + k)}" for k in (0, f))
            raise UserError(f"frames of {height}x{width} (height x width): both must be divisible by {f}, e.g. {fits}")


class VideoVAE(ModelMixin, ConfigMixin):
    """Base of the video autoencoders. A subclass gives `spec`, `_moments`, `_frames` and, if it refines, `_refined`."""

    _supports_gradient_checkpointing = True

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
        """(B, z, t, h, w) -> (B, 3, 2T - 1, H, W)."""
        raise UserError(
            f"this {type(self).__name__} has no refinement decoder: give a UniVAE after stage 2 (lvdm train refine),"
            " or render without refine"
        )

    def latent_sha256(self) -> str:
        """Hash of the weights that make and read latents; a refinement decoder may come and go."""
        return weights_hash({k: v for k, v in self.state_dict().items() if not k.startswith("refiner.")})

    # ---- whole clips -------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """The posterior of a clip (B, 3, T, H, W) or of images (B, 3, H, W), in [-1, 1].

        Lengths off the frame rule are right-replicated to the next valid one; H and W off the spatial factor are a
        UserError. `.latent_dist` has `sample()`, `mode()`, `mean`, `logvar`, each (B, z, t, h, w).
        """
        self.spec.check_size(*x.shape[-2:])
        video = x.unsqueeze(2) if x.ndim == 4 else x
        moments = self._moments(_right_replicate(video, self.spec.valid_frames(video.shape[2])))
        posterior = DiagonalGaussianDistribution(moments.squeeze(2) if x.ndim == 4 else moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, num_frames: int | None = None, return_dict: bool = True) -> DecoderOutput | tuple:
        """Frames of latents (B, z, t, h, w), trimmed to `num_frames` when given; (B, z, h, w) gives images."""
        video = self._frames(z.unsqueeze(2) if z.ndim == 4 else z)
        video = video.squeeze(2) if z.ndim == 4 else video[:, :, :num_frames]
        return DecoderOutput(sample=video) if return_dict else (video,)

    def refine(self, z: Tensor, num_frames: int | None = None, return_dict: bool = True) -> DecoderOutput | tuple:
        """2T - 1 frames from the latents of T frames; `num_frames` trims, counted in rendered frames."""
        video = self._refined(z.unsqueeze(2) if z.ndim == 4 else z)
        video = video.squeeze(2) if z.ndim == 4 else video[:, :, :num_frames]
        return DecoderOutput(sample=video) if return_dict else (video,)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, mean, logvar) of clips (B, 3, T, H, W); `noise` (B, z, t, h, w) draws the posterior, None
        takes its mean. The training step goes through here, so that a wrapped model synchronises its gradients."""
        posterior = self.encode(x).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return self.decode(z, num_frames=x.shape[2]).sample, posterior.mean, posterior.logvar

    # ---- streams -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream_encode(self, chunks: Iterable[Tensor], chunk_frames: int = 8) -> Iterator[DiagonalGaussianDistribution]:
        """Posteriors of an endless video: `chunks` are (B, 3, t, H, W) of any t >= 1, in order.

        Works on at most about `chunk_frames` frames at a time, so memory does not grow with the video, and equals
        `encode` of the whole. The tail is right-replicated to the frame rule. Raises UserError for inexact models.
        """
        self._require_exact("stream_encode")
        state, f = StreamState(), self.spec.time_factor
        for piece in _regroup(chunks, f, max(1, chunk_frames // f), first=1):
            self.spec.check_size(*piece.shape[-2:])
            length = piece.shape[2] - (0 if state.started else 1)
            piece = _right_replicate(piece, piece.shape[2] + -length % f)
            yield DiagonalGaussianDistribution(self._moments(piece, state))
            state.started = True

    @torch.no_grad()
    def stream_decode(
        self, chunks: Iterable[Tensor], refine: bool = False, num_frames: int | None = None, chunk_latents: int = 2
    ) -> Iterator[Tensor]:
        """Frames (B, 3, t, H, W) of latents that arrive as (B, z, t, h, w) of any t >= 1; `refine` renders 2T - 1.

        At most `chunk_latents` latents are decoded at a time. `num_frames` trims the total, in rendered frames.
        """
        self._require_exact("stream_decode")
        state, left = StreamState(), num_frames
        for piece in _regroup(chunks, 1, chunk_latents, first=0):
            frames = self._refined(piece, state) if refine else self._frames(piece, state)
            state.started = True
            if left is not None:
                frames, left = frames[:, :, :left], left - frames.shape[2]
            if frames.shape[2]:
                yield frames
            if left is not None and left <= 0:
                return

    def _require_exact(self, name: str) -> None:
        if not self.spec.exact_streaming:
            raise UserError(
                f"{name}: this {type(self).__name__} does not stream exactly (statistics over time or interpolation"
                " that looks ahead); use encode / decode on whole clips, or norm=frame and upsample=nearest"
            )

    def _name_streamed_modules(self) -> None:
        """Gives each module that keeps frames between chunks its path, the key of its cache; call after building."""
        for path, module in self.named_modules():
            if isinstance(module, Streamed):
                module.path = path


def _right_replicate(x: Tensor, frames: int) -> Tensor:
    missing = frames - x.shape[2]
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2) if missing else x


def _regroup(chunks: Iterable[Tensor], step: int, most: int, first: int) -> Iterator[Tensor]:
    """Cuts a stream into pieces of `most` steps along time, `first` extra frames in the first, a shorter tail last."""
    buffer: Tensor | None = None
    extra = first
    for chunk in chunks:
        buffer = chunk if buffer is None else torch.cat([buffer, chunk], 2)
        while buffer.shape[2] >= extra + step * most:
            piece, buffer = buffer.split([extra + step * most, buffer.shape[2] - extra - step * most], 2)
            extra = 0
            yield piece
        buffer = buffer.clone()  # let go of the chunk it was a view of
    if buffer is not None and buffer.shape[2]:
        yield buffer
