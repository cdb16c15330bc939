"""Whether a CUDA device's 3D convolutions are right and fast in bf16, looked at before work that rests on them.

cuDNN 9.8 to 9.10 gives wrong bf16 results at some shapes without a word (pytorch issue 163539); builds of torch that
leave cuDNN out for that reason are several times slower (pytorch issues 166122 and 174051).
"""

import functools
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm.rng import generator

WRONG_CUDNN = range(90800, 91100)
"""Versions, as `torch.backends.cudnn.version()` counts them."""
TOLERANCE = 0.02
"""Of the relative error in bf16, where rounding alone makes 0.002 to 0.004."""
CASES = {"3x3x3": ((3, 3, 3), (1, 1, 1)), "9x3x3 at stride 2": ((9, 3, 3), (2, 2, 2))}


def bf16_problem(device: torch.device) -> str:
    """What is wrong with bf16 Conv3d on a CUDA device, "" where nothing is; within two seconds, once a process.

    What is only slow, or known to be wrong at other shapes, is a line on stderr.
    """
    if device.type != "cuda":
        return ""
    return _problem(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _problem(index: int) -> str:
    device = torch.device("cuda", index)
    version = torch.backends.cudnn.version()
    found = f"torch {torch.__version__}, cuDNN {version}"
    errors = {name: bf16_error(device, *case) for name, case in CASES.items()}
    if wrong := [f"{name} is off by {error:.1%}" for name, error in errors.items() if not error < TOLERANCE]:
        return f"bf16 Conv3d is wrong on this device: {', '.join(wrong)} ({found})"
    if (slower := seconds(device, torch.bfloat16) / seconds(device, torch.float32)) > 1:
        print(
            f"Conv3d takes {slower:.1f} times as long in bf16 as in fp32 here ({found}): another torch", file=sys.stderr
        )
    elif version in WRONG_CUDNN:
        print(f"bf16 Conv3d is known to be wrong at some shapes with {found}: cuDNN 9.15 is not", file=sys.stderr)
    return ""


def bf16_error(device: torch.device, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> float:
    """The largest relative error in bf16 of a convolution and of its two gradients, in both layouts of memory."""
    x, weight = _drawn(device, (2, 64, 11, 32, 32)), _drawn(device, (64, 64, *kernel))
    exact, worst = _passes(x, weight, stride), 0.0
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        rounded = _passes(x.bfloat16().contiguous(memory_format=layout), weight.bfloat16(), stride)
        errors = [(a.float() - b).norm() / b.norm() for a, b in zip(rounded, exact, strict=True)]
        worst = max(worst, float(torch.stack(errors).nan_to_num(torch.inf).max()))
    return worst


def seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The shortest of five convolutions of 8 frames of 64x64 with 128 channels."""
    x, weight = _drawn(device, (1, 128, 8, 64, 64)).to(dtype), _drawn(device, (128, 128, 3, 3, 3)).to(dtype)
    taken = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            F.conv3d(x, weight, padding=1).sum().item()  # which waits for the device
            taken.append(time.perf_counter() - start)
    return min(taken[1:])


@torch.inference_mode(False)
@torch.enable_grad()
def _passes(x: Tensor, weight: Tensor, stride: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """The convolution, and the gradients of input and weight of its mean square."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = F.conv3d(x, weight, None, stride, (0, 1, 1))
    return y.detach(), *torch.autograd.grad(y.float().square().mean(), (x, weight))


def _drawn(device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """Numbers that bf16 holds exactly, so that only the convolution rounds."""
    return torch.randn(shape, generator=generator(0, "conv check")).bfloat16().float().to(device)
