"""What a denoiser learns: how data are noised, which timesteps are drawn, and the loss. Knows no model.

"noise" is noise prediction with a learned variance (Ho et al. 2020, "Denoising Diffusion Probabilistic Models", here
DDPM; Nichol & Dhariwal 2021, "Improved DDPM"), as DiT and Latte train it; "flow" is rectified flow (Liu et al. 2022)
with the timesteps of Stable Diffusion 3 (Esser et al. 2024). Tensors are (B, C, ...); schedules are computed in fp64.
"""

import math

import torch
from torch import Tensor

from lvdm.errors import UserError, nearest

# ----------------------------------------------------------------------------------------------------------------------
# Noise prediction


def _at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """`table` (steps,) read at `t` (B,), shaped to broadcast against `x` (B, ...)."""
    return table[t.to(x.device)].view(-1, *[1] * (x.ndim - 1))


class Chain:
    """The Gaussians of a chain of noise levels: `alphas_cumprod` (steps,) fp64, falling; t counts its steps.

    Its tables are made in fp64 and read in fp32, after `to(device)`.
    """

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

    def to(self, device: torch.device | str) -> "Chain":
        """This chain, its tables moved to `device` in fp32; they stay there, so that no step has to copy them."""
        for name, table in vars(self).items():
            setattr(self, name, table.to(device, torch.float32))
        return self

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
    """Diffusion in `steps` steps with betas linear from `beta_start` to `beta_end`; t is 0..steps-1, 0 the cleanest."""

    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        self.steps = steps
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64, device="cpu")
        self.alphas_cumprod = (1 - betas).cumprod(0)
        self._chain = Chain(self.alphas_cumprod)

    def timestep(self, generator: torch.Generator) -> Tensor:
        """A training sample's timestep, int64 (), uniform over all steps."""
        return torch.randint(self.steps, (), generator=generator)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alphabar_t) x0 + sqrt(1 - alphabar_t) noise (DDPM equation 4), for x0 (B, C, ...) and t (B,)."""
        chain = self._chain.to(x0.device)
        return _at(chain.signal, t, x0) * x0 + _at(chain.noise, t, x0) * noise

    def losses(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The losses of each sample, (B,) fp32: "loss", its part "mse" and, if the variance is learned, "vlb".

        `model_output` is (B, C, ...), the predicted noise, or (B, 2C, ...), the noise and the variance's v, for `x0`,
        `x_t`, `noise` of (B, C, ...). "mse" is the mean squared error of the noise; "vlb" is this step's term of the
        variational bound in bits a dimension; "loss" is their sum. The bound teaches the variance alone, so the
        predicted noise is detached in it (Improved DDPM, section 3.1, with the weight 1 that DiT and Latte train with).
        """
        eps, v = split_variance(model_output, x0.shape[1])
        mse = _mean(torch.square(eps - noise.float()))
        if v is None:
            return {"loss": mse, "mse": mse}
        vlb = self._bound(eps.detach(), v, x0.float(), x_t.float(), t)
        return {"loss": mse + vlb, "mse": mse, "vlb": vlb}

    def _bound(self, eps: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 -log p(x_0 | x_t); (B,) in bits a dimension."""
        chain = self._chain.to(x0.device)
        mean = chain.mean(chain.x0(x_t, t, eps), x_t, t)
        log_variance = chain.learned_log_variance(v, t)
        true_mean, true_log_variance = chain.mean(x0, x_t, t), _at(chain.log_variance, t, x_t)
        gap = true_log_variance - log_variance
        kl = 0.5 * (gap.exp() - 1 - gap + torch.square(true_mean - mean) * torch.exp(-log_variance))
        nll = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(t.to(x0.device) == 0, _mean(nll), _mean(kl)) / math.log(2)


def split_variance(model_output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The prediction's first `channels`, (B, channels, ...), and the variance's v, None if it has no more; fp32."""
    eps, v = model_output[:, :channels].float(), model_output[:, channels:].float()
    return eps, v if v.shape[1] else None


def _mean(x: Tensor) -> Tensor:
    """The mean of each sample, (B,)."""
    return x.flatten(1).mean(1)


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
# Rectified flow


class RectifiedFlow:
    """Straight paths x_s = (1 - s) x0 + s noise; the model learns their velocity, noise - x0. t = 1000 s, fp32."""

    def timestep(self, generator: torch.Generator) -> Tensor:
        """A training sample's timestep, fp32 () in (0, 1000): s is logit-normal, of mean 0 and deviation 1."""
        return 1000 * torch.sigmoid(torch.randn((), generator=generator))

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The point of the path at t (B,) in [0, 1000], for `x0` and `noise` (B, C, ...); 0 is the data."""
        s = (t / 1000).to(x0.device).view(-1, *[1] * (x0.ndim - 1))
        return (1 - s) * x0 + s * noise

    def losses(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The losses of each sample, (B,) fp32: "mse", the mean squared error of the velocity, and the equal "loss".

        `model_output` is (B, C, ...), as `x0` and `noise` are; where it has more channels, UserError: no variance is
        learned. `x_t` and `t` are those of `GaussianDiffusion.losses` and not needed.
        """
        velocity, v = split_variance(model_output, x0.shape[1])
        if v is not None:
            raise UserError("objective=flow: the model predicts a variance too; build it with learn_sigma=false")
        mse = _mean(torch.square(velocity - (noise.float() - x0.float())))
        return {"loss": mse, "mse": mse}


# ----------------------------------------------------------------------------------------------------------------------
# By name

OBJECTIVES = {"noise": GaussianDiffusion, "flow": RectifiedFlow}


def objective(name: str) -> GaussianDiffusion | RectifiedFlow:
    """The objective of that name; UserError for a name that is not in OBJECTIVES."""
    if name not in OBJECTIVES:
        raise UserError(f"objective={name}: unknown{nearest(name, OBJECTIVES)}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]()
