"""The encoder and decoder of the Stable Diffusion layout, whose blocks each family chooses.

Level i has `widths[i]` channels and works at 1/2^i of the picture's size; the decoder runs from the last level back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from vae.blocks import (
    CUBE,
    FRAME,
    POINT,
    Attention,
    CausalConv3d,
    Checkpointed,
    Convolution,
    FrameAttention,
    MidBlock,
    Norm,
    Normalisation,
    ResBlock,
    StreamState,
    norm_silu_conv,
)
from vae.streams import Stage, down_stages, up_stages

Step = Callable[[int, int], nn.Module]
"""(level, channels) -> the module that leaves this level for the next."""


@dataclass(frozen=True)
class Plan:
    """Which blocks an encoder or decoder is made of."""

    widths: Sequence[int]
    """Channels of levels 0, 1, 2, ..."""
    blocks: int
    """Residual blocks a level of the encoder; a decoder has one more."""
    kinds: Sequence[str]
    """Kind of the residual blocks of each level (see `KINDS`)."""
    norm: str
    """Statistics of the norms, "frame" or "clip"; those of 2D blocks, which see one frame, are always the frame's."""
    eps: float = 1e-6
    """Of the norms."""
    mid_kind: str = "3d"
    """Kind of the residual blocks of the middle."""
    mid_attention: Attention | None = None
    """Of the middle; None attends a frame."""
    attention_levels: Sequence[int] = ()
    """Levels whose every block is followed by an attention of each frame."""
    conv: Convolution | Sequence[Convolution] = CausalConv3d
    """The convolution that sees other frames: one for all levels, or one a level."""
    end: tuple[int, int, int] = CUBE
    """Kernel of the last convolution."""

    def norm_of(self, kind: str) -> Normalisation:
        """The norm of a kind of blocks; that of "3d" is also the last one before frames or latents."""
        return partial(Norm, mode="frame" if kind == "2d" else self.norm, eps=self.eps)

    def conv_of(self, level: int) -> Convolution:
        """The convolution of a level; -1 is the last level's."""
        return self.conv if callable(self.conv) else self.conv[level]

    def level(self, level: int, channels: int, blocks: int) -> nn.ModuleList:
        """The blocks of a level that is entered with `channels`."""
        out, kind, parts = self.widths[level], self.kinds[level], []
        for _ in range(blocks):
            parts.append(ResBlock(channels, out, kind, self.norm_of(kind), self.conv_of(level)))
            if level in self.attention_levels:
                parts.append(FrameAttention(out, self.norm_of("2d")))
            channels = out
        return nn.ModuleList(parts)

    def middle(self) -> MidBlock:
        """The middle, at the last level's width."""
        norm = self.norm_of(self.mid_kind)
        attention = self.mid_attention or partial(FrameAttention, norm=norm)
        return MidBlock(self.widths[-1], self.mid_kind, norm, attention, self.conv_of(-1))


class Encoder(Checkpointed):
    """(B, 3, T, H, W) -> (B, channels, t, H/2^n, W/2^n), n = number of levels - 1.

    `down(i, channels)` leaves level i; `begin` is the kernel of the first convolution.
    """

    def __init__(self, channels: int, plan: Plan, down: Step, begin: tuple[int, int, int] = FRAME):
        super().__init__()
        widths = plan.widths
        self.conv_in = plan.conv_of(0)(3, widths[0], begin)
        self.levels, self.downs = nn.ModuleList(), nn.ModuleList()
        for i, out in enumerate(widths):
            self.levels.append(plan.level(i, widths[max(0, i - 1)], plan.blocks))
            if i < len(widths) - 1:
                self.downs.append(down(i, out))
        self.mid = plan.middle()
        self.norm_out = plan.norm_of("3d")(widths[-1])
        self.conv_out = plan.conv_of(-1)(widths[-1], channels, plan.end)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        for i in range(len(self.levels)):
            x = self.level(i, x, state)
            if i < len(self.downs):
                x = self.downs[i](x, state)
        return x

    def level(self, i: int, h: Tensor, state: StreamState | None = None) -> Tensor:
        """Level `i`, and what comes before the first or after the last."""
        if i == 0:
            h = self.conv_in(h, state)
        for block in self.levels[i]:
            h = self._run(block, h, state)
        if i < len(self.downs):
            return h
        h = self.mid(h, state)
        return norm_silu_conv(h, self.norm_out, self.conv_out, state)

    def stages(self) -> list[Stage]:
        """For a stream."""
        return down_stages(self)


class Decoder(Checkpointed):
    """(B, z, t, h, w) -> (B, 3, T, 2^n h, 2^n w). `up(i, channels)` leaves level i for level i - 1.

    In two halves that meet after the second upsampling, the last temporal one of UniVAE: `trunk` gives the features
    there (the tap of eq. 2: 512 channels, all T frames, H/2), `head` renders them. `self.levels` are in the order in
    which they run: the last level of `plan` is the first.
    """

    def __init__(self, z: int, plan: Plan, up: Step, begin: tuple[int, int, int] = CUBE, post_quant: bool = True):
        super().__init__()
        widths = plan.widths
        self.post_quant_conv = CausalConv3d(z, z, POINT) if post_quant else nn.Identity()
        self.conv_in = plan.conv_of(-1)(z, widths[-1], begin)
        self.mid = plan.middle()
        last = len(widths) - 1
        self.levels = nn.ModuleList(
            plan.level(i, widths[min(i + 1, last)], plan.blocks + 1) for i in range(last, -1, -1)
        )
        self.ups = nn.ModuleList(up(i, widths[i]) for i in range(last, 0, -1))
        self.norm_out = plan.norm_of("3d")(widths[0])
        self.conv_out = plan.conv_of(0)(widths[0], 3, plan.end)

    def trunk(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        """Latents -> features after the second upsampler, its convolution included."""
        return self._levels(z, state, 0, 2)

    def head(self, h: Tensor, state: StreamState | None = None) -> Tensor:
        """Features of the tap -> frames."""
        return self._levels(h, state, 2, len(self.levels))

    def forward(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        return self.head(self.trunk(z, state), state)

    def _levels(self, h: Tensor, state: StreamState | None, start: int, stop: int) -> Tensor:
        for i in range(start, stop):
            h = self.level(i, h, state)
            if i < len(self.ups):
                h = self.ups[i](h, state)
        return h

    def level(self, i: int, h: Tensor, state: StreamState | None = None) -> Tensor:
        """The `i`-th level to run, and what comes before the first or after the last."""
        if i == 0:
            h = self.mid(self.conv_in(self.post_quant_conv(h), state), state)
        for block in self.levels[i]:
            h = self._run(block, h, state)
        return h if i < len(self.ups) else norm_silu_conv(h, self.norm_out, self.conv_out, state)

    def stages(self) -> list[Stage]:
        """For a stream."""
        return up_stages(self)
