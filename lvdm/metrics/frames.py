"""PSNR and SSIM of single frames, in fp64.

Values are neither clamped nor quantised here: the caller decides, and says so in the protocol.
"""

import torch
import torch.nn.functional as F

from lvdm.errors import UserError

PSNR_CAP = 100.0
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # for a data range of 1


def require_pair(x: torch.Tensor, y: torch.Tensor) -> None:
    """Raises UserError unless both videos have one shape (B, 3, T, H, W)."""
    if x.shape != y.shape or x.ndim != 5 or x.shape[1] != 3:
        raise UserError(f"expected two videos of one shape (B, 3, T, H, W), got {tuple(x.shape)} and {tuple(y.shape)}")


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of every frame, in dB: (B, 3, T, H, W) twice, in [-1, 1], to (B, T).

    The squared error is averaged over C, H and W on the scale [0, 1] (peak 1). The mean of these values over frames is
    at least the PSNR of the pooled error (Jensen). Below an error of 1e-10 the value is 100 dB.
    """
    require_pair(x, y)
    mse = ((x.double() - y.double()) / 2).square().mean(dim=(1, 3, 4))
    return torch.where(mse < 1e-10, PSNR_CAP, -10 * mse.clamp(min=1e-10).log10())


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Structural similarity of every frame: (B, 3, T, H, W) twice, in [-1, 1], to (B, T); 1 for equal frames.

    Wang et al. 2004 on the scale [0, 1]: Gaussian window of 11x11 with sigma 1.5, only where it fits, a channel at a
    time, then the mean. Raises UserError for frames smaller than the window.
    """
    require_pair(x, y)
    if min(x.shape[3:]) < WINDOW:
        raise UserError(f"SSIM needs frames of at least {WINDOW}x{WINDOW}, got {x.shape[3]}x{x.shape[4]}")
    return torch.stack([_ssim(x[:, :, t], y[:, :, t]) for t in range(x.shape[2])], dim=1)  # frame by frame for memory


def _ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) twice to (B,)."""
    x, y = (x.double() + 1) / 2, (y.double() + 1) / 2
    mean_x, mean_y, xx, yy, xy = (_blur(image) for image in (x, y, x * x, y * y, x * y))
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    variances = (xx - mean_x**2) + (yy - mean_y**2)
    return (luminance * (2 * (xy - mean_x * mean_y) + C2) / (variances + C2)).mean(dim=(1, 2, 3))


def _blur(images: torch.Tensor) -> torch.Tensor:
    """The Gaussian mean around every pixel where the window fits: (B, C, H, W) to (B, C, H - 10, W - 10)."""
    offset = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * SIGMA**2))
    weight = (weight / weight.sum()).view(1, 1, 1, WINDOW)
    rows = F.conv2d(images.flatten(0, 1).unsqueeze(1), weight)
    return F.conv2d(rows, weight.mT).unflatten(0, images.shape[:2]).squeeze(2)
