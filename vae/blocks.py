"""The block vocabulary of video autoencoders. Tensors are (B, C, T, H, W).

Whole clips, images and streams run the same modules with the same weights. A stream hands a `StreamState` through
`forward`; a temporal convolution of kernel k and stride s finds in it the last k - s frames of its padded input.
Without a state the clip is whole, and its first frame is replicated to the front.

What differs between families is a choice of blocks: a *kind* of residual block ("2d", "3d", "half"), a convolution
(`CausalConv3d`, `GroupCausalConv3d`, `CentredConv3d`) and a norm, each handed to the builders as a function.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvdm.recompute import recomputed
from vae.fused import group_norm

CUBE, FRAME, POINT = (3, 3, 3), (1, 3, 3), (1, 1, 1)
KINDS = {"2d": (FRAME, FRAME), "3d": (CUBE, CUBE), "half": (CUBE, FRAME)}
"""Kernels of the two convolutions of a residual block."""

Convolution = Callable[..., nn.Module]
"""(in_channels, out_channels, kernel, stride) -> a convolution."""
Normalisation = Callable[[int], nn.Module]
"""(channels) -> a norm."""
Attention = Callable[[int], nn.Module]
"""(channels) -> an attention."""


class StreamState(dict):
    """What a stream remembers between pieces: frames by module, and which modules have seen the first frame."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: set[object] = set()


def begins(module: object, state: StreamState | None) -> bool:
    """Whether `module` is about to see the first frame of the video: always in a whole clip, in a stream once."""
    if state is None:
        return True
    first = module not in state.begun
    state.begun.add(module)
    return first


def frames_to_batch(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x: Tensor, batch: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions


class Conv3d(nn.Conv3d):
    """The spatial half of all convolutions here: zeros, on both sides at stride 1, right and bottom only at stride 2.

    A temporal kernel of 1 is a 2D convolution a frame; how a longer one sees other frames is the subclass's.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = CUBE, stride=(1, 1, 1)):
        super().__init__(in_channels, out_channels, kernel, stride)

    @property
    def time(self) -> int:
        """Frames that one of its output stands for."""
        return self.stride[0]

    @property
    def step(self) -> int:
        """The least number of frames that a later piece of a stream may have; a piece is a multiple of it."""
        return self.stride[0]

    def _before(self, x: Tensor, count: int, state: StreamState | None) -> Tensor:
        """What a causal convolution sees before `x`: what the stream kept, which it lets go of, or the first frame."""
        return torch.cat([x[:, :, :1]] * count, 2) if begins(self, state) else state.pop(self)

    def _spatial(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, padded where the stride is 2, and what the convolution itself pads with zeros.

        On CUDA all is NDHWC from the first convolution on: the faster layout there, in which the frames of a clip join
        its batch without a copy. Nothing here leaves the layout that it finds.
        """
        if x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        if self.stride[1] > 1:
            return F.pad(x, (0, 1, 0, 1)), (0, 0)
        return x, (self.kernel_size[1] // 2, self.kernel_size[2] // 2)

    def _a_frame_at_a_time(self, x: Tensor, weight: Tensor) -> Tensor:
        x, padding = self._spatial(x)
        return batch_to_frames(F.conv2d(frames_to_batch(x), weight, self.bias, self.stride[1:], padding), len(x))

    def _over_time(self, x: Tensor) -> Tensor:
        """The convolution of a clip whose frames are padded already."""
        x, padding = self._spatial(x)
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, *padding))


class CausalConv3d(Conv3d):
    """A convolution that never sees a later frame: the first frame is replicated k_t - 1 times to the front.

    T frames give floor((T - 1) / s_t) + 1.
    """

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        if k == 1:
            return self._a_frame_at_a_time(x, self.weight[:, :, 0])
        if x.shape[2] == 1 and state is None:
            # An image is a clip of equal frames, so the taps of the kernel add up to one 2D kernel.
            return self._a_frame_at_a_time(x, self.weight.sum(2))
        x = torch.cat([self._before(x, k - 1, state), x], 2)
        if state is not None:
            outputs = (x.shape[2] - k) // s + 1
            state[self] = x[:, :, outputs * s :].clone()
        return self._over_time(x)


class CentredConv3d(Conv3d):
    """A convolution that sees as many later frames as earlier ones; beyond the clip are zeros, or its end frames."""

    def __init__(self, in_channels: int, out_channels: int, kernel=CUBE, stride=(1, 1, 1), replicate: bool = False):
        super().__init__(in_channels, out_channels, kernel, stride)
        self.replicate = replicate

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        if state is not None:
            raise TypeError("a convolution that looks ahead cannot stream")
        n = self.kernel_size[0] // 2
        if n == 0:
            return self._a_frame_at_a_time(x, self.weight[:, :, 0])
        if self.replicate:
            x = torch.cat([*[x[:, :, :1]] * n, x, *[x[:, :, -1:]] * n], 2)
        else:
            x = F.pad(x, (0, 0, 0, 0, n, n))
        return self._over_time(x)


