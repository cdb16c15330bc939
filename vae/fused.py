"""GroupNorm, alone or with the SiLU behind it, that keeps the layout and the dtype of its input.

On CUDA the Triton kernels of vae/kernels.py do it in two passes over the data, where PyTorch's own operators copy a
channels_last_3d tensor, widen it to fp32 under autocast and take a pass each. Elsewhere, and wherever torch.compile is
at work, which fuses by itself, it is those operators. Both have fp32 statistics and differ by rounding only.
"""

import functools
import importlib.util
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm.errors import UserError

SWITCH = "LVDM_FUSED"
"""The environment variable that leaves the kernels out with 0."""


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, per_frame: bool, silu: bool = False
) -> Tensor:
    """`x` (B, C, T, H, W) normalised with the statistics of each frame or of the clip, in the dtype of `x`; then SiLU,
    if asked for. `weight` and `bias` are (C,). Raises UserError where LVDM_FUSED is neither 0 nor 1."""
    if _for_kernels(x):
        from vae.kernels import GroupNorm

        return GroupNorm.apply(x, weight, bias, groups, eps, per_frame, silu)
    return plain_group_norm(x, weight, bias, groups, eps, per_frame, silu)


def plain_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, per_frame: bool, silu: bool = False
) -> Tensor:
    """`group_norm` in PyTorch's own operators."""
    h = F.group_norm(x.transpose(1, 2).flatten(0, 1) if per_frame else x, groups, weight, bias, eps)
    if silu:
        h = F.silu(h, inplace=not h.requires_grad)
    return (h.unflatten(0, (len(x), -1)).transpose(1, 2) if per_frame else h).to(x.dtype)


def _for_kernels(x: Tensor) -> bool:
    """Whether the kernels take `x`, here and now."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    chosen, channels = os.environ.get(SWITCH, "1"), x.shape[1]
    if chosen not in ("0", "1"):
        raise UserError(f"{SWITCH}={chosen}: expected 1 (kernels on CUDA, the default) or 0 (PyTorch's operators)")
    fits = x.ndim == 5 and x.dtype != torch.float64 and channels & (channels - 1) == 0 and x.numel() > 0
    return chosen == "1" and fits and _sound(x.device)


@functools.cache
def _sound(device: torch.device) -> bool:
    """Whether Triton is there and its kernels agree with PyTorch on this device: looked at once a process."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        error = disagreement(device)
    except Exception as reason:  # Triton compiles when asked; whatever it lacks there, PyTorch's operators do without
        error = " ".join(f"{type(reason).__name__}: {reason}".split())[:200]
    if error:
        print(f"norms: PyTorch's operators in place of Triton's kernels ({error})", file=sys.stderr)
    return not error


@torch.inference_mode(False)
@torch.no_grad()
def disagreement(device: torch.device) -> str:
    """In what the kernels and PyTorch's operators differ on a few numbers, backwards too; "" where they agree.

    Nothing is drawn and no graph is built: this runs in the middle of a first step.
    """
    from vae import kernels

    with torch.autocast(device.type, enabled=False):
        x = torch.linspace(0, 999, 64 * 3 * 32, device=device).sin().view(1, 64, 3, 4, 8)
        dy, weight, bias = x.flip(1), x[0, :, 0, 0, 0] + 1, x[0, :, 1, 1, 1].contiguous()  # kernels read them so
        h, mean, rstd = torch.native_group_norm(x, weight, bias, 1, 64, 96, 16, 1e-6)
        dh = torch.ops.aten.silu_backward(dy, h)
        expected = torch.ops.aten.native_group_norm_backward(dh, x, mean, rstd, weight, 1, 64, 96, 16, [True] * 3)
        y, *statistics = kernels.forward(x, weight, bias, 16, 1e-6, False, True)
        found = kernels.backward(dy, x, weight, bias, *statistics, True)
    pairs = zip(("values", "dx", "dweight", "dbias"), (y, *found), (F.silu(h), *expected), strict=True)
    return ", ".join(f"wrong {name}" for name, a, b in pairs if not torch.allclose(a, b, rtol=1e-3, atol=1e-3))
