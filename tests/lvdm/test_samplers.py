"""Samplers on data whose optimal denoiser is known, Gaussian data and points; schedulers, the loop, guidance."""

import itertools
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from lvdm.diffusion import OBJECTIVES, GaussianDiffusion
from lvdm.errors import UserError
from lvdm.rng import generator
from lvdm.samplers import DDPM, SAMPLERS, guided, make_scheduler, sample

LEVELS = GaussianDiffusion().alphas_cumprod
OBJECTIVE = {sampler: objective for objective, samplers in SAMPLERS.items() for sampler in samplers}
DETERMINISTIC = ("ddim", "dpm++", "euler")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def generators(*keys: int) -> list[torch.Generator]:
    return [generator(0, key) for key in keys]


def scheduler_of(sampler: str):
    return make_scheduler(OBJECTIVE[sampler], sampler)


# ----------------------------------------------------------------------------------------------------------------------
# Denoisers that know their data

MEAN = 3.0


def gaussian(sampler: str, std: float = 0.5):
    """The optimal model of data N(MEAN, std^2): the expected noise or velocity, given x_t."""

    def noise(x: Tensor, t: Tensor) -> Tensor:
        level = LEVELS[t[0]]
        return ((1 - level).sqrt() * (x.double() - level.sqrt() * MEAN) / (level * std**2 + 1 - level)).float()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        s = t[0].double() / 1000
        score = (x.double() - (1 - s) * MEAN) / ((1 - s) ** 2 * std**2 + s**2)
        return (s * score - MEAN - (1 - s) * std**2 * score).float()

    return velocity if OBJECTIVE[sampler] == "flow" else noise


def end_of_flow(sampler: str, start: Tensor, std: float = 0.5) -> Tensor:
    """Where the probability flow of that data takes `start`, fp64: it keeps the distance to the mean in deviations."""
    level = torch.zeros(()) if OBJECTIVE[sampler] == "flow" else LEVELS[999]
    total = level * std**2 + 1 - level
    return MEAN + std * (start.double() - level.sqrt() * MEAN) / total.sqrt()


def gaussian_with_variance(steps: int, std: float = 0.5):
    """`gaussian` with the v for the variance of x_{t-1} given x_t, of a DDPM in `steps` steps."""
    scheduler = DDPM()
    scheduler.set_timesteps(steps)
    earlier = dict(itertools.pairwise(scheduler.timesteps.tolist()))

    def model(x: Tensor, t: Tensor) -> Tensor:
        eps = gaussian("ddpm", std)(x, t)
        v = torch.zeros_like(eps)
        if int(t[0]) in earlier:
            level, previous = LEVELS[t[0]], LEVELS[earlier[int(t[0])]]
            total = level * std**2 + 1 - level
            beta = 1 - level / previous
            posterior = beta * (1 - previous) / (1 - level)
            from_x0 = beta * previous.sqrt() / (1 - level)
            variance = posterior + from_x0**2 * std**2 * (1 - level) / total
            v += (2 * (variance / posterior).log() / (beta / posterior).log() - 1).float()
        return torch.cat([eps, v], dim=1)

    return model


def point(sampler: str, x0: Tensor):
    """The optimal model of data that are always `x0`."""

    def noise(x: Tensor, t: Tensor) -> Tensor:
        level = LEVELS[t[0]]
        return ((x.double() - level.sqrt() * x0) / (1 - level).sqrt()).float()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return ((x.double() - x0) / (t[0].double() / 1000)).float()

    return velocity if OBJECTIVE[sampler] == "flow" else noise


