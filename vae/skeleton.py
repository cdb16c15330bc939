"""The encoder and decoder that the OD-VAE family shares: the Stable Diffusion layout, inflated to causal 3D."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vae.blocks import CausalConv3d, MidBlock, MultiScaleDown, Norm, ResBlock, StreamState, Upsample


class _Checkpointed(nn.Module):
    """Recomputes residual blocks in the backward pass when diffusers' `enable_gradient_checkpointing()` asks for it."""

    gradient_checkpointing = False

    def _run(self, block: ResBlock, h: Tensor, state: StreamState | None) -> Tensor:
        if self.gradient_checkpointing and self.training and state is None:
            return checkpoint(block, h, use_reentrant=False)
        return block(h, state)


class Encoder(_Checkpointed):
    """(B, 3, T, H, W) -> (B, 2z, (T-1)/4 + 1, H/8, W/8).

    Levels 0 and 1 and `conv_in` see one frame at a time; levels 2, 3 and the middle are causal 3D (OD-VAE variant 4).
    Level 0 ends in a spatial downsampling, levels 1 and 2 in a temporal and spatial one.
    """

    def __init__(self, z: int, width: int, mult: tuple[int, ...], blocks: int, kernels, fuse: str, norm: str):
        super().__init__()
        widths = [width * m for m in mult]
        self.conv_in = CausalConv3d(3, width, (1, 3, 3))
        self.levels, self.downs = nn.ModuleList(), nn.ModuleList()
        channels = width
        for i, out in enumerate(widths):
            level = nn.ModuleList()
            for _ in range(blocks):
                level.append(ResBlock(channels, out, temporal=i > 1, norm=norm))
                channels = out
            self.levels.append(level)
            if i < len(widths) - 1:
                spatial = CausalConv3d(out, out, (1, 3, 3), (1, 2, 2))
                self.downs.append(spatial if i == 0 else MultiScaleDown(out, kernels, fuse))
        self.mid = MidBlock(channels, norm)
        self.norm_out = Norm(channels, norm)
        self.conv_out = CausalConv3d(channels, 2 * z)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        h = self.conv_in(x, state)
        for i, level in enumerate(self.levels):
            for block in level:
                h = self._run(block, h, state)
            if i < len(self.downs):
                h = self.downs[i](h, state)
        h = self.mid(h, state)
        return self.conv_out(F.silu(self.norm_out(h)), state)


class Decoder(_Checkpointed):
    """(B, z, t, h, w) -> (B, 3, T, 8h, 8w), in two halves that meet after the last temporal upsampling.

    `trunk` gives the features there (the tap of UniVAE eq. 2: 512 channels, all T frames, H/2); `head` renders them.
    `last_time` is the temporal factor of that last upsampler: 2 for T = 4(t-1) + 1 frames, 4 for twice the rate.
    """

    def __init__(self, z: int, width: int, mult: tuple[int, ...], blocks: int, norm: str, upsample: str, last_time=2):
        super().__init__()
        widths = [width * m for m in mult][::-1]
        self.post_quant_conv = CausalConv3d(z, z, (1, 1, 1))
        self.conv_in = CausalConv3d(z, widths[0])
        self.mid = MidBlock(widths[0], norm)
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        channels = widths[0]
        for out in widths:
            level = nn.ModuleList()
            for _ in range(blocks + 1):
                level.append(ResBlock(channels, out, temporal=True, norm=norm))
                channels = out
            self.levels.append(level)
        for out, time in zip(widths, (2, last_time, 1), strict=False):
            self.ups.append(Upsample(out, time, upsample if time > 1 else "nearest"))
        self.norm_out = Norm(channels, norm)
        self.conv_out = CausalConv3d(channels, 3)

    def trunk(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        """Latents -> features after the last temporal upsampler, its convolution included."""
        h = self.mid(self.conv_in(self.post_quant_conv(z), state), state)
        return self._levels(h, state, 0, 2)

    def head(self, h: Tensor, state: StreamState | None = None) -> Tensor:
        """Features of the tap -> frames."""
        h = self._levels(h, state, 2, len(self.levels))
        return self.conv_out(F.silu(self.norm_out(h)), state)

    def forward(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        return self.head(self.trunk(z, state), state)

    def _levels(self, h: Tensor, state: StreamState | None, start: int, stop: int) -> Tensor:
        for i in range(start, stop):
            for block in self.levels[i]:
                h = self._run(block, h, state)
            if i < len(self.ups):
                h = self.ups[i](h, state)
        return h
