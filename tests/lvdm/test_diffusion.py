"""The diffusion maths against closed forms: schedule, losses, sampler, guidance."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lvdm.diffusion import GaussianDiffusion, guided
from lvdm.errors import UserError
from lvdm.rng import generator

DIFFUSION = GaussianDiffusion()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


# ----------------------------------------------------------------------------------------------------------------------
# Schedule


def test_noise_levels():
    alphas_cumprod = DIFFUSION.alphas_cumprod
    assert alphas_cumprod.dtype == torch.float64
    assert math.isclose(alphas_cumprod[0], 0.9999, rel_tol=1e-12)
    assert math.isclose(alphas_cumprod[499], 0.078587, rel_tol=1e-5)
    assert math.isclose(alphas_cumprod[999], 4.036e-5, rel_tol=1e-4)


def test_noise_is_added_at_the_level_of_each_row():
    x0, noise, t = normal(2, 3, 4), normal(2, 3, 4, seed=1), torch.tensor([0, 999])
    x_t = DIFFUSION.add_noise(x0, t, noise)
    for i, level in enumerate((0.9999, float(DIFFUSION.alphas_cumprod[999]))):
        torch.testing.assert_close(x_t[i], math.sqrt(level) * x0[i] + math.sqrt(1 - level) * noise[i])


def test_respaced_timesteps():
    timesteps = DIFFUSION.respaced(250)
    assert timesteps[:4] == [0, 4, 8, 12] and timesteps[-2:] == [995, 999]
    assert len(set(timesteps)) == 250
    assert DIFFUSION.respaced(1000) == list(range(1000))
    assert DIFFUSION.respaced(2) == [0, 999]
    assert DIFFUSION.respaced(1) == [999]


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts_are_user_errors(steps):
    with pytest.raises(UserError, match=f"{steps} sampling steps: expected 1 to 1000"):
        DIFFUSION.respaced(steps)


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def losses(t: list[int], eps_error: float = 0.0, v: float = -1.0, scale: float = 1.0) -> dict[str, Tensor]:
    """The losses of a predictor that is `eps_error` off everywhere and says `v` for the variance."""
    t = torch.tensor(t)
    x0, noise = scale * normal(len(t), 4, 2, 3, 3), normal(len(t), 4, 2, 3, 3, seed=1)
    x_t = DIFFUSION.add_noise(x0, t, noise)
    output = torch.cat([noise + eps_error, torch.full_like(noise, v)], dim=1)
    return DIFFUSION.losses(output, x0, x_t, t, noise)


def test_a_perfect_predictor_loses_nothing():
    result = losses([1, 300, 999])
    assert torch.equal(result["mse"], torch.zeros(3))
    assert result["vlb"].abs().max() < 1e-3  # mean and variance are the posterior's
    assert torch.equal(result["loss"], result["mse"] + result["vlb"])


def test_mse_is_a_mean_for_each_sample():
    torch.testing.assert_close(losses([1, 500], eps_error=0.5)["mse"], torch.full((2,), 0.25))


@pytest.mark.parametrize(("t", "v", "error"), [(1, 1.0, 0.1), (300, 0.0, 0.3), (999, 0.5, 1.0)])
def test_the_bound_is_the_divergence_of_two_gaussians(t, v, error):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    levels = (1 - betas).cumprod(0)
    variance = betas[t] * (1 - levels[t - 1]) / (1 - levels[t])
    predicted = torch.exp((v + 1) / 2 * betas[t].log() + (1 - v) / 2 * variance.log())
    # x_t is the same for both, so the means differ by what the error in the noise does to x0.
    shift = betas[t] * levels[t - 1].sqrt() / (1 - levels[t]) * error * ((1 - levels[t]) / levels[t]).sqrt()
    expected = kl_divergence(Normal(0, variance.sqrt()), Normal(shift, predicted.sqrt())) / math.log(2)
    torch.testing.assert_close(losses([t], error, v)["vlb"].double(), expected[None], rtol=2e-3, atol=1e-6)


def test_the_bound_is_finite_and_not_negative():
    result = losses([1, 2, 10, 100, 500, 998, 999], eps_error=0.7, v=0.3)
    assert result["vlb"].isfinite().all() and (result["vlb"] >= 0).all()


def test_at_t_0_the_bound_is_the_likelihood_of_an_8_bit_bin():
    # The mean is exact and the scale is that of t = 1's posterior, so each bin's share is known.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    levels = (1 - betas).cumprod(0)
    scale = (betas[1] * (1 - levels[0]) / (1 - levels[1])).sqrt()
    unit = Normal(0.0, 1.0)
    share = unit.cdf(1 / 255 / scale) - unit.cdf(-1 / 255 / scale)
    torch.testing.assert_close(losses([0], scale=0.1)["vlb"].double(), -share.log2()[None], rtol=5e-3, atol=0)


def test_at_t_0_the_outer_bins_are_open():
    x0 = torch.cat([torch.full((1, 1, 50), 1.0), torch.full((1, 1, 50), -1.0)], dim=2)
    noise, t = torch.zeros_like(x0), torch.tensor([0])
    output = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)
    vlb = DIFFUSION.losses(output, x0, DIFFUSION.add_noise(x0, t, noise), t, noise)["vlb"]
    # The mean is the data, so an outer bin holds all the mass but the tail beyond its one edge.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    levels = (1 - betas).cumprod(0)
    scale = (betas[1] * (1 - levels[0]) / (1 - levels[1])).sqrt()
    torch.testing.assert_close(vlb.double(), -Normal(0.0, 1.0).cdf(1 / 255 / scale).log2()[None], rtol=1e-2, atol=0)


def test_the_bound_teaches_the_variance_alone():
    t = torch.tensor([0, 500])
    x0, noise = normal(2, 4, 6), normal(2, 4, 6, seed=1)
    output = normal(2, 8, 6, seed=2).requires_grad_()
    x_t = DIFFUSION.add_noise(x0, t, noise)
    (gradient,) = torch.autograd.grad(DIFFUSION.losses(output, x0, x_t, t, noise)["vlb"].sum(), output)
    assert not gradient[:, :4].any()
    assert gradient[:, 4:].abs().amax(dim=(1, 2)).min() > 0


def test_without_a_learned_variance_there_is_no_bound():
    t = torch.tensor([0, 500])
    x0, noise = normal(2, 4, 6), normal(2, 4, 6, seed=1)
    result = DIFFUSION.losses(noise + 0.5, x0, DIFFUSION.add_noise(x0, t, noise), t, noise)
    assert set(result) == {"loss", "mse"} and torch.equal(result["loss"], result["mse"])


def test_losses_of_bf16_outputs_are_fp32():
    t = torch.tensor([999])
    x0, noise = normal(1, 4, 6), normal(1, 4, 6, seed=1)
    output = torch.cat([noise, noise], dim=1).bfloat16()
    result = DIFFUSION.losses(output, x0, DIFFUSION.add_noise(x0, t, noise), t, noise)
    assert all(value.dtype == torch.float32 for value in result.values())


# ----------------------------------------------------------------------------------------------------------------------
# Sampler

MEAN, STD = 3.0, 0.5


def exact_denoiser(steps: int):
    """The optimal model of data N(MEAN, STD^2): E[noise | x_t], and the v for the variance of x_{t-1} given x_t."""
    levels = DIFFUSION.alphas_cumprod
    timesteps = DIFFUSION.respaced(steps)
    earlier = dict(zip(timesteps[1:], timesteps[:-1], strict=True))

    def model(x: Tensor, t: Tensor) -> Tensor:
        level = levels[t[0]]
        total = level * STD**2 + 1 - level
        eps = (1 - level).sqrt() * (x.double() - level.sqrt() * MEAN) / total
        v = torch.zeros_like(eps)
        if int(t[0]) in earlier:
            previous = levels[earlier[int(t[0])]]
            beta = 1 - level / previous
            posterior = beta * (1 - previous) / (1 - level)
            from_x0 = beta * previous.sqrt() / (1 - level)
            variance = posterior + from_x0**2 * STD**2 * (1 - level) / total
            v += 2 * (variance / posterior).log() / (beta / posterior).log() - 1
        return torch.cat([eps, v], dim=1).float()

    return model


@pytest.mark.parametrize("steps", [10, 50])
def test_gaussian_data_is_sampled_exactly(steps):
    # Each reverse step of Gaussian data is Gaussian, so with the exact mean and variance any number of steps is right.
    samples = DIFFUSION.sample(exact_denoiser(steps), (4, 2, 32, 32), steps, [generator(0, i) for i in range(4)])
    assert samples.shape == (4, 4, 2, 32, 32) and samples.dtype == torch.float32
    assert math.isclose(samples.mean(), MEAN, abs_tol=0.015)
    assert math.isclose(samples.std(), STD, abs_tol=0.015)


def test_the_last_step_adds_no_noise():
    def point(x: Tensor, t: Tensor) -> Tensor:
        level = DIFFUSION.alphas_cumprod[t[0]]
        eps = (x - level.sqrt() * MEAN) / (1 - level).sqrt()
        return torch.cat([eps, torch.zeros_like(eps)], dim=1).float()

    samples = DIFFUSION.sample(point, (2, 3, 4, 4), 10, [generator(0)])
    torch.testing.assert_close(samples, torch.full_like(samples, MEAN), atol=1e-4, rtol=0)


def test_without_a_learned_variance_the_sampler_takes_beta():
    def fixed(x: Tensor, t: Tensor) -> Tensor:
        return exact_denoiser(50)(x, t)[:, :2]

    def beta(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([fixed(x, t), torch.ones_like(x)], dim=1)

    a, b = (DIFFUSION.sample(model, (2, 2, 4, 4), 50, [generator(0)]) for model in (fixed, beta))
    assert torch.equal(a, b)


def test_the_model_gets_the_original_timesteps_and_progress_is_told():
    seen, done = [], []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64 and t.shape == (3,)
        seen.append(int(t[0]))
        return torch.cat([x, x], dim=1)

    DIFFUSION.sample(model, (1, 2, 2), 5, [generator(0, i) for i in range(3)], on_step=done.append)
    assert seen == [999, 749, 500, 250, 0]
    assert done == [1, 2, 3, 4, 5]


def test_a_video_depends_on_its_own_generator_only():
    model = exact_denoiser(20)
    a = DIFFUSION.sample(model, (4, 2, 4, 4), 20, [generator(0, i) for i in (7, 8, 9)])
    b = DIFFUSION.sample(model, (4, 2, 4, 4), 20, [generator(0, i) for i in (1, 8, 2)])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], b[0])


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


class Numbers:
    """Conditions that are one number a row; the null condition is zero."""

    def __init__(self, values: Tensor):
        self.values = values

    def null_like(self) -> "Numbers":
        return Numbers(torch.zeros_like(self.values))

    def cat(self, other: "Numbers") -> "Numbers":
        return Numbers(torch.cat([self.values, other.values]))


def counting_model(calls: list[int]):
    """Noise x + condition and variance t + condition, in as many channels as x has."""

    def model(x: Tensor, t: Tensor, condition: Numbers) -> Tensor:
        calls.append(len(x))
        c = condition.values.view(-1, 1, 1)
        return torch.cat([x + c, t.view(-1, 1, 1) + c.expand_as(x)], dim=1)

    return model


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_guidance_acts_on_all_channels_of_the_noise_and_none_of_the_variance(channels):
    calls = []
    x, t, values = normal(3, channels, 5), torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 4.0])
    out = guided(counting_model(calls), Numbers(values), 7.0)(x, t)
    assert calls == [6]  # one doubled batch
    torch.testing.assert_close(out[:, :channels], x + 7 * values.view(-1, 1, 1))
    torch.testing.assert_close(out[:, channels:], (t + values).view(-1, 1, 1).expand_as(x))


def test_guidance_scale_1_is_no_guidance_and_no_doubled_batch():
    calls = []
    model, condition = counting_model(calls), Numbers(torch.tensor([1.0, 2.0]))
    x, t = normal(2, 4, 5), torch.tensor([1, 2])
    assert torch.equal(guided(model, condition, 1.0)(x, t), model(x, t, condition))
    assert calls == [2, 2]


def test_guidance_scale_0_is_the_null_condition():
    x, t = normal(2, 4, 5), torch.tensor([1, 2])
    out = guided(counting_model([]), Numbers(torch.tensor([1.0, 2.0])), 0.0)(x, t)
    torch.testing.assert_close(out[:, :4], x)


def test_guidance_without_a_learned_variance():
    def model(x: Tensor, t: Tensor, condition: Numbers) -> Tensor:
        return x + condition.values.view(-1, 1, 1)

    x = normal(1, 4, 5)
    torch.testing.assert_close(guided(model, Numbers(torch.tensor([1.0])), 2.0)(x, torch.tensor([1])), x + 2)
