"""The adversary of a VAE: a discriminator with an optimizer of its own, beside whatever engine trains the renderer."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lvdm import accelerator as accelerators
from lvdm.meter import Meter
from train.configs import Rendering
from train.loop import LossGuard, adam, set_rate
from vae import losses
from vae.discriminators import PatchGAN
from vae.losses import Rendered


class Adversary:
    """Judges renderings and learns to tell them from clips.

    Every process holds all of it: gradients are averaged once a step, so that it is one network under DDP and DeepSpeed
    alike. Register it for checkpointing.
    """

    def __init__(self, config: Rendering, accelerator: Any, last_layer: Tensor, guard: LossGuard, meter: Meter):
        """`last_layer` is the weight of the layer that draws the frames."""
        self.config, self.accelerator, self.last_layer = config, accelerator, last_layer
        self.guard, self.meter = guard, meter
        dims = {"3d": 3, "2d": 2}[config.discriminator]
        critic = PatchGAN(dims, config.discriminator_width, config.discriminator_norm)
        self.critic = critic.to(accelerator.device)
        self.optimizer = adam(self.critic.parameters(), config)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.precision == "fp16")
        self.learnt: list[Tensor] = []  # the loss of each micro-batch of this step

    def joined(self, seen: int) -> bool:
        """Whether it takes part in the step after `seen` samples."""
        return seen >= self.config.adversarial_start

    def oppose(self, rendered: Rendered, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the frozen critic adds to the renderer's loss, balanced against `reconstruction`; its terms by name."""
        self.critic.requires_grad_(False)
        g = losses.hinge_generator(self.critic(rendered.y))
        average = partial(self.accelerator.reduce, reduction="mean")
        weight = losses.adaptive_weight(reconstruction, g, self.last_layer, rendered.elements, average)
        return self.config.adversarial_weight * weight * g, {"g": g, "adaptive": weight * rendered.elements}

    def learn(self, rendered: Rendered) -> None:
        """The hinge loss of a micro-batch and its gradients for the critic; none goes back to the rendering."""
        self.critic.requires_grad_(True)
        loss = losses.hinge_discriminator(self.critic(rendered.x), self.critic(rendered.y.detach()))
        self.scaler.scale(loss / self.config.accumulate).backward()
        self.learnt.append(loss.detach())

    def step(self, rate: float, seen: int, names: list[str]) -> None:
        """Ends a step: moves the critic by the gradients of all micro-batches and processes, where there are any."""
        if not self.learnt:
            return
        parameters = list(self.critic.parameters())
        accelerators.average_gradients(self.accelerator, parameters)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(parameters, math.inf))
        if self.guard.accepts_gradient(norm, seen, names, of="gradient of the adversary"):
            self.meter.add("d", torch.stack(self.learnt))
            self.meter.add("grad_d", torch.tensor(norm, device=self.accelerator.device))
        if math.isfinite(norm) or self.scaler.is_enabled():  # which leaves out the step and lowers its scale
            set_rate(self.optimizer, rate)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        self.learnt = []

    def state_dict(self) -> dict[str, Any]:
        parts = {"critic": self.critic, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
