"""A video VAE's latents, held to those of an image VAE: CV-VAE's regularisation (3.1) and OS-VAE's identity."""

import torch
from torch import Tensor

from lvdm.errors import UserError
from lvdm.rng import generator
from vae.base import VideoVAE
from vae.blocks import batch_to_frames, frames_to_batch
from vae.losses import Rendered, l1
from vae.osvae import OSVAE


class Alignment:
    """Losses that are small where `model` and the frozen image VAE `image` understand each other's latents.

    `mapping` is psi, which makes a video of as many frames as there are latents: the first frame and one for each group
    of frames that a later latent stands for. "slice" takes the first frame of the group, "average" its mean, "random"
    any one, a function of (seed, sample); "first" compares the first frame alone.
    """

    def __init__(self, image: VideoVAE, model: VideoVAE, mapping: str, seed: int, name: str = "the image VAE"):
        """UserError, which begins with `name`, where the two cannot share latents."""
        for key, ours, theirs in (
            ("frames a latent", 1, image.spec.time_factor),
            ("latent channels", model.spec.latent_channels, image.spec.latent_channels),
            ("pixels a latent", model.spec.space_factor, image.spec.space_factor),
        ):
            if ours != theirs:
                raise UserError(f"{name}: expected an image VAE of {ours} {key}, {image.title} has {theirs}")
        if model.spec.first_frames != 1:
            raise UserError(f"{name}: {model.title} has no latent of an image, so there is nothing to align")
        image.require_posterior(name)
        self.image, self.model = image.eval().requires_grad_(False), model
        self.mapping, self.seed = mapping, seed

    def decoder(self, rendered: Rendered) -> Tensor:
        """|psi(X) - D_i(Z)|: the image decoder renders the video's latents frame by frame (eq. 2, with L1)."""
        target = self.mapped(rendered.x, rendered.samples)
        z = rendered.z[:, :, : target.shape[2]]
        return l1(target, batch_to_frames(self.image.decode(frames_to_batch(z)).sample, len(z)))

    def encoder(self, rendered: Rendered) -> Tensor:
        """|X - D_v(E_i(psi(X)))|: the video decoder renders the image VAE's latents (eq. 1, with L1)."""
        mapped = self.mapped(rendered.x, rendered.samples)
        with torch.no_grad():
            z = batch_to_frames(self.image.encode(frames_to_batch(mapped)).latent_dist.mode(), len(mapped))
        video = self.model.decode(z).sample
        return l1(rendered.x[:, :, : video.shape[2]], video)

    def mapped(self, x: Tensor, samples: list[int]) -> Tensor:
        """psi: (B, 3, 1 + n f, H, W) -> (B, 3, 1 + n, H, W), of "first" (B, 3, 1, H, W)."""
        first, f = x[:, :, :1], self.model.spec.time_factor
        if self.mapping == "first":
            return first
        groups = x[:, :, 1:].unflatten(2, (-1, f))  # (B, 3, n, f, H, W)
        if self.mapping == "slice":
            rest = groups[:, :, :, 0]
        elif self.mapping == "average":
            rest = groups.mean(3)
        else:
            rest = torch.stack([self._chosen(clip, sample) for clip, sample in zip(groups, samples, strict=True)])
        return torch.cat([first, rest], 2)

    def _chosen(self, groups: Tensor, sample: int) -> Tensor:
        """One frame of each group of a clip, (3, n, f, H, W) -> (3, n, H, W)."""
        n, f = groups.shape[1:3]
        which = torch.randint(f, (n,), generator=generator(self.seed, "align", sample))
        return groups[:, torch.arange(n), which]


class Identity:
    """OS-VAE's first stage: the latent of an image is its own 2D latent, mean |z - z_2D| over a batch of T = 1."""

    def __init__(self, model: VideoVAE):
        if not isinstance(model, OSVAE):
            raise UserError(
                f"identity_weight: {model.title} has no image VAE inside whose latents could stay; osvae has"
            )
        self.model = model

    def __call__(self, rendered: Rendered) -> Tensor:
        with torch.no_grad():
            latents = self.model.image_latents(rendered.x[:, :, 0])
        return l1(rendered.z, latents.unsqueeze(2))