@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_samples_gaussian_data_exactly(steps):
    # Each reverse step of Gaussian data is Gaussian, so with the exact mean and variance any number of steps is right.
    # Of 8192 numbers the mean strays by 0.5 / sqrt(8192) = 0.0055 and the deviation by 0.0039; the chain starts from
    # N(0, 1) where the data are N(0.019, 1), which moves the mean by less than 1e-3.
    samples = sample(gaussian_with_variance(steps), DDPM(), (4, 2, 32, 32), steps, generators(0, 1, 2, 3))
    assert samples.shape == (4, 4, 2, 32, 32) and samples.dtype == torch.float32
    assert math.isclose(samples.mean(), MEAN, abs_tol=0.015)
    assert math.isclose(samples.std(), 0.5, abs_tol=0.015)


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 500), ("dpm++", 50), ("euler", 250)])
def test_deterministic_samplers_give_gaussian_data_its_mean_and_deviation(sampler, steps):
    samples = sample(gaussian(sampler), scheduler_of(sampler), (4, 32, 32), steps, generators(0, 1, 2, 3))
    # Of 16384 numbers the mean strays by 0.0039, the deviation by 0.0028. The flow from N(0, 1) at t = 999, instead of
    # from the data's N(0.019, 1), ends 0.5 * 0.019 lower; the solvers' own error is below 0.005 (see the next).
    assert math.isclose(samples.mean(), MEAN, abs_tol=0.028)
    assert math.isclose(samples.std(), 0.5, abs_tol=0.016)


@pytest.mark.parametrize(("sampler", "order", "first"), [("ddim", 1, 40), ("euler", 1, 40), ("dpm++", 2, 20)])
def test_the_error_falls_at_the_order_of_the_solver(sampler, order, first):
    expected = end_of_flow(sampler, normal(1, 4, 256), std=0.25)

    def error(steps: int) -> float:
        x = sample(gaussian(sampler, std=0.25), scheduler_of(sampler), (4, 256), steps, [generator(0)])
        return float((x - expected).square().mean().sqrt())

    # Eight times the steps: 8^order times less, up to the higher terms of the error and t's rounding to integers.
    assert 8 ** (0.85 * order) < error(first) / error(8 * first) < 8 ** (1.15 * order)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("steps", [2, 3, 7, 10, 50, 300, 999, 1000])
