"""The objectives against closed forms: noise levels, paths, drawn timesteps, losses."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lvdm.diffusion import OBJECTIVES, GaussianDiffusion, RectifiedFlow, objective
from lvdm.errors import UserError
from lvdm.rng import generator

DIFFUSION = GaussianDiffusion()
FLOW = RectifiedFlow()


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


def test_timesteps_of_training_are_uniform_integers_drawn_from_the_generator():
    t = torch.stack([DIFFUSION.timestep(g) for g in [generator(0)] for _ in range(4000)])
    assert t.dtype == torch.int64 and t.shape == (4000,) and t.min() >= 0 and t.max() <= 999
    # The mean of n uniform draws from 0..999 strays by 288.7 / sqrt(n) = 4.6; each quarter holds 1000 +- 27 of them.
    assert math.isclose(t.double().mean(), 499.5, abs_tol=4 * 4.6)
    assert ((t // 250).bincount() - 1000).abs().max() < 4 * 27.4
    assert torch.equal(DIFFUSION.timestep(generator(7)), torch.randint(1000, (), generator=generator(7)))


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
# Rectified flow


def test_a_flow_goes_straight_from_data_to_noise():
    x0, noise, t = normal(3, 2, 4), normal(3, 2, 4, seed=1), torch.tensor([0.0, 250.0, 1000.0])
    x_t = FLOW.add_noise(x0, t, noise)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])


def test_timesteps_of_a_flow_are_logit_normal():
    t = torch.stack([FLOW.timestep(g) for g in [generator(0)] for _ in range(4000)])
    assert t.dtype == torch.float32 and t.shape == (4000,) and t.min() > 0 and t.max() < 1000
    # The share of n draws below a quantile p strays by sqrt(p (1 - p) / n) <= 0.0079.
    for p in (0.05, 0.25, 0.5, 0.75, 0.95):
        quantile = 1000 * torch.sigmoid(Normal(0.0, 1.0).icdf(torch.tensor(p)))
        assert math.isclose((t < quantile).double().mean(), p, abs_tol=4 * math.sqrt(p * (1 - p) / 4000))
    assert torch.equal(FLOW.timestep(generator(7)), FLOW.timestep(generator(7)))


def test_the_loss_of_a_flow_is_the_mean_squared_error_of_the_velocity():
    x0, noise, t = normal(2, 3, 4), normal(2, 3, 4, seed=1), torch.tensor([10.0, 990.0])
    error = torch.tensor([0.5, 2.0]).view(2, 1, 1)
    result = FLOW.losses(noise - x0 + error, x0, FLOW.add_noise(x0, t, noise), t, noise)
    assert set(result) == {"loss", "mse"} and torch.equal(result["loss"], result["mse"])
    torch.testing.assert_close(result["mse"], torch.tensor([0.25, 4.0]))
    assert FLOW.losses(x0.bfloat16(), x0, x0, t, noise)["loss"].dtype == torch.float32


def test_the_velocity_is_the_slope_of_the_path():
    x0, noise = normal(1, 3, 4), normal(1, 3, 4, seed=1)
    a, b = (FLOW.add_noise(x0, torch.tensor([t]), noise) for t in (400.0, 600.0))
    result = FLOW.losses((b - a) / 0.2, x0, a, torch.tensor([400.0]), noise)
    assert result["loss"].max() < 1e-10


def test_a_flow_learns_no_variance():
    x = normal(1, 4, 6)
    with pytest.raises(UserError, match="learn_sigma"):
        FLOW.losses(torch.cat([x, x], dim=1), x, x, torch.tensor([500.0]), x)


# ----------------------------------------------------------------------------------------------------------------------
# By name


def test_objectives_by_name():
    assert {name: type(objective(name)) for name in OBJECTIVES} == {"noise": GaussianDiffusion, "flow": RectifiedFlow}


def test_an_unknown_objective_names_the_nearest():
    with pytest.raises(UserError, match=r"objective=flows: unknown \(did you mean 'flow'\?\); known: noise, flow"):
        objective("flows")
