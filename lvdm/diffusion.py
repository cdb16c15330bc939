"""Denoising diffusion in discrete time: noising, the training losses, the sampler, guidance. Knows no model.

Noise prediction with a learned variance (Ho et al. 2020, "Denoising Diffusion Probabilistic Models", here DDPM; Nichol
& Dhariwal 2021, "Improved DDPM"), as DiT and Latte train it. Tensors are (B, C, ...); schedules are computed in fp64.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lvdm.errors import UserError

Denoiser = Callable[[Tensor, Tensor], Tensor]


def _at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """`table` (steps,) read at `t` (B,), fp32, shaped to broadcast against `x` (B, ...)."""
    return table.float().to(x.device)[t.to(x.device)].view(-1, *[1] * (x.ndim - 1))


class _Chain:
    """The Gaussians of a chain of noise levels: `alphas_cumprod` (steps,) fp64, falling; t counts its steps."""

    def __init__(self, alphas_cumprod: Tensor):
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        betas = 1 - alphas_cumprod / previous
        self.signal = alphas_cumprod.sqrt()
        self.noise = (1 - alphas_cumprod).sqrt()
        # q(x_{t-1} | x_t, x_0), DDPM equations 6 and 7. At t = 0 it is a point: its log variance borrows that of t = 1.
        self.mean_x0 = betas * previous.sqrt() / (1 - alphas_cumprod)
        self.mean_xt = (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod)
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        self.log_variance = torch.cat([variance[1:2], variance[1:]]).log()
        self.log_betas = betas.log()

    def x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean data that `eps` implies, not clipped: latents do not live in [-1, 1]."""
        return (x_t - _at(self.noise, t, x_t) * eps) / _at(self.signal, t, x_t)

    def mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0)."""
        return _at(self.mean_x0, t, x_t) * x0 + _at(self.mean_xt, t, x_t) * x_t

    def learned_log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """From the posterior's (v = -1) to beta's (v = 1) log variance (Improved DDPM, equation 15)."""
        fraction = (v + 1) / 2
        return fraction * _at(self.log_betas, t, v) + (1 - fraction) * _at(self.log_variance, t, v)


class GaussianDiffusion:
    """Diffusion in `steps` steps with betas linear from 1e-4 to 0.02; t is 0..steps-1, and 0 the cleanest."""

    def __init__(self, steps: int = 1000):
        self.steps = steps
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64, device="cpu")
        self.alphas_cumprod = (1 - betas).cumprod(0)
        self._chain = _Chain(self.alphas_cumprod)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alphabar_t) x0 + sqrt(1 - alphabar_t) noise (DDPM equation 4), for x0 (B, C, ...) and t (B,)."""
        return _at(self._chain.signal, t, x0) * x0 + _at(self._chain.noise, t, x0) * noise

    def losses(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The losses of each sample, (B,) fp32: "loss", its part "mse" and, if the variance is learned, "vlb".

        `model_output` is (B, C, ...), the predicted noise, or (B, 2C, ...), the noise and the variance's v, for `x0`,
        `x_t`, `noise` of (B, C, ...). "mse" is the mean squared error of the noise; "vlb" is this step's term of the
        variational bound in bits a dimension; "loss" is their sum. The bound teaches the variance alone, so the
        predicted noise is detached in it (Improved DDPM, section 3.1, with the weight 1 that DiT and Latte train with).
        """
        eps, v = _split(model_output, x0.shape[1])
        mse = _mean(torch.square(eps - noise.float()))
        if v is None:
            return {"loss": mse, "mse": mse}
        vlb = self._bound(eps.detach(), v, x0.float(), x_t.float(), t)
        return {"loss": mse + vlb, "mse": mse, "vlb": vlb}

    def _bound(self, eps: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 -log p(x_0 | x_t); (B,) in bits a dimension."""
        chain = self._chain
        mean = chain.mean(chain.x0(x_t, t, eps), x_t, t)
        log_variance = chain.learned_log_variance(v, t)
        true_mean, true_log_variance = chain.mean(x0, x_t, t), _at(chain.log_variance, t, x_t)
        gap = true_log_variance - log_variance
        kl = 0.5 * (gap.exp() - 1 - gap + torch.square(true_mean - mean) * torch.exp(-log_variance))
        nll = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(t.to(x0.device) == 0, _mean(nll), _mean(kl)) / math.log(2)

    def respaced(self, steps: int) -> list[int]:
        """The `steps` timesteps, rising, that a shorter sampler visits: evenly spread from 0 to the last one.

        Raises UserError unless 1 <= steps <= self.steps.
        """
        if not 1 <= steps <= self.steps:
            raise UserError(f"{steps} sampling steps: expected 1 to {self.steps}")
        last = self.steps - 1
        return [round(i * last / (steps - 1)) for i in range(steps)] if steps > 1 else [last]

    @torch.no_grad()
    def sample(
        self,
        model: Denoiser,
        shape: Sequence[int],
        steps: int,
        generators: Sequence[torch.Generator],
        device: torch.device | str = "cpu",
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Ancestral sampling (DDPM algorithm 2) in `steps` respaced steps with the learned variance.

        `model(x, t)` takes x (B, *shape) fp32 and t (B,) int64, the original timesteps, and returns (B, 2C, ...), or
        (B, C, ...) for the fixed variance beta. There is one CPU generator a video and B of them; a video's noise comes
        from its own alone. `on_step(done)` is called after each step. Returns (B, *shape) fp32, x0 never clipped.
        """
        timesteps = self.respaced(steps)
        chain = _Chain(self.alphas_cumprod[timesteps])
        x = _noise(shape, generators, device)
        for i in reversed(range(steps)):
            step = torch.full((len(x),), i, device=device)
            eps, v = _split(model(x, torch.full_like(step, timesteps[i])), x.shape[1])
            mean = chain.mean(chain.x0(x, step, eps), x, step)
            if i > 0:
                log_variance = chain.learned_log_variance(torch.ones_like(x) if v is None else v, step)
                mean = mean + torch.exp(0.5 * log_variance) * _noise(shape, generators, device)
            x = mean
            if on_step is not None:
                on_step(steps - i)
        return x


def _split(model_output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The predicted noise and the variance's v, None where the model has none, in fp32."""
    eps, v = model_output[:, :channels].float(), model_output[:, channels:].float()
    return eps, v if v.shape[1] else None


def _mean(x: Tensor) -> Tensor:
    """The mean of each sample, (B,)."""
    return x.flatten(1).mean(1)


def _noise(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str) -> Tensor:
    """Standard normal (B, *shape) fp32, row i from generator i."""
    return torch.stack([torch.randn(*shape, generator=g, device="cpu") for g in generators]).to(device)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of the 1/127.5 wide bin of `x` in [-1, 1] under a Gaussian; the outer bins are open (DDPM equation 13).

    The normal's distribution function is its tanh approximation, as in the published code.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_scale = torch.exp(-log_scale)
    above = cdf(inverse_scale * (x - mean + 1 / 255)).masked_fill(x > 0.999, 1)
    below = cdf(inverse_scale * (x - mean - 1 / 255)).masked_fill(x < -0.999, 0)
    return (above - below).clamp(min=1e-12).log()


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


class Guidable(Protocol):
    """A batch of conditions that guidance can double."""

    def null_like(self) -> "Guidable": ...

    def cat(self, other: "Guidable") -> "Guidable": ...


def guided(model: Callable[..., Tensor], condition: Guidable, scale: float) -> Denoiser:
    """`model(x, t, condition)` as a `model(x, t)` with classifier-free guidance (Ho & Salimans 2022).

    The noise becomes null + scale * (conditional - null) in all its channels, in fp32; a predicted variance is the
    conditional one. Both come from one doubled batch; at scale 1 the model is called as it is.
    """
    if scale == 1:
        return lambda x, t: model(x, t, condition)
    doubled = condition.cat(condition.null_like())

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        conditional, null = model(torch.cat([x, x]), torch.cat([t, t]), doubled).float().chunk(2)
        c = x.shape[1]
        eps = null[:, :c] + scale * (conditional[:, :c] - null[:, :c])
        return torch.cat([eps, conditional[:, c:]], dim=1)

    return denoise