def test_a_point_is_hit_in_any_number_of_steps(sampler, steps):
    x0 = normal(2, 3, 4, seed=5)
    samples = sample(point(sampler, x0), scheduler_of(sampler), (3, 4), steps, generators(0, 1))
    torch.testing.assert_close(samples, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", OBJECTIVE)
def test_a_point_is_hit_in_one_step(sampler):
    # From t = 999 the data are divided by sqrt(level) = 1 / 157, and with them fp32's rounding of x, 2e-7.
    x0 = normal(2, 3, 4, seed=5)
    samples = sample(point(sampler, x0), scheduler_of(sampler), (3, 4), 1, generators(0, 1))
    torch.testing.assert_close(samples, x0, atol=2e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Ancestral sampling


def test_the_last_step_of_ddpm_adds_no_noise():
    samples = sample(point("ddpm", torch.tensor(MEAN)), DDPM(), (2, 3, 4, 4), 10, generators(0))
    torch.testing.assert_close(samples, torch.full_like(samples, MEAN), atol=1e-4, rtol=0)


def test_without_a_learned_variance_ddpm_takes_beta():
    def beta(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([gaussian("ddpm")(x, t), torch.ones_like(x)], dim=1)

    a, b = (sample(model, DDPM(), (2, 2, 4, 4), 50, generators(0)) for model in (gaussian("ddpm"), beta))
    assert torch.equal(a, b)


def test_a_step_of_ddpm_is_the_posterior_of_its_predicted_data():
    scheduler, x, eps, v = DDPM(), normal(1, 2, 6), normal(1, 2, 6, seed=1), normal(1, 2, 6, seed=2)
    scheduler.set_timesteps(4)  # 999, 666, 333, 0
    result = scheduler.step(torch.cat([eps, v], 1), 666, x, generator(3)).prev_sample
    level, previous = LEVELS[666], LEVELS[333]
    beta = 1 - level / previous
    variance = beta * (1 - previous) / (1 - level)
    x0 = (x - (1 - level).sqrt() * eps) / level.sqrt()
    mean = (previous.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - previous) * x) / (1 - level)
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * variance.log()
    expected = mean + torch.exp(log_variance / 2) * torch.randn(1, 2, 6, generator=generator(3))
    torch.testing.assert_close(result, expected.float())


def test_in_all_steps_ddpm_is_that_of_diffusers():
    settings = {"clip_sample": False, "variance_type": "learned_range"}
    ours, theirs = DDPM(), DDPMScheduler(**settings)
    ours.set_timesteps(1000)
    theirs.set_timesteps(1000)
    x, output = normal(2, 4, 6), normal(2, 8, 6, seed=1)
    for t in (999, 500, 1, 0):
        a, b = (s.step(output, t, x, generator=generator(t)).prev_sample for s in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # theirs reads fp32 tables


def test_ddpm_keeps_the_dtype_of_its_sample_and_gives_tuples_too():
    scheduler, x = DDPM(), normal(1, 2, 6)
    assert scheduler.step(x.bfloat16(), 500, x.bfloat16(), generator(0)).prev_sample.dtype == torch.bfloat16
    (result,) = scheduler.step(x, 500, x, generator(0), return_dict=False)
    assert torch.equal(result, scheduler.step(x, torch.tensor(500), x, generator(0)).prev_sample)


def test_one_generator_draws_for_all_rows_and_a_list_a_row_each():
    scheduler, x = DDPM(), torch.zeros(3, 2, 6)
    deviation = math.sqrt(1 - LEVELS[500] / LEVELS[499])  # without a v, that of beta
    for given, drawn in (
        (generators(4, 5, 6), torch.stack([torch.randn(2, 6, generator=g) for g in generators(4, 5, 6)])),
        (generator(0), torch.randn(3, 2, 6, generator=generator(0))),
    ):
        torch.testing.assert_close(scheduler.step(x, 500, x, given).prev_sample, deviation * drawn)


# ----------------------------------------------------------------------------------------------------------------------
# DDIM


def test_ddim_moves_the_predicted_data_to_the_next_level():
    seen: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return torch.sin(x)

    result = sample(model, make_scheduler("noise", "ddim"), (2, 6), 7, generators(0))
    x = torch.randn(1, 2, 6, generator=generators(0)[0]).double()
    for t, following in zip(seen, [*LEVELS[seen[1:]], torch.ones(())], strict=True):
        level, eps = LEVELS[t], torch.sin(x)
        x = following.sqrt() * (x - (1 - level).sqrt() * eps) / level.sqrt() + (1 - following).sqrt() * eps
    torch.testing.assert_close(result, x.float(), rtol=1e-3, atol=1e-3)  # rounding, 157-fold in the first step


# ----------------------------------------------------------------------------------------------------------------------
# Schedulers


def test_every_objective_has_samplers():
    assert SAMPLERS.keys() == OBJECTIVES.keys()
    for objective, samplers in SAMPLERS.items():
        assert make_scheduler(objective).config == make_scheduler(objective, samplers[0]).config
        assert type(make_scheduler(objective)) is type(make_scheduler(objective, samplers[0]))


def test_a_sampler_that_does_not_fit_is_a_user_error():
    with pytest.raises(UserError, match=r"sampler=euler: .* objective=noise; expected auto, ddpm, ddim, dpm"):
        make_scheduler("noise", "euler")
    with pytest.raises(UserError, match="objective=flow; expected auto, euler"):
        make_scheduler("flow", "ddpm")
    with pytest.raises(UserError, match=r"sampler=dmp\+\+: .*did you mean 'dpm\+\+'"):
        make_scheduler("noise", "dmp++")
    with pytest.raises(UserError, match=r"objective=nose: unknown .*'noise'"):
        make_scheduler("nose")


def visited(scheduler, steps: int) -> Tensor:
    """The timesteps (steps,) that a model of two rows is asked for."""
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,) and t[0] == t[1] and x.dtype == torch.float32
        seen.append(t[0])
        return torch.zeros_like(x)

    sample(model, scheduler, (2, 2), steps, generators(0, 1))
    return torch.stack(seen)


@pytest.mark.parametrize("sampler", OBJECTIVE)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 300, 999, 1000])
def test_as_many_timesteps_as_steps_falling_from_the_noisiest(sampler, steps):
    t = visited(scheduler_of(sampler), steps)
    assert len(t) == steps and (t.diff() < 0).all()
    assert t.dtype == (torch.float32 if sampler == "euler" else torch.int64)
    assert t[0] == (1000.0 if sampler == "euler" else 999) and t[-1] >= 0


