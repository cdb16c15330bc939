"""The losses against numbers worked out by hand and against the papers' undivided formulas."""

import math

import pytest
import torch
from torch import nn

from vae import losses


def test_l1_by_hand():
    x, y = torch.zeros(1, 1, 2, 1, 2), torch.tensor([1.0, -2.0, 3.0, 0.0]).view(1, 1, 2, 1, 2)
    assert losses.l1(x, y).item() == 1.5
    half = losses.l1(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32 and half.item() == 1.5


def test_hinges_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 2.0])
    assert losses.hinge_discriminator(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 4.0 / 3))
    assert losses.hinge_generator(fake).item() == pytest.approx(1.0 / 3)


@pytest.mark.parametrize(
    ("mean", "variance", "expected"),
    [(0.0, 1.0, 0.0), (2.0, 1.0, 2.0), (0.0, math.e, 0.5 * (math.e - 2.0)), (1.0, 4.0, 0.5 * (4.0 - math.log(4.0)))],
)
def test_kl_closed_forms_summed_over_the_clip_and_averaged_over_the_batch(mean, variance, expected):
    shape = (3, 4, 2, 5, 6)
    value = losses.kl(torch.full(shape, mean), torch.full(shape, math.log(variance)))
    assert value.item() == pytest.approx(4 * 2 * 5 * 6 * expected, abs=1e-3)


def test_kl_equals_the_library_of_distributions():
    mean, logvar = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 2
    torch.testing.assert_close(losses.kl(mean, logvar), expected)


def fake_lpips(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A distance a frame, (N, 3, H, W) twice -> (N, 1, 1, 1), as LPIPS gives it."""
    assert x.ndim == 4
    return (x - y).square().amax((1, 2, 3), keepdim=True)


def test_perceptual_is_the_mean_over_frames_or_over_those_picked():
    x, y = torch.zeros(2, 3, 3, 2, 2), torch.zeros(2, 3, 3, 2, 2)
    y[0, 0, 0, 0, 0], y[0, 1, 2, 1, 1], y[1, 2, 1, 0, 1] = 1.0, 2.0, 3.0
    assert losses.perceptual(fake_lpips, x, y).item() == pytest.approx((1.0 + 4.0 + 9.0) / 6)
    assert losses.perceptual(fake_lpips, x, y, torch.tensor([0, 2])).item() == pytest.approx((1.0 + 4.0) / 4)


def test_the_total_times_chw_is_the_papers_formula():
    b, c, t, h, w = 2, 3, 5, 4, 6
    x, y = torch.rand(b, c, t, h, w) * 2 - 1, torch.rand(b, c, t, h, w) * 2 - 1
    mean, logvar = 20 * torch.randn(b, 4, 2, 2, 3), 9 + torch.randn(b, 4, 2, 2, 3)
    elements = c * h * w
    ours = losses.l1(x, y) + losses.perceptual(fake_lpips, x, y) + 1e-6 / elements * losses.kl(mean, logvar)

    frames = 0.0
    for i in range(b):
        for j in range(t):
            distance = fake_lpips(x[i : i + 1, :, j], y[i : i + 1, :, j])[0]
            frames += ((x[i, :, j] - y[i, :, j]).abs() + distance).sum()  # LPIPS is added to every element
    clip_kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / b
    published = frames / (b * t) + 1e-6 * clip_kl
    torch.testing.assert_close(ours * elements, published)
    assert 1e-6 * clip_kl > 1e-4 * published  # large enough to be seen above the tolerance


# ---------------------------------------------------------------------------------------------------------------------
# The adaptive weight


def decoder_and_losses(scale: float = 1.0):
    """Two linear layers, the last one the decoder's; the losses, divided by 12 elements, and the last weight."""
    torch.manual_seed(0)
    first, last, critic = nn.Linear(5, 7), nn.Linear(7, 12), nn.Linear(12, 1)
    z, x = torch.randn(4, 5), torch.randn(4, 12)
    y = last(first(z).tanh())
    return (y - x).abs().mean(), -scale * critic(y).mean(), last.weight


def test_adaptive_weight_is_the_published_ratio_of_undivided_gradients():
    reconstruction, adversarial, weight = decoder_and_losses()
    ours = losses.adaptive_weight(reconstruction, adversarial, weight, 12)

    (r,) = torch.autograd.grad(12 * reconstruction, weight, retain_graph=True)
    (g,) = torch.autograd.grad(adversarial, weight, retain_graph=True)
    published = r.norm() / (g.norm() + 1e-4)
    torch.testing.assert_close(12 * ours, published)
    assert not ours.requires_grad

    # so the step's whole gradient is the published one, divided by the elements
    (ours_total,) = torch.autograd.grad(reconstruction + 0.5 * ours * adversarial, weight, retain_graph=True)
    (published_total,) = torch.autograd.grad(12 * reconstruction + 0.5 * published * adversarial, weight)
    torch.testing.assert_close(12 * ours_total, published_total)


def test_adaptive_weight_has_the_published_clamp_and_epsilon():
    reconstruction, adversarial, weight = decoder_and_losses(scale=1e-12)
    (r,) = torch.autograd.grad(12 * reconstruction, weight, retain_graph=True)
    assert 1e3 < r.norm() / 1e-4 < 1e5
    ours = losses.adaptive_weight(reconstruction, adversarial, weight, 12)
    assert 12 * ours.item() == pytest.approx(min(1e4, r.norm().item() / 1e-4), rel=1e-5)
    huge = losses.adaptive_weight(100 * reconstruction, adversarial, weight, 12)
    assert 12 * huge.item() == pytest.approx(1e4)
