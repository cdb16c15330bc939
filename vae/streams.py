"""Depth first in time: a video goes through a model piece by piece, and each part of the model takes its own pieces.

The lowest level of a model works on a whole chunk, the levels of large pictures on few frames of it at a time, down to
one. So memory is that of one piece at each level and of what the convolutions keep, whatever the length of the video.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vae.blocks import StreamState

Run = Callable[[Tensor, StreamState | None], Tensor]
"""(frames, the state of the stream or None of a whole clip) -> frames."""


@dataclass(frozen=True)
class Stage:
    """A part of a model, and the pieces of a video that it takes."""

    run: Run
    rate: int
    """Frames of the video, at the largest picture, that one frame of its input stands for."""
    step: int = 1
    """A piece has a multiple of so many frames ..."""
    first: int = 1
    """... and the first piece of a video so many more, or these alone."""

    def lengths(self, frames: int, chunk: int, begun: bool) -> list[int]:
        """Of the pieces that `frames` frames make, none above `chunk` frames of the video unless a step is."""
        first, lengths = 0 if begun else self.first, []
        while True:
            room = max(chunk // self.rate - first, 0 if first else self.step)
            length = first + min(room, frames - first) // self.step * self.step
            if frames < first or not length:
                return lengths
            lengths.append(length)
            frames, first = frames - length, 0


class Stream:
    """A video on its way through `stages`, with at most about `chunk` of its frames in each of them."""

    def __init__(self, stages: Sequence[Stage], chunk: int):
        self.stages, self.chunk = stages, chunk
        self.state = StreamState()
        self.waiting: list[Tensor | None] = [None] * len(stages)  # frames too few for a piece
        self.begun = [False] * len(stages)

    def push(self, x: Tensor, level: int = 0) -> Iterator[Tensor]:
        """What comes out for the next frames (B, C, t, H, W) of the video, as soon as it does.

        Nothing is held that is not needed later: neither `x` nor a piece outlives the stage that takes it.
        """
        if level == len(self.stages):
            yield x
            return
        pieces = self._pieces(x, level)
        del x
        while pieces:
            yield from self.push(self.stages[level].run(pieces.pop(0), self.state), level + 1)

    def _pieces(self, x: Tensor, level: int) -> list[Tensor]:
        """The frames that wait and those of `x`, cut as the stage takes them; the rest waits."""
        if self.waiting[level] is not None:
            x = torch.cat([self.waiting[level], x], 2)
        lengths = self.stages[level].lengths(x.shape[2], self.chunk, self.begun[level])
        *pieces, rest = x.split([*lengths, x.shape[2] - sum(lengths)], 2)
        self.waiting[level] = rest.clone() if rest.shape[2] else None
        self.begun[level] = self.begun[level] or bool(pieces)
        return pieces


def step_of(*modules: nn.Module) -> int:
    """The step of a stage of these modules: what the `step` of every module in them divides."""
    return math.lcm(*(part.step for module in modules for part in module.modules() if hasattr(part, "step")))


def down_stages(encoder: nn.Module) -> list[Stage]:
    """Those of an encoder with `levels`, `downs` between them, and `level(i, x, state)`."""
    last, rate, stages = len(encoder.downs), 1, []
    for i, blocks in enumerate(encoder.levels):
        ends = [encoder.conv_in] * (i == 0) + [encoder.conv_out] * (i == last)
        stages.append(Stage(_level(encoder, i), rate, step_of(blocks, *ends)))
        if i < last:
            stages.append(Stage(encoder.downs[i], rate, step_of(encoder.downs[i])))
            rate *= encoder.downs[i].time
    return stages


def _level(coder: nn.Module, i: int) -> Run:
    return lambda x, state: coder.level(i, x, state)


def up_stages(decoder: nn.Module) -> list[Stage]:
    """Those of a decoder with `levels`, `ups` between them, and `level(i, x, state)`."""
    last, rate, stages = len(decoder.ups), math.prod(up.time for up in decoder.ups), []
    for i, blocks in enumerate(decoder.levels):
        ends = [decoder.conv_in] * (i == 0) + [decoder.conv_out] * (i == last)
        stages.append(Stage(_level(decoder, i), rate, step_of(blocks, *ends)))
        if i < last:
            up = decoder.ups[i]
            stages.append(Stage(up.lengthen, rate))
            rate //= up.time
            stages.append(Stage(up.draw, rate, step_of(up)))
    return stages