def test_the_timesteps_of_ddpm_span_all():
    t = visited(DDPM(), 250).flip(0)
    assert t[:4].tolist() == [0, 4, 8, 12] and t[-2:].tolist() == [995, 999]
    assert visited(DDPM(), 1000).tolist() == list(range(1000))[::-1]
    assert visited(DDPM(), 5).tolist() == [999, 749, 500, 250, 0]
    assert visited(DDPM(), 2).tolist() == [999, 0]
    assert visited(DDPM(), 1).tolist() == [999]


def test_the_timesteps_of_a_flow_are_evenly_spaced():
    assert visited(make_scheduler("flow"), 4).tolist() == [1000, 750, 500, 250]


@pytest.mark.parametrize("sampler", OBJECTIVE)
@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_impossible_step_counts_are_user_errors(sampler, steps):
    with pytest.raises(UserError, match=f"^{steps} sampling steps: expected 1 to 1000$"):
        sample(gaussian(sampler), scheduler_of(sampler), (2, 2), steps, generators(0))


def test_other_schedulers_are_made_from_the_config_of_ddpm():
    for other in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        made = other.from_config(DDPM().config)
        torch.testing.assert_close(made.alphas_cumprod.double(), LEVELS, rtol=1e-4, atol=0)
        assert made.config.prediction_type == "epsilon" and not made.config.get("clip_sample", False)
        made.set_timesteps(20)
        assert made.timesteps[0] == 999 and made.config.get("variance_type") != "learned_range"
        assert DDPM.from_config(made.config).config.items() >= {**DDPM().config, "_use_default_values": []}.items()


@pytest.mark.parametrize("steps", [50, 250])
@pytest.mark.parametrize(
    ("other", "sampler"),
    [
        (DDIMScheduler, "ddim"),
        (EulerDiscreteScheduler, "ddim"),  # scales the first noise and what the model sees
        (DPMSolverMultistepScheduler, "dpm++"),
        (UniPCMultistepScheduler, "dpm++"),  # takes no generator
    ],
)
def test_schedulers_made_from_that_config_sample_as_ours_do(other, sampler, steps):
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([gaussian(sampler)(x, t.long()), torch.ones_like(x)], dim=1)

    # The grids differ by a timestep at most, which moves these samples by 1e-3; a wrong schedule moves them by 0.05.
    made = other.from_config(DDPM().config)
    a, b = (sample(model, scheduler, (4, 256), steps, generators(0)) for scheduler in (made, scheduler_of(sampler)))
    torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


@pytest.mark.parametrize("sampler", SAMPLERS["noise"])
def test_a_config_never_clips_whatever_scheduler_it_went_through(sampler):
    assert DDIMScheduler.from_config(make_scheduler("noise", sampler).config).config.clip_sample is False
    assert DDPM.from_config(make_scheduler("noise", sampler).config).config.clip_sample is False


def test_ddpm_refuses_what_it_does_not_do():
    with pytest.raises(UserError, match="DDPM: expected beta_schedule=linear"):
        DDPM.from_config(DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False).config)


@pytest.mark.parametrize("sampler", OBJECTIVE)
def test_a_saved_scheduler_samples_the_same(sampler, tmp_path):
    scheduler = scheduler_of(sampler)
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    a, b = (sample(gaussian(sampler), s, (4, 6), 10, generators(0)) for s in (scheduler, loaded))
    assert torch.equal(a, b)


class Pipe(DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)


def test_ddpm_is_a_component_of_a_pipeline(tmp_path):
    Pipe(DDPM(beta_end=0.03)).save_pretrained(tmp_path)
    loaded = Pipe.from_pretrained(tmp_path).scheduler
    assert type(loaded) is DDPM and loaded.config.beta_end == 0.03
    assert DDIMScheduler.from_config(loaded.config).config.timestep_spacing == "trailing"


