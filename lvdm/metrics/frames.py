"""Videos against their originals, in fp64: PSNR, SSIM, information preservation, flicker; by position in the group.

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
    return _decibels(((x.double() - y.double()) / 2).square().mean(dim=(1, 3, 4)))


def pooled_psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """PSNR of the squared error of all frames together: (B, 3, T, H, W) twice, in [-1, 1], to (B,).

    At most the mean of `psnr` over the frames, which the field reports; the same cap.
    """
    require_pair(x, y)
    return _decibels(((x.double() - y.double()) / 2).square().mean(dim=(1, 2, 3, 4)))


def _decibels(mse: torch.Tensor) -> torch.Tensor:
    return torch.where(mse < 1e-10, PSNR_CAP, -10 * mse.clamp(min=1e-10).log10())


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Structural similarity of every frame: (B, 3, T, H, W) twice, in [-1, 1], to (B, T); 1 for equal frames.

    Wang et al. 2004 on the scale [0, 1]: Gaussian window of 11x11 with sigma 1.5, only where it fits, a channel at a
    time, then the mean. As in Open-Sora Plan's evaluation; torchmetrics by default reflects at the border besides, and
    its `return_full_image` without the 5 outer pixels is this map. Raises UserError for frames smaller than the window.
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


def preserved(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The two sums of information preservation, which is 1 - sum |x - y| / sum |x| (IV-VAE, supplement, eq. 2).

    (B, 3, T, H, W) twice, in [-1, 1], the original first, to (B, 2): sum |x| - sum |x - y| and sum |x| of each clip.
    The paper sums over all clips before it divides, so the number is the total of the first over that of the second,
    and a clip that is nearly mid-grey weighs nearly nothing. The scale, on which mid-grey is 0, is the one the VAE
    sees; the paper does not say which.
    """
    require_pair(x, y)
    error, whole = ((x.double() - y.double()).abs().sum((1, 2, 3, 4)), x.double().abs().sum((1, 2, 3, 4)))
    return torch.stack([whole - error, whole], dim=1)


def flicker(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How much more or less y changes from frame to frame than x: the mean of |dy - dx| over C, H, W in levels of 255.

    (B, 3, T, H, W) twice, in [-1, 1], to (B, T-1); 0 for equal frames, and for errors that stand still.
    """
    require_pair(x, y)
    return (y - x).double().diff(dim=2).abs().mean((1, 3, 4)) * 127.5


def by_group_position(values: torch.Tensor, group: int = 4) -> torch.Tensor:
    """Values (N, T) of frames by position in the frame group: (N, group), means over the groups of a clip.

    IV-VAE, supplement 1.2: the first frame, an image, is left out; the others fall into groups of `group`, which the
    encoder makes one latent. UserError unless T = group * n + 1, n >= 1.
    """
    frames = values.shape[1]
    if frames <= group or frames % group != 1:
        raise UserError(f"frames={frames}: expected {group}n+1, such as {4 * group + 1}, for groups of {group} frames")
    return values[:, 1:].unflatten(1, (-1, group)).mean(dim=1)
