"""The losses against numbers worked out by hand and against the papers' undivided formulas."""

import math

import pytest
import torch
from torch import nn

from lvdm.metrics.lpips import LPIPS
from vae import losses
from vae.losses import Rendered, Term, evaluate


def test_l1_by_hand():
    x, y = torch.zeros(1, 1, 2, 1, 2), torch.tensor([1.0, -2.0, 3.0, 0.0]).view(1, 1, 2, 1, 2)
    assert losses.l1(x, y).item() == 1.5
    half = losses.l1(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32 and half.item() == 1.5


def test_l1_with_weights_is_a_weighted_mean_over_frames():
    x, y = torch.zeros(2, 1, 3, 1, 2), torch.zeros(2, 1, 3, 1, 2)
    y[0, 0, 0], y[0, 0, 1], y[1, 0, 2] = torch.tensor([1.0, 3.0]), 5.0, 7.0
    # frames' means: 2, 5, 0 and 0, 0, 7
    expected = (2 + 3 * 5 + 7) / (2 * 5)
    assert losses.l1(x, y, torch.tensor([1.0, 3.0, 1.0])).item() == pytest.approx(expected)
    torch.testing.assert_close(losses.l1(x, y, torch.ones(3)), losses.l1(x, y))


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


def test_perceptual_with_weights_is_a_weighted_mean_over_the_frames_shown():
    x, y = torch.zeros(2, 3, 3, 2, 2), torch.zeros(2, 3, 3, 2, 2)
    y[0, 0, 0, 0, 0], y[0, 1, 1, 1, 1], y[1, 2, 2, 0, 1] = 1.0, 2.0, 3.0  # distances 1, 4, 0 and 0, 0, 9
    weights = torch.tensor([1.0, 3.0, 1.0])
    assert losses.perceptual(fake_lpips, x, y, weights=weights).item() == pytest.approx((1 + 3 * 4 + 9) / (2 * 5))
    shown = losses.perceptual(fake_lpips, x, y, torch.tensor([1, 2]), weights)
    assert shown.item() == pytest.approx((3 * 4 + 9) / (2 * 4))


def test_lpips_in_chunks_is_lpips_in_value_and_gradient():
    torch.manual_seed(0)
    lpips, x = LPIPS("vgg", pretrained=False), torch.rand(2, 3, 5, 16, 16) * 2 - 1
    y = (torch.rand(2, 3, 5, 16, 16) * 2 - 1).requires_grad_()
    held: dict[int, int] = {}

    def of_chunks(chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = losses.perceptual(lpips, x, y, chunk=chunk)
        held[chunk] = size
        return value, torch.autograd.grad(value, y)[0]

    whole, gradient = of_chunks(10)
    for chunk in (4, 3, 1):
        value, its_gradient = of_chunks(chunk)
        torch.testing.assert_close(value, whole)
        torch.testing.assert_close(its_gradient, gradient, rtol=1e-4, atol=1e-8)
        assert held[chunk] < held[10] / 20  # the frames alone, none of the activations


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
# Terms


def rendered(seen: int = 0, frames: int = 5) -> Rendered:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 3, frames, 4, 6, generator=g) * 2 - 1 for _ in range(2))
    mean, logvar, noise = (torch.randn(2, 4, 2, 1, 1, generator=g) for _ in range(3))
    return Rendered(x, y, mean, logvar, noise, [0, 1], seen)


def test_terms_are_named_as_they_are_and_weighted_in_the_sum():
    terms = [
        Term("a", 2.0, lambda r: torch.tensor(3.0), reconstructs=True),
        Term("b", 0.5, lambda r: torch.tensor(10.0), start=8, reconstructs=True),
        Term("c", 4.0, lambda r: torch.tensor(36.0), summed=True),
        Term("d", 1.0, lambda r: torch.tensor(100.0), applies=lambda r: r.x.shape[2] == 1),
    ]
    assert evaluate(terms, rendered(7)) == ({"a": 3.0, "c": 36.0}, 6.0, 6.0 + 4 * 36 / 72)  # C*H*W is 72
    assert evaluate(terms, rendered(8)) == ({"a": 3.0, "b": 10.0, "c": 36.0}, 11.0, 13.0)
    assert evaluate(terms, rendered(8, frames=1))[2] == 113.0


def test_latents_are_drawn_from_the_posterior():
    r = rendered()
    torch.testing.assert_close(r.z, r.mean + r.logvar.exp().sqrt() * r.noise)


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


def test_adaptive_weight_of_several_processes_is_that_of_their_mean_gradients():
    reconstruction, adversarial, weight = decoder_and_losses()
    parts = 12 * reconstruction, adversarial
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in parts]

    def average(of_this_process: torch.Tensor) -> torch.Tensor:
        assert torch.equal(of_this_process, torch.stack(gradients))
        return (of_this_process + torch.stack([gradients[0], 3 * gradients[1]])) / 2

    ours = losses.adaptive_weight(reconstruction, adversarial, weight, 12, average)
    assert 12 * ours.item() == pytest.approx((gradients[0].norm() / (2 * gradients[1].norm() + 1e-4)).item())
    alone = losses.adaptive_weight(reconstruction, adversarial, weight, 12)
    assert alone.item() == pytest.approx(2 * ours.item(), rel=1e-3)
