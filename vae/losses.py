"""The terms of the VAE's loss, each a named scalar.

The papers sum |x - x^| over C, H, W a frame, add LPIPS broadcast over the same elements, average over frames, and add
1e-6 times the KL summed over the whole clip. Here every term is divided by C*H*W, so that values and gradient norms do
not depend on the resolution; their ratios, all that Adam sees, are the papers'.

IV-VAE's total (supplement, eq. 5) is the papers' times 256*256 / (h*w), against the same dependence: at every
resolution it is the total here times the constant 3 * 256 * 256, so there is no key for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Terms


@dataclass(frozen=True)
class Rendered:
    """What a term may look at: clips and their rendering (B, 3, T, H, W), the posterior and the noise that drew the
    latents from it (B, z, t, h, w), the clips' numbers since the start of training, and the samples seen before this
    step."""

    x: Tensor
    y: Tensor
    mean: Tensor
    logvar: Tensor
    noise: Tensor
    samples: list[int]
    seen: int

    @property
    def elements(self) -> int:
        """C*H*W, by which every term is divided."""
        return self.x[0, :, 0].numel()

    @cached_property
    def z(self) -> Tensor:
        """The latents that were rendered."""
        return self.mean + (0.5 * self.logvar).exp() * self.noise.to(self.mean)


@dataclass(frozen=True)
class Term:
    """One scalar of the loss, logged as it is under `name`, and added `weight` times from `start` samples on."""

    name: str
    weight: float
    value: Callable[[Rendered], Tensor]
    start: int = 0
    applies: Callable[[Rendered], bool] = lambda rendered: True
    summed: bool = False
    """Whether the value is a sum, still to be divided by C*H*W."""
    reconstructs: bool = False
    """Whether the adversary is balanced against it."""

    def weighted(self, value: Tensor, rendered: Rendered) -> Tensor:
        """What the value adds to the loss."""
        return (self.weight / rendered.elements if self.summed else self.weight) * value


def evaluate(terms: Sequence[Term], rendered: Rendered) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Values by name of the terms that apply by now, the weighted sum of those that reconstruct, and that of all."""
    values, reconstruction, others = {}, 0.0, 0.0
    for term in terms:
        if rendered.seen >= term.start and term.applies(rendered):
            values[term.name] = value = term.value(rendered)
            if term.reconstructs:
                reconstruction = reconstruction + term.weighted(value, rendered)
            else:
                others = others + term.weighted(value, rendered)
    return values, reconstruction, reconstruction + others


# ---------------------------------------------------------------------------------------------------------------------
# Values


def l1(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean |x - y| over everything, in fp32: the papers' sum over C, H, W, averaged over frames, by CHW.

    `weights` (T,) makes it a weighted mean over frames.
    """
    distance = (x.float() - y.float()).abs()
    return distance.mean() if weights is None else _weighted_mean(distance.mean((1, 3, 4)), weights)


def perceptual(
    lpips: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    frames: Tensor | None = None,
    weights: Tensor | None = None,
    chunk: int = 16,
) -> Tensor:
    """Mean LPIPS over frames, weighted by `weights` (T,); `frames` (K,) picks the frames looked at, to spare time.

    Beyond `chunk` frames, so many are looked at at a time, and looked at again in the backward pass, so that memory
    holds the activations of one chunk.
    """
    if frames is not None:
        x, y = x[:, :, frames], y[:, :, frames]
        weights = None if weights is None else weights[frames]
    pairs = list(zip(*(video.transpose(1, 2).flatten(0, 1).split(chunk) for video in (x, y)), strict=True))
    if len(pairs) == 1:
        distance = lpips(*pairs[0])
    else:
        distance = torch.cat([checkpoint(lpips, *pair, use_reentrant=False) for pair in pairs])
    return distance.mean() if weights is None else _weighted_mean(distance.reshape(len(x), -1), weights)


def _weighted_mean(of_frames: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of a value a frame, (B, T)."""
    weights = weights.to(of_frames)
    return (of_frames * weights).sum() / (len(of_frames) * weights.sum())


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of the posterior from N(0, I), summed over the clip's latent and averaged over the batch, in fp32."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / len(mean)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """0.5 (E relu(1 - D(x)) + E relu(1 + D(x^)))."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(x^)."""
    return -fake.float().mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    elements: int,
    average: Callable[[Tensor], Tensor] = lambda gradients: gradients,
) -> Tensor:
    """What balances the adversarial gradient against the reconstruction's at the decoder's last layer (VQGAN eq. 7).

    ||grad(reconstruction)|| / (||grad(adversarial)|| + 1e-4), clamped to 1e4, detached. Both losses are divided by
    `elements` = C*H*W here, so the published clamp and epsilon apply to the undivided gradient. `average` takes the
    mean of a tensor over the processes: the norms are those of the whole batch's gradients.
    """
    (r,) = torch.autograd.grad(elements * reconstruction, last_layer, retain_graph=True)
    (g,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    r, g = average(torch.stack([r.float(), g.float()]))
    return (r.norm() / (g.norm() + 1e-4)).clamp(0.0, 1e4).detach() / elements