class GroupCausalConv3d(Conv3d):
    """IV-VAE's group causal convolution (3.3): frame 0 is a group, then every `group` frames are one.

    Inside a group the kernel is centred, so frames see each other both ways; to the left is the end of the group
    before (for frame 0: itself), to the right of the group are zeros, so nothing leaks back across its edge. A clip
    has T = group * n + 1 frames, a later chunk of a stream group * n.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel=CUBE, stride=(1, 1, 1), group: int = 4):
        super().__init__(in_channels, out_channels, kernel, stride)
        self.group = group

    @property
    def step(self) -> int:
        return self.group if self.kernel_size[0] > 1 else 1

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        n = self.kernel_size[0] // 2
        if n == 0:
            return self._a_frame_at_a_time(x, self.weight[:, :, 0])
        first = 0 if state is not None and self in state else 1
        past, out = self._before(x, n, state), []
        if state is not None:
            state[self] = torch.cat([past, x[:, :, -n:]], 2)[:, :, -n:].clone()
        if first:
            head = torch.cat([past, x[:, :, :1]], 2)
            past = head[:, :, -n:]
            out.append(self._over_time(F.pad(head, (0, 0, 0, 0, 0, n))))
        if x.shape[2] > first:
            out.append(self._groups(past, x[:, :, first:]))
        return torch.cat(out, 2) if len(out) > 1 else out[0]

    def _groups(self, past: Tensor, x: Tensor) -> Tensor:
        """All groups at once, as a batch, each with the frames before it and zeros after it."""
        n = self.kernel_size[0] // 2
        windows = torch.cat([past, x], 2).unfold(2, n + self.group, self.group)  # (B, C, groups, H, W, n + group)
        batch = F.pad(windows.permute(0, 2, 5, 3, 4, 1).flatten(0, 1), (0, 0, 0, 0, 0, 0, 0, n))  # NDHWC
        y = self._over_time(batch.permute(0, 4, 1, 2, 3))
        return y.unflatten(0, (len(x), -1)).transpose(1, 2).flatten(2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Norm, residual block, attention


def norm_groups(channels: int) -> int:
    """32 groups from 128 channels on, groups of at least 4 channels below; always a divisor of `channels`."""
    return math.gcd(32, max(1, channels // 4), channels)


class Norm(nn.GroupNorm):
    """GroupNorm with the statistics of a frame (`frame`: causal, exact streams) or the clip (`clip`: as published)."""

    def __init__(self, channels: int, mode: str, eps: float = 1e-6):
        super().__init__(norm_groups(channels), channels, eps=eps)
        self.mode = mode

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """`silu` also applies the SiLU behind the norm, which saves a pass over the data or two."""
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.mode == "frame", silu)


def norm_silu(x: Tensor, norm: nn.Module) -> Tensor:
    """SiLU of any norm of x, fused where it is a `Norm`."""
    return norm(x, silu=True) if isinstance(norm, Norm) else F.silu(norm(x))


def norm_silu_conv(x: Tensor, norm: nn.Module, conv: nn.Module, state: StreamState | None = None) -> Tensor:
    """conv(SiLU(norm(x))). Training keeps x alone of it: what the convolution takes, its padding included, is computed
    again in the backward pass."""
    if state is not None:
        return conv(norm_silu(x, norm), state)
    return recomputed(lambda x: conv(norm_silu(x, norm)), x)


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv on a shortcut; `kind` says which convolutions see other frames."""

    def __init__(
        self, in_channels: int, out_channels: int, kind: str, norm: Normalisation, conv: Convolution = CausalConv3d
    ):
        super().__init__()
        first, second = KINDS[kind]
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, first)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, second)
        self.shortcut = nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, POINT)

    def compile(self, **options: Any) -> None:
        """As of any module, for whole clips. In a stream it runs as it is: Dynamo takes the graph of one block for
        another, and what a `StreamState` holds for a module is no part of its guards."""
        super().compile(**options)
        compiled = self._compiled_call_impl
        self._compiled_call_impl = lambda x, state=None: compiled(x) if state is None else self._call_impl(x, state)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        h = norm_silu_conv(x, self.norm1, self.conv1, state)
        return self.shortcut(x) + norm_silu_conv(h, self.norm2, self.conv2, state)


