"""The terms of the VAE's loss, each a named scalar.

The papers sum |x - x^| over C, H, W a frame, add LPIPS broadcast over the same elements, average over frames, and add
1e-6 times the KL summed over the whole clip. Here every term is divided by C*H*W, so that values and gradient norms do
not depend on the resolution; their ratios, all that Adam sees, are the papers'.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean |x - y| over everything, in fp32: the papers' sum over C, H, W, averaged over frames, by CHW."""
    return (x.float() - y.float()).abs().mean()


def perceptual(lpips: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, frames: Tensor | None = None) -> Tensor:
    """Mean LPIPS over frames; `frames` (K,) picks the frames looked at, to spare time on long clips."""
    if frames is not None:
        x, y = x[:, :, frames], y[:, :, frames]
    return lpips(x.transpose(1, 2).flatten(0, 1), y.transpose(1, 2).flatten(0, 1)).mean()


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


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, elements: int) -> Tensor:
    """What balances the adversarial gradient against the reconstruction's at the decoder's last layer (VQGAN eq. 7).

    ||grad(reconstruction)|| / (||grad(adversarial)|| + 1e-4), clamped to 1e4, detached. Both losses are divided by
    `elements` = C*H*W here, so the published clamp and epsilon apply to the undivided gradient.
    """
    (r,) = torch.autograd.grad(elements * reconstruction, last_layer, retain_graph=True)
    (g,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = r.float().norm() / (g.float().norm() + 1e-4)
    return ratio.clamp(0.0, 1e4).detach() / elements
