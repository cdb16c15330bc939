"""Latents from a transformer: the one way of `lvdm sample`, the pipeline and the previews of training."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit.conditioning import Condition
from lvdm.errors import UserError
from lvdm.samplers import OnStep, guided, sample


def draw(
    model: Any,
    condition: Condition,
    generators: Sequence[torch.Generator],
    scheduler: Any,
    steps: int,
    guidance: float = 1.0,
    on_step: OnStep | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Normalised latents (B, C, t, h, w) fp32, a video a generator (of the CPU), on `device`: the model's if None.

    `condition` holds B labels, or none for an unconditional model, which ignores `guidance`. `scheduler` is one of
    `lvdm.samplers` that fits the model's objective; `on_step` is as there. UserError for fewer than 1 or more than 1000
    `steps`.
    """
    config, device = model.config, device or model.device
    denoise = guided(model, condition.to(device), 1.0 if config.condition == "none" else guidance)
    shape = (config.in_channels, config.frames, *config.size)
    return sample(denoise, scheduler, shape, steps, generators, device, on_step)


def guidance_of(model: Any, asked: float | None = None) -> float:
    """The guidance scale to draw with: the asked one, or 7 for a model that has a null class and 1 for another.

    UserError for a scale below 0, and for one other than 1 where there is no null class to lean away from.
    """
    config = model.config
    null = config.condition == "class" and config.label_dropout > 0
    if asked is None:
        return 7.0 if null else 1.0
    if not 0 <= asked < math.inf:
        raise UserError(f"guidance={asked}: expected at least 0")
    if asked != 1 and not null:
        why = "is unconditional" if config.condition == "none" else "has no null class (label_dropout=0)"
        raise UserError(f"guidance={asked}: this transformer {why}; use guidance=1, or leave it out")
    return float(asked)
