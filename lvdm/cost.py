"""What a training step will cost, counted on the meta device before anything is allocated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

OUTSIDE = "not counted: CUDA itself, what kernels borrow and what is computed again"


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of a forward and of a backward pass, and the bytes kept between the two in fp32."""

    flops: int
    activation_bytes: int
    backward_flops: int = 0

    def passes(self, backward: bool = True) -> int:
        """FLOPs of the forward pass, and of the backward pass if there is one."""
        return self.flops + backward * self.backward_flops


def forward_cost(forward: Callable[[], Any], backward: bool = False) -> StepCost:
    """Runs `forward` (on meta tensors) and counts; with `backward` also from the tensor it returns back to the weights
    that learn, what gradient checkpointing computes again included."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        is_view = tensor._base is not None
        if not isinstance(tensor._base if is_view else tensor, nn.Parameter):  # weights are there anyway
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()
        flops = counter.get_total_flops()
        if backward:
            torch.autograd.backward(output, torch.empty_like(output))
        return StepCost(flops, sum(kept.values()), counter.get_total_flops() - flops)


def parameters(module: nn.Module) -> int:
    """The number of parameters, buffers not counted."""
    return sum(p.numel() for p in module.parameters())


def describe_forward(name: str, held: int, cost: StepCost, times: float = 1) -> str:
    """The line that `--dry-run` prints of a program that does not train: parameters, and FLOPs of `times` passes."""
    return f"{name}: {held:,} parameters, {cost.flops * times / 1e12:.3g} TFLOP"


def describe_step(
    name: str, trained: int, held: int, flops: int, activation_bytes: int, judge_bytes: int = 0, outside: str = OUTSIDE
) -> str:
    """The lines that `--dry-run` prints of one phase: parameters, FLOPs of the model a step, memory at the peak.

    A trained parameter takes 20 bytes: fp32 weight, gradient, two Adam moments and EMA; a frozen one takes 4. To them
    come `judge_bytes`, what the networks of the loss hold, and the activations, of which bf16 keeps half.
    """
    state = (20 * trained + 4 * (held - trained) + judge_bytes) / 2**30
    activations = activation_bytes / 2**30
    return (
        f"{name}: {trained:,} of {held:,} parameters trained, {flops / 1e12:.3g} TFLOP a step of the model, "
        f"about {state + activations:.2f} GiB at the peak in fp32, {state + activations / 2:.2f} in bf16: "
        f"{state:.2f} of weights, gradients and optimizer, the rest activations ({outside})"
    )
