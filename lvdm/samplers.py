"""How a trained denoiser draws: schedulers of diffusers' kind for each objective, the sampling loop, guidance.

`sample` is the one loop; what it does between two calls of the model is the scheduler's: ancestral sampling (DDPM),
DDIM (Song et al. 2021), DPM-Solver++ (Lu et al. 2022), or Euler's method for flows. Knows no model.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from diffusers import ConfigMixin, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from lvdm import diffusion
from lvdm.errors import UserError, nearest

Denoiser = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor], Tensor | None]

SAMPLERS = {"noise": ("ddpm", "ddim", "dpm++"), "flow": ("euler",)}
"""The samplers of each objective, its default first."""


def make_scheduler(objective: str, sampler: str = "auto") -> SchedulerMixin:
    """A scheduler for models trained with `objective`; "auto" is its default. UserError for a sampler that misfits.

    "ddpm" is `DDPM`; "ddim" (with eta 0) and "dpm++" (of order 2) are deterministic after the first noise and need
    fewer steps; "euler" is for flows. All visit as many timesteps as they are given steps, from the noisiest on.
    """
    diffusion.objective(objective)  # an unknown one is told there
    known = SAMPLERS[objective]
    sampler = known[0] if sampler == "auto" else sampler
    if sampler not in known:
        raise UserError(
            f"sampler={sampler}: not for a model with objective={objective}{nearest(sampler, known)};"
            f" expected auto, {', '.join(known)}"
        )
    if sampler == "euler":
        return FlowMatchEulerDiscreteScheduler()
    if sampler == "ddpm":
        return DDPM()
    # DPM-Solver++ of order 1 is DDIM between any two timesteps. diffusers' DDIMScheduler goes 1000 // steps timesteps
    # at a time wherever the model is asked next, so it misses the data unless `steps` divides 1000.
    order = 1 if sampler == "ddim" else 2
    return DPMSolverMultistepScheduler.from_config(DDPM().config, solver_order=order, timestep_spacing="linspace")


class DDPM(SchedulerMixin, ConfigMixin):
    """Ancestral sampling (DDPM algorithm 2) with a learned variance, respaced (Improved DDPM); tables in fp64.

    Its timesteps are spread evenly from 0 to the last, and the predicted data are never clipped: latents do not live
    in [-1, 1]. The keys of the config are those of diffusers, so that `from_config` makes other schedulers from it.
    `timestep_spacing` is for them alone: with "trailing", a DDIMScheduler is right wherever its steps divide 1000.
    """

    order = 1
    init_noise_sigma = 1.0
    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # noqa: RUF012 (diffusers' name)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        timestep_spacing: str = "trailing",
    ):
        if (beta_schedule, prediction_type, clip_sample) != ("linear", "epsilon", False):
            raise UserError(
                "DDPM: expected beta_schedule=linear, prediction_type=epsilon, clip_sample=false; got"
                f" {beta_schedule}, {prediction_type}, {str(clip_sample).lower()}"
            )
        # from_config drops what its source took from its defaults, but other schedulers have other defaults
        self.register_to_config(_use_default_values=[])
        self._levels = diffusion.GaussianDiffusion(num_train_timesteps, beta_start, beta_end).alphas_cumprod
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets `timesteps`, int64 (steps,), falling, on `device`. UserError for fewer than 1 or more than trained."""
        steps, last = num_inference_steps, self.config.num_train_timesteps - 1
        _require_steps(steps, last + 1)
        self._rising = [round(i * last / (steps - 1)) for i in range(steps)] if steps > 1 else [last]
        self._chain = diffusion.Chain(self._levels[self._rising])
        self.timesteps = torch.tensor(self._rising[::-1], device=device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The model takes `sample` as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step from `timestep`, one of `timesteps`, to the next; the last, to the data, adds no noise.

        `model_output` for `sample` (B, C, ...) is (B, 2C, ...), the noise and the variance's v, or (B, C, ...): then
        the variance is beta. The noise of row i comes from `generator[i]`, or that of all from one generator. Computed
        in fp32, returned in the dtype of `sample`.
        """
        i, x, chain = self._rising.index(int(timestep)), sample.float(), self._chain.to(sample.device)
        step = torch.full((len(x),), i, device=x.device)
        eps, v = diffusion.split_variance(model_output, x.shape[1])
        mean = chain.mean(chain.x0(x, step, eps), x, step)
        if i > 0:
            log_variance = chain.learned_log_variance(torch.ones_like(x) if v is None else v, step)
            noise = randn_tensor(x.shape, generator, x.device, torch.float32)
            mean = mean + torch.exp(0.5 * log_variance) * noise
        mean = mean.to(sample.dtype)
        return SchedulerOutput(prev_sample=mean) if return_dict else (mean,)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: SchedulerMixin,
    shape: Sequence[int],
    steps: int,
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Tensor:
    """Draws from the model behind `denoise` in `steps` steps of `scheduler`; returns (B, *shape) fp32 on `device`.

    `denoise(x, t)` takes x (B, *shape) fp32 and t (B,), the timesteps of training (int64, for flows fp32), and returns
    (B, C, ...) or (B, 2C, ...), whose second half, the variance's v, is for `DDPM` alone. There is one CPU generator a
    video and B of them; a video's noise comes from its own alone. `on_step(done, x)` is called after each step, and a
    tensor that it returns takes the place of x. Any scheduler of diffusers will do that fits the objective. UserError
    unless there are 1 to 1000 steps.
    """
    _set_timesteps(scheduler, steps)
    generators = list(generators)
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # flows have none
    x = randn_tensor((len(generators), *shape), generators, torch.device(device), torch.float32)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for done, t in enumerate(scheduler.timesteps, 1):
        output = denoise(scaled(x, t), torch.full((len(x),), t.item(), dtype=t.dtype, device=device))
        if not isinstance(scheduler, DDPM):
            output, _ = diffusion.split_variance(output, x.shape[1])
        x = scheduler.step(output, t, x, **extra).prev_sample
        if on_step is not None:
            changed = on_step(done, x)
            x = x if changed is None else changed
    return x


def _set_timesteps(scheduler: SchedulerMixin, steps: int) -> None:
    """Starts `scheduler` anew with exactly `steps` timesteps, on the CPU: nobody waits for a device to read them."""
    trained = scheduler.config.num_train_timesteps
    _require_steps(steps, trained)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # its own last step would be one of 1 / 1000
    elif isinstance(scheduler, DPMSolverMultistepScheduler) and steps == trained:
        scheduler.set_timesteps(timesteps=range(trained - 1, -1, -1))  # its own would visit one twice, dividing by zero
    else:
        scheduler.set_timesteps(steps)


def _require_steps(steps: int, trained: int) -> None:
    """UserError unless 1 <= `steps` <= `trained`."""
    if not 1 <= steps <= trained:
        raise UserError(f"{steps} sampling steps: expected 1 to {trained}")


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


class Guidable(Protocol):
    """A batch of conditions that guidance can double."""

    def null_like(self) -> "Guidable": ...

    def cat(self, other: "Guidable") -> "Guidable": ...


def guided(model: Callable[..., Tensor], condition: Guidable, scale: float) -> Denoiser:
    """`model(x, t, condition)` as a `model(x, t)` with classifier-free guidance (Ho & Salimans 2022).

    The predicted noise or velocity becomes null + scale * (conditional - null) in all its channels, in fp32; a variance
    is the conditional one. Both come from one doubled batch; at scale 1 the model is called as it is.
    """
    if scale == 1:
        return lambda x, t: model(x, t, condition)
    doubled = condition.cat(condition.null_like())

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        conditional, null = model(torch.cat([x, x]), torch.cat([t, t]), doubled).float().chunk(2)
        c = x.shape[1]
        prediction = null[:, :c] + scale * (conditional[:, :c] - null[:, :c])
        return torch.cat([prediction, conditional[:, c:]], dim=1)

    return denoise
