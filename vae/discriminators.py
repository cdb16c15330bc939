"""The adversaries of VAE training: patch discriminators, over space and time or over each frame alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.blocks import Norm, batch_to_frames, frames_to_batch

STRIDES = ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 1))


class PatchGAN(nn.Module):
    """A clip (B, 3, T, H, W) in [-1, 1] -> logits a patch; images are T = 1. Five convolutions, space by 8.

    - `dims=3`: kernels 3x3x3, time by 4, (B, 1, ~T/4, ~H/8, ~W/8), as OD-VAE trains against: 4,665,729 parameters at
      width 64.
    - `dims=2`: kernels 4x4 a frame, (B, 1, T, H/8 - 2, W/8 - 2), as the image VAEs of latent diffusion train against:
      2,765,633 parameters at width 64. Frames have at least 24 pixels.

    `norm="group"` is the default. `"batch"`, as published, takes its statistics from the clips that one process sees at
    a time, so the loss depends on how a step is split over processes and micro-batches.
    """

    def __init__(self, dims: int = 3, width: int = 64, norm: str = "group"):
        super().__init__()
        self.dims, kernel = dims, {3: 3, 2: 4}[dims]
        conv = {3: nn.Conv3d, 2: nn.Conv2d}[dims]
        batch_norm = {3: nn.BatchNorm3d, 2: nn.BatchNorm2d}[dims]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = 3
        for i, stride in enumerate(STRIDES):
            out = width * 2**i
            self.convs.append(conv(channels, out, kernel, stride[-dims:], 1, bias=i == 0))
            if i:
                self.norms.append(batch_norm(out) if norm == "batch" else Norm(out, "clip", eps=1e-5))
            channels = out
        self.out = conv(channels, 1, kernel, 1, 1)
        self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one layout for what is real and what a decoder drew
            x = x.contiguous(memory_format=torch.channels_last_3d)
        if self.dims == 2:
            return batch_to_frames(self._logits(frames_to_batch(x)), len(x))
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(_convolved(self.convs[0], x), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            h = F.leaky_relu(norm(_convolved(conv, h)), 0.2)
        return _convolved(self.out, h)


def _convolved(conv: nn.Conv2d | nn.Conv3d, h: Tensor) -> Tensor:
    """`conv(h)`; two frames are padded by hand, since the weight gradient of a CPU's bf16 convolution that pads them
    itself is not computed."""
    if h.ndim == 5 and h.shape[2] == 2:
        return F.conv3d(F.pad(h, (0, 0, 0, 0, 1, 1)), conv.weight, conv.bias, conv.stride, (0, 1, 1))
    return conv(h)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
