"""The contract of the quantising autoencoders: a clip becomes integer codes, and codes become a clip. No training."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from lvdm.errors import UserError
from vae.base import VideoVAE

TOKENS = 1024
"""Latents that are compared with a codebook at a time; one with 16384 codes then takes 64 MiB."""


class DiscreteVAE(VideoVAE):
    """Base of the VAEs with a codebook: `codes` and `decode` in place of a posterior.

    A subclass gives `spec` (`discrete`; `latent_channels` are the codebook's), `codebook` (codes, channels), `_moments`
    (the features that are quantised), `_quantise` and `_frames` (of embedded codes). Slices and tiles are those of
    `VideoVAE`: tiles are blended in the features before codes are taken, and in the frames.
    """

    _supports_gradient_checkpointing = False
    codebook: Tensor

    def train(self, mode: bool = True) -> "DiscreteVAE":
        """Stays in eval mode: nothing here is trained, and batch norms would take up what they see."""
        return super().train(False)

    def _quantise(self, h: Tensor) -> Tensor:
        """Features (B, c, t, h, w) -> codes (B, t, h, w)."""
        raise TypeError(f"{type(self).__name__} gives no quantiser")

    def codes(self, x: Tensor, pad: bool = True) -> Tensor:
        """Codes, int64 (B, t, h, w), of a clip (B, 3, T, H, W) in [-1, 1]; images (B, 3, H, W) give (B, h, w).

        Lengths off the frame rule are padded to the next valid one, or a UserError with `pad=False`; H and W off the
        spatial factor are a UserError.
        """
        codes = self._sliced(lambda part: self._quantise(self._whole_moments(part)), self._clip(x, pad))
        return codes.squeeze(1) if x.ndim == 4 else codes

    def decode(
        self,
        codes: Tensor,
        num_frames: int | None = None,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """Frames of integer codes (B, t, h, w), trimmed to `num_frames` when given; (B, h, w) gives images.

        A UserError where they are no integers from 0 to the size of the codebook. Nothing is drawn: `generator` is
        there for diffusers' pipelines, which pass theirs.
        """
        self._check_codes(codes)
        embedded = F.embedding(codes.long(), self.codebook).movedim(-1, 1)
        return self._render(embedded, num_frames, False, return_dict)

    def reconstruct(self, x: Tensor) -> Tensor:
        """A clip (B, 3, T, H, W) or images (B, 3, H, W) through its codes and back, T frames."""
        return self.decode(self.codes(x), num_frames=x.shape[2] if x.ndim == 5 else None).sample

    def encode(self, x: Tensor, pad: bool = True, return_dict: bool = True) -> None:
        """A UserError: there is no posterior."""
        self.require_posterior("encode")

    def forward(self, x: Tensor, noise: Tensor | None = None) -> None:
        """A UserError: training a codebook is no part of this framework."""
        self.require_posterior("training")

    def stream_encode(self, chunks: Iterable[Tensor], chunk_frames: int | None = None) -> None:
        """A UserError: there is no posterior."""
        self.require_posterior("stream_encode")

    def stream_decode(
        self,
        chunks: Iterable[Tensor],
        refine: bool = False,
        num_frames: int | None = None,
        chunk_frames: int | None = None,
    ) -> None:
        """A UserError: streams are of continuous latents."""
        self.require_posterior("stream_decode")

    @property
    def streams(self) -> bool:
        return False  # there is no posterior to stream

    def _check_codes(self, codes: Tensor) -> None:
        name, count = self.title, len(self.codebook)
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool or codes.ndim not in (3, 4):
            raise UserError(
                f"decode: {name} takes integer codes (B, t, h, w) or (B, h, w), as codes() gives them,"
                f" not {str(codes.dtype).removeprefix('torch.')} {tuple(codes.shape)}"
            )
        low, high = (int(n) for n in codes.aminmax())
        if low < 0 or high >= count:
            raise UserError(f"decode: codes from {low} to {high}, expected 0 to {count - 1}, {name}'s codebook")


def best_codes(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Features (B, c, t, h, w) -> (B, t, h, w), which of n codes scores highest by `weight` (n, c) and `bias` (n,).

    In float32 at least, and in chunks, so that memory does not grow with the clip.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, bias, tokens = weight.to(dtype), bias.to(dtype), h.movedim(1, -1)
    parts = tokens.flatten(0, -2).split(TOKENS)
    return torch.cat([F.linear(part.to(dtype), weight, bias).argmax(-1) for part in parts]).view(tokens.shape[:-1])


def nearest_codes(h: Tensor, codebook: Tensor) -> Tensor:
    """Features (B, c, t, h, w) -> (B, t, h, w), the nearest rows of `codebook` (n, c) by squared distance."""
    codebook = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
    # |h - e|^2 = |h|^2 - (2 h.e - |e|^2), and |h|^2 is the same for all codes
    return best_codes(h, 2 * codebook, -codebook.square().sum(1))
