"""What a training step will cost, counted on the meta device before anything is allocated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of a forward pass, and the bytes it keeps for the backward pass in fp32."""

    flops: int
    activation_bytes: int


def forward_cost(forward: Callable[[], Any]) -> StepCost:
    """Runs `forward` (on meta tensors) and counts; a training step takes about three times its FLOPs."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        is_view = tensor._base is not None
        if not isinstance(tensor._base if is_view else tensor, nn.Parameter):  # weights are there anyway
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return StepCost(counter.get_total_flops(), sum(kept.values()))


def parameters(module: nn.Module) -> int:
    """The number of parameters, buffers not counted."""
    return sum(p.numel() for p in module.parameters())


def describe_forward(name: str, held: int, cost: StepCost, times: float = 1) -> str:
    """The line that `--dry-run` prints of a program that does not train: parameters, and FLOPs of `times` passes."""
    return f"{name}: {held:,} parameters, {cost.flops * times / 1e12:.3g} TFLOP"


def describe_step(name: str, trained: int, held: int, batch: int, cost: StepCost) -> str:
    """The lines that `--dry-run` prints of one phase: parameters, FLOPs and memory of a step.

    Counted is the model, not what judges it (LPIPS, an adversary). A trained parameter takes 20 bytes: fp32 weight,
    gradient, two Adam moments and EMA; a frozen one takes 4.
    """
    flops, activations = 3 * cost.flops * batch / 1e12, cost.activation_bytes * batch / 2**30
    state = (20 * trained + 4 * (held - trained)) / 2**30
    return (
        f"{name}: {trained:,} of {held:,} parameters trained, {flops:.3g} TFLOP a step of the model, "
        f"{state:.2f} GiB of weights, gradients and optimizer, about {activations:.2f} GiB of activations in fp32 "
        f"(half of it in bf16)"
    )