# ----------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize("sampler", OBJECTIVE)
def test_a_scheduler_keeps_nothing_between_samples(sampler):
    scheduler = scheduler_of(sampler)
    first = sample(gaussian(sampler), scheduler, (4, 6), 10, generators(0, 1))
    sample(gaussian(sampler), scheduler, (4, 6), 7, generators(2))
    assert torch.equal(first, sample(gaussian(sampler), scheduler, (4, 6), 10, generators(0, 1)))


@pytest.mark.parametrize("sampler", OBJECTIVE)
def test_a_stopped_sample_leaves_nothing_behind(sampler):
    def stop(done: int, x: Tensor) -> None:
        if done == 4:
            raise KeyboardInterrupt

    scheduler = scheduler_of(sampler)
    first = sample(gaussian(sampler), scheduler, (4, 6), 10, generators(0))
    with pytest.raises(KeyboardInterrupt):
        sample(gaussian(sampler), scheduler, (4, 6), 10, generators(0), on_step=stop)
    assert torch.equal(first, sample(gaussian(sampler), scheduler, (4, 6), 10, generators(0)))


@pytest.mark.parametrize("sampler", OBJECTIVE)
def test_a_video_depends_on_its_own_generator_only(sampler):
    a, b = (
        sample(gaussian(sampler), scheduler_of(sampler), (4, 2, 4, 4), 20, generators(*keys))
        for keys in ((7, 8, 9), (1, 8, 2))
    )
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], b[0])


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_only_ddpm_sees_the_variance(sampler):
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([gaussian(sampler)(x, t), normal(*x.shape)], dim=1)

    a, b = (sample(m, scheduler_of(sampler), (4, 6), 10, generators(0)) for m in (gaussian(sampler), model))
    assert torch.equal(a, b)


@pytest.mark.parametrize("sampler", OBJECTIVE)
def test_all_but_the_model_is_fp32(sampler):
    def model(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return gaussian(sampler)(x, t).bfloat16()

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t).float()

    a, b = (sample(m, scheduler_of(sampler), (4, 6), 10, generators(0)) for m in (model, rounded))
    assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("sampler", OBJECTIVE)
def test_progress_is_told_after_each_step(sampler):
    heard: list[tuple[int, Tensor]] = []
    last = sample(
        gaussian(sampler), scheduler_of(sampler), (2, 2), 5, generators(0), on_step=lambda *s: heard.append(s)
    )
    assert [done for done, _ in heard] == [1, 2, 3, 4, 5] and torch.equal(heard[-1][1], last)


@pytest.mark.parametrize("sampler", OBJECTIVE)
def test_latents_given_back_after_a_step_are_those_that_go_on(sampler):
    asked: list[Tensor] = []
    other = normal(1, 2, 2, seed=9)

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x)
        return gaussian(sampler)(x, t)

    def change(done: int, x: Tensor) -> Tensor | None:
        return {2: other, 4: 2 * x}.get(done)

    last = sample(model, scheduler_of(sampler), (2, 2), 4, generators(0), on_step=change)
    plain = sample(gaussian(sampler), scheduler_of(sampler), (2, 2), 4, generators(0))
    assert torch.equal(asked[2], other) and not torch.equal(asked[3], other)
    again = sample(
        gaussian(sampler), scheduler_of(sampler), (2, 2), 4, generators(0), on_step=lambda i, _: {2: other}.get(i)
    )
    assert torch.equal(last, 2 * again) and not torch.equal(again, plain)


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


def test_guidance_of_a_velocity():
    """Points at 1 and, without a condition, at 0: guidance 2 goes to the point at 2."""

    def model(x: Tensor, t: Tensor, condition: Numbers) -> Tensor:
        return (x - condition.values.view(-1, 1, 1)) / (t.view(-1, 1, 1) / 1000)

    denoise = guided(model, Numbers(torch.ones(2)), 2.0)
    samples = sample(denoise, make_scheduler("flow"), (4, 5), 8, generators(0, 1))
    torch.testing.assert_close(samples, torch.full_like(samples, 2.0), rtol=0, atol=1e-5)
