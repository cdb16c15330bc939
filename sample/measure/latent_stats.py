"""What the latents of a VAE are like: moments of every channel, how channels go together, a picture of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm.media import contact_sheet
from sample.measure.figures import finite
from vae.base import VideoVAE

BINS, REACH = 61, 6.0
"""Of the histogram, and its ends, in standard deviations."""


@dataclass
class LatentStats:
    """Of posterior means, over all clips and places; a list has one number a channel."""

    mean: list[float]
    std: list[float]
    excess_kurtosis: list[float]
    """0 for a normal distribution, above it for heavy tails."""
    first_std: list[float]
    """Of the first latent frame."""
    later_std: list[float | None]
    """Of the others; None where there are none."""
    posterior_std: list[float]
    """The mean of the posterior's own standard deviation."""
    correlation: list[list[float]]
    """Of channels at the same place."""
    histogram: list[tuple[float, float]]
    """(centre, density) of all channels, each shifted and scaled to mean 0 and standard deviation 1."""
    kl: float | None
    """To N(0, 1), in nats a latent value; None of posteriors without a spread, of which it is infinite."""


@dataclass
class CodeStats:
    """How much of a codebook is in use."""

    codes: int
    used: int
    perplexity: float
    """exp of the entropy: as many codes in equal use would say as much."""


@torch.no_grad()
def latent_stats(model: VideoVAE, clips: Iterable[Tensor]) -> LatentStats | CodeStats:
    """Statistics of batches (B, 3, T, H, W) in [-1, 1], of codes where the model is discrete."""
    if model.spec.discrete:
        return stats_of_codes(torch.cat([model.codes(x).flatten().cpu() for x in clips]), len(model.codebook))
    posteriors = [model.encode(x).latent_dist for x in clips]
    means = torch.cat([p.mean.cpu() for p in posteriors]).double()
    stds = torch.cat([p.std.cpu() for p in posteriors]).double()
    return stats_of(means, stds)


def stats_of(means: Tensor, stds: Tensor) -> LatentStats:
    """Of posterior means and standard deviations (N, z, t, h, w) in fp64."""
    rows = means.transpose(0, 1).flatten(1)  # (z, values)
    centre, spread = rows.mean(1, keepdim=True), rows.std(1, correction=0, keepdim=True)
    normal = (rows - centre) / spread.clamp_min(1e-12)
    counts = torch.histc(normal, BINS, -REACH, REACH)
    width = 2 * REACH / BINS
    centres = [-REACH + (i + 0.5) * width for i in range(BINS)]
    density = (counts / normal.numel() / width).tolist()
    kl = 0.5 * (means.square() + stds.square() - 1 - 2 * stds.log())
    later = means[:, :, 1:].transpose(0, 1).flatten(1)
    return LatentStats(
        mean=centre[:, 0].tolist(),
        std=spread[:, 0].tolist(),
        excess_kurtosis=(normal.pow(4).mean(1) - 3).tolist(),
        first_std=means[:, :, 0].transpose(0, 1).flatten(1).std(1, correction=0).tolist(),
        later_std=later.std(1, correction=0).tolist() if later.numel() else [None] * len(rows),
        posterior_std=stds.mean((0, 2, 3, 4)).tolist(),
        correlation=(normal @ normal.T / normal.shape[1]).tolist(),
        histogram=list(zip(centres, density, strict=True)),
        kl=finite(kl.mean().item()),
    )


def stats_of_codes(codes: Tensor, size: int) -> CodeStats:
    """Of integers (N,) from 0 to `size` - 1."""
    share = torch.bincount(codes, minlength=size).double() / len(codes)
    return CodeStats(size, int((share > 0).sum()), torch.special.entr(share).sum().exp().item())


def normal_curve(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The normal density at the same places."""
    return [(x, math.exp(-x * x / 2) / math.sqrt(2 * math.pi)) for x, _ in points]


@torch.no_grad()
def draw_latents(model: VideoVAE, x: Tensor, path: Path) -> None:
    """A PNG of the latents of one clip (1, 3, T, H, W): a row a channel (16 at most), a column a latent frame, each
    channel from its smallest value (black) to its largest (white)."""
    z = model.encode(x).latent_dist.mean[0, :16].cpu()
    low, high = z.amin((1, 2, 3), keepdim=True), z.amax((1, 2, 3), keepdim=True)
    levels = ((z - low) / (high - low).clamp_min(1e-12) * 255).round()
    scale = max(1, 96 // max(z.shape[-2:]))
    large = F.interpolate(levels, scale_factor=scale, mode="nearest").to(torch.uint8)
    contact_sheet(
        [channel[..., None].expand(-1, -1, -1, 3) for channel in large],
        path,
        labels=[f"channel {i}" for i in range(len(large))],
    )
