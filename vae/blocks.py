"""The block vocabulary of causal video autoencoders. Tensors are (B, C, T, H, W).

Whole clips, images and streams run the same modules with the same weights. A stream hands a `StreamState` through
`forward`; a temporal convolution of kernel k and stride s finds in it the last k - s frames of its padded input, under
its own path in the model. Without a state the clip is whole, and its first frame is replicated to the front.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StreamState(dict):
    """What a stream remembers between chunks: frames by module path, and whether the first chunk has passed."""

    started = False


class Streamed(nn.Module):
    """A module with something to remember; `path` is set once the model is built."""

    path = ""


def frames_to_batch(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x: Tensor, batch: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Convolution and norm


class CausalConv3d(nn.Conv3d, Streamed):
    """A convolution that never sees a later frame: the first frame is replicated k_t - 1 times to the front.

    In space: zeros, on both sides at stride 1, right and bottom only at stride 2. T frames give
    floor((T - 1) / s_t) + 1. A temporal kernel of 1 is a 2D convolution a frame.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3), stride=(1, 1, 1)):
        super().__init__(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        downsamples = self.stride[1] > 1
        padding = (0, 0) if downsamples else (self.kernel_size[1] // 2, self.kernel_size[2] // 2)
        if downsamples:
            x = F.pad(x, (0, 1, 0, 1))
        if self.kernel_size[0] == 1 or (x.shape[2] == 1 and state is None):
            # An image is a clip of equal frames, so the taps of the kernel add up to one 2D kernel.
            y = F.conv2d(frames_to_batch(x), self.weight.sum(2), self.bias, self.stride[1:], padding)
            return batch_to_frames(y, len(x))
        x = self._with_past(x, state)
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, *padding))

    def _with_past(self, x: Tensor, state: StreamState | None) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        past = state[self.path] if state is not None and state.started else x[:, :, :1].expand(-1, -1, k - 1, -1, -1)
        x = torch.cat([past, x], 2)
        if state is not None:
            outputs = (x.shape[2] - k) // s + 1
            state[self.path] = x[:, :, outputs * s :].clone()
        return x


def norm_groups(channels: int) -> int:
    """32 groups from 128 channels on, groups of at least 4 channels below; always a divisor of `channels`."""
    return math.gcd(32, max(1, channels // 4), channels)


class Norm(nn.GroupNorm):
    """GroupNorm with the statistics of a frame (`frame`: causal, exact streams) or the clip (`clip`: as published)."""

    def __init__(self, channels: int, mode: str):
        super().__init__(norm_groups(channels), channels, eps=1e-6)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "clip":
            return super().forward(x)
        return batch_to_frames(super().forward(frames_to_batch(x)), len(x))


# ---------------------------------------------------------------------------------------------------------------------
# Residual block and attention


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv on a shortcut; temporal (3x3x3, causal) or a frame at a time (1x3x3)."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool, norm: str):
        super().__init__()
        kernel = (3, 3, 3) if temporal else (1, 3, 3)
        self.norm1 = Norm(in_channels, norm)
        self.conv1 = CausalConv3d(in_channels, out_channels, kernel)
        self.norm2 = Norm(out_channels, norm)
        self.conv2 = CausalConv3d(out_channels, out_channels, kernel)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), state)
        h = self.conv2(F.silu(self.norm2(h)), state)
        return self.shortcut(x) + h


class FrameAttention(nn.Module):
    """Single-head self-attention over the pixels of each frame, pre-norm, residual."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        self.norm = Norm(channels, norm)
        self.to_q, self.to_k, self.to_v, self.to_out = (CausalConv3d(channels, channels, (1, 1, 1)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            frames_to_batch(to(h)).flatten(2).mT.unsqueeze(1).contiguous() for to in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        h = batch_to_frames(h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:]), len(x))
        return x + self.to_out(h)


class MidBlock(nn.Module):
    """Temporal residual block, frame attention, temporal residual block."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        self.block1 = ResBlock(channels, channels, True, norm)
        self.attention = FrameAttention(channels, norm)
        self.block2 = ResBlock(channels, channels, True, norm)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.block2(self.attention(self.block1(x, state)), state)


# ---------------------------------------------------------------------------------------------------------------------
# Down and up


class MultiScaleDown(nn.Module):
    """Multi-scale temporal downsampling (UniVAE 3.2, eq. 1): space and time by 2.

    The channels are split in p equal groups; group i goes through a causal convolution with kernel (t_i, 3, 3) and
    stride (2, 2, 2); the results are concatenated. One kernel (3,) is OD-VAE's downsampling. `fuse="conv1x1"` mixes the
    groups again by a 1x1x1 convolution that starts as the identity.
    """

    def __init__(self, channels: int, kernels: tuple[int, ...], fuse: str):
        super().__init__()
        part = channels // len(kernels)
        self.branches = nn.ModuleList(CausalConv3d(part, part, (t, 3, 3), (2, 2, 2)) for t in kernels)
        self.fuse = CausalConv3d(channels, channels, (1, 1, 1)) if fuse == "conv1x1" else nn.Identity()
        if fuse == "conv1x1":
            nn.init.dirac_(self.fuse.weight)
            nn.init.zeros_(self.fuse.bias)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        parts = x.chunk(len(self.branches), 1)
        return self.fuse(torch.cat([branch(part, state) for branch, part in zip(self.branches, parts, strict=True)], 1))


class Upsample(nn.Module):
    """Space by 2 and time by `time`, then a convolution. The first frame of a video stays one frame.

    `nearest` repeats and is causal; `trilinear` (as published, align_corners=False) looks one frame ahead.
    """

    def __init__(self, channels: int, time: int, mode: str):
        super().__init__()
        self.time, self.mode = time, mode
        self.conv = CausalConv3d(channels, channels, (3 if time > 1 else 1, 3, 3))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        if self.time == 1:
            return self.conv(self._grow(x, 1), state)
        first = 0 if state is not None and state.started else 1
        head, tail = x[:, :, :first], x[:, :, first:]
        parts = [self._grow(part, time) for part, time in ((head, 1), (tail, self.time)) if part.shape[2]]
        return self.conv(torch.cat(parts, 2) if len(parts) > 1 else parts[0], state)

    def _grow(self, x: Tensor, time: int) -> Tensor:
        return F.interpolate(x, scale_factor=(float(time), 2.0, 2.0), mode=self.mode)