class FrameAttention(nn.Module):
    """Single-head self-attention over the pixels of each frame, pre-norm, residual.

    `legacy_reshape` mixes up time and channels when T > 1, as the first OD-VAE code did: for its old weights only.
    """

    def __init__(self, channels: int, norm: Normalisation, legacy_reshape: bool = False):
        super().__init__()
        self.legacy_reshape = legacy_reshape
        self.norm = norm(channels)
        self.to_q, self.to_k, self.to_v, self.to_out = (CausalConv3d(channels, channels, POINT) for _ in range(4))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        h = self.norm(x)
        q, k, v = (self._tokens(to(h)).mT.unsqueeze(1).contiguous() for to in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT
        h = h.reshape(x.shape) if self.legacy_reshape else batch_to_frames(h.unflatten(2, x.shape[-2:]), len(x))
        return x + self.to_out(h)

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B*T, C, H*W)."""
        if self.legacy_reshape:
            return x.reshape(x.shape[0] * x.shape[2], x.shape[1], -1)
        return frames_to_batch(x).flatten(2)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(
        self, channels: int, kind: str, norm: Normalisation, attention: Attention, conv: Convolution = CausalConv3d
    ):
        super().__init__()
        self.block1 = ResBlock(channels, channels, kind, norm, conv)
        self.attention = attention(channels)
        self.block2 = ResBlock(channels, channels, kind, norm, conv)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.block2(self.attention(self.block1(x, state), state), state)


class Checkpointed(nn.Module):
    """Recomputes blocks in the backward pass when diffusers' `enable_gradient_checkpointing()` asks for it."""

    gradient_checkpointing = False

    def _run(self, block: nn.Module, h: Tensor, state: StreamState | None = None) -> Tensor:
        if self.gradient_checkpointing and self.training and state is None:
            return checkpoint(block, h, use_reentrant=False)
        return block(h, state)


# ---------------------------------------------------------------------------------------------------------------------
# Down and up


class MultiScaleDown(nn.Module):
    """Multi-scale temporal downsampling (UniVAE 3.2, eq. 1): space and time by 2.

    The channels are split in p equal groups; group i goes through a causal convolution with kernel (t_i, 3, 3) and
    stride (2, 2, 2); the results are concatenated. One kernel (3,) is OD-VAE's downsampling. `fuse="conv1x1"` mixes the
    groups again by a 1x1x1 convolution that starts as the identity.

    The groups stay convolutions of their own: one grouped convolution, with zeros before the shorter kernels, has 1.5
    times the products at (3, 5, 7, 9) and took 1.5 to 2.3 times as long on a CPU.
    """

    time = 2

    def __init__(self, channels: int, kernels: tuple[int, ...], fuse: str = "none", conv: Convolution = CausalConv3d):
        super().__init__()
        part = channels // len(kernels)
        self.branches = nn.ModuleList(conv(part, part, (t, 3, 3), (2, 2, 2)) for t in kernels)
        self.fuse = CausalConv3d(channels, channels, POINT) if fuse == "conv1x1" else nn.Identity()
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

    def __init__(self, channels: int, time: int, mode: str, conv: Convolution = CausalConv3d):
        super().__init__()
        self.time, self.mode = time, mode
        self.conv = conv(channels, channels, CUBE if time > 1 else FRAME)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.draw(self.lengthen(x, state), state)

    def lengthen(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """Time by `time`, but for the first frame of the video."""
        if self.time == 1:
            return x
        first = 1 if begins(self, state) else 0
        head, tail = x[:, :, :first], x[:, :, first:]
        if tail.shape[2]:
            tail = self._grow(tail, self.time, 1)
        return torch.cat([head, tail], 2) if first else tail

    def draw(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """Space by 2, and the convolution."""
        return self.conv(self._grow(x, 1, 2), state)

    def _grow(self, x: Tensor, time: int, space: int) -> Tensor:
        return (repeated if self.mode == "nearest" else interpolated)(x, time, space)


def repeated(x: Tensor, time: int, space: int) -> Tensor:
    """Nearest neighbours: each frame `time` times and each pixel `space` times along both sides, in one copy.

    A single frame that is only repeated in time is a view.
    """
    channels_last = x.stride(1) == 1
    x = x.permute(0, 2, 3, 4, 1).unsqueeze(1) if channels_last else x.unsqueeze(-1)
    b, c, t, h, w, last = x.shape
    x = x[:, :, :, None, :, None, :, None].expand(b, c, t, time, h, space, w, space, last)
    x = x.reshape(b, c, t * time, h * space, w * space, last)
    return x.squeeze(1).permute(0, 4, 1, 2, 3) if channels_last else x.squeeze(-1)


def interleaved(*parts: Tensor) -> Tensor:
    """Clips of one shape as one: the first frame of each in turn, then the second of each, ... in one copy."""
    below = torch.cat(parts, 3)  # which, unlike a stack, is NDHWC where they are
    return below.unflatten(3, (len(parts), -1)).flatten(2, 3)


def interpolated(x: Tensor, time: int, space: int) -> Tensor:
    """Linear in time, then in space, align_corners=False: trilinear interpolation, but NDHWC and without its copies."""
    # Autocast, which a meta tensor has none of, would widen what is largest.
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        if time > 1:  # all pixels and channels of a frame as one row of a picture
            frames = x.permute(0, 2, 3, 4, 1)
            rows = F.interpolate(frames.flatten(2).unsqueeze(1), scale_factor=(float(time), 1.0), mode="bilinear")
            x = rows.squeeze(1).unflatten(2, frames.shape[2:]).permute(0, 4, 1, 2, 3)
        if space > 1:
            x = batch_to_frames(F.interpolate(frames_to_batch(x), scale_factor=float(space), mode="bilinear"), len(x))
        return x
