"""Tiles in space with linear blends: what a frame larger than memory is encoded and decoded in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lvdm.errors import UserError
from vae.memory import without_weights

if TYPE_CHECKING:
    from vae.base import VideoVAE

WIDE = 128
"""Latents along the picture that `reach` looks at: so many that padding hardly changes the ratio of two widths."""


@dataclass(frozen=True)
class Tiling:
    """How clips are cut: in space into overlapping tiles, in time into runs of frames."""

    size: int
    """Height and width of a tile in pixels; 0 keeps frames whole."""
    overlap: float
    """Share of a tile that it has in common with the next one, where both are blended linearly."""
    frames: int
    """Frames a run; 0 keeps clips whole. Exact models stream; the others repeat one frame (see `VideoVAE`)."""

    def check(self, space_factor: int) -> "Tiling":
        """Itself; a UserError where the numbers do not fit a VAE of this spatial factor."""
        if not isinstance(self.size, int) or not isinstance(self.frames, int):
            raise UserError(f"tile size={self.size}, frames={self.frames}: expected whole numbers, e.g. 256 and 17")
        if self.size < 0 or self.size % space_factor:
            near = max(space_factor, self.size // space_factor * space_factor)
            raise UserError(f"tile size={self.size}: must be divisible by {space_factor}, e.g. {near}, or 0 for none")
        if not isinstance(self.overlap, int | float) or not 0 <= self.overlap <= 0.5:
            raise UserError(f"tile overlap={self.overlap}: expected a share from 0 to 0.5, e.g. 0.25")
        if self.frames < 0 or self.frames == 1:
            raise UserError(f"tile frames={self.frames}: expected at least 2, e.g. 17, or 0 for whole clips")
        return self

    def count(self, height: int, width: int, space_factor: int) -> int:
        """Tiles of a frame of `height` x `width` pixels."""
        sides = (len(starts(n // space_factor, self.size // space_factor, self.overlap)) for n in (height, width))
        return math.prod(sides)


def tiled(run: Callable[[Tensor, object], Tensor], x: Tensor, tile: int, overlap: float, unit: int = 1) -> Tensor:
    """`run(piece, key)` over overlapping tiles of the last two dimensions of `x`, blended where they overlap.

    `tile` counts latents; a latent is `unit` elements of `x` (8 pixels when encoding, 1 when decoding). The last tile
    of a row ends at the border at full width, so there are no slivers. `key` names a tile, the same in every call.
    """
    rows, columns = (starts(n // unit, tile, overlap) for n in x.shape[-2:])
    if len(rows) == len(columns) == 1:
        return run(x, (0, 0))
    total = weight = None
    for top in rows:
        for left in columns:
            piece = x[..., top * unit : (top + tile) * unit, left * unit : (left + tile) * unit]
            y = run(piece, (top, left))
            up = y.shape[-1] // (piece.shape[-1] // unit)  # output elements a latent
            if total is None:
                height, width = (n // unit * up for n in x.shape[-2:])
                total = y.new_zeros(*y.shape[:-2], height, width, dtype=torch.promote_types(y.dtype, torch.float32))
                weight = total.new_zeros(height, width)
            shared = round(tile * overlap) * up
            down, across = (
                _ramp(n, shared, start > 0, start + tile < whole // unit, total)
                for n, start, whole in zip(y.shape[-2:], (top, left), x.shape[-2:], strict=True)
            )
            mask = down[:, None] * across
            here = slice(top * up, top * up + y.shape[-2]), slice(left * up, left * up + y.shape[-1])
            total[..., *here] += y * mask
            weight[here] += mask
    return (total / weight).to(y.dtype)


def starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles of `tile` begin so that they cover `length`, each at least `overlap` of a tile into the last."""
    stride = max(1, tile - round(tile * overlap))
    last = max(0, length - tile)
    return [*range(0, last, stride), last]


def _ramp(length: int, overlap: int, before: bool, after: bool, like: Tensor) -> Tensor:
    """Weights along one side of a tile: 1, falling linearly towards the neighbours it has."""
    position = torch.arange(length, dtype=like.dtype, device=like.device) + 0.5
    ramp = torch.ones_like(position)
    if overlap and before:
        ramp = torch.minimum(ramp, position / overlap)
    if overlap and after:
        ramp = torch.minimum(ramp, position.flip(0) / overlap)
    return ramp


# ---------------------------------------------------------------------------------------------------------------------
# How far a model sees


@torch.inference_mode(False)
@torch.enable_grad()
def reach(model: "VideoVAE") -> int:
    """Pixels that a pixel sees to one side through the convolutions of the encoder, the decoder or D2: the largest.

    A convolution adds half of its span, times the pixels that one of its elements stands for, and of parallel paths
    the longest counts. Attention and the statistics of norms see the whole tile, whatever its size.
    """
    spec, twin = model.spec, without_weights(model).eval()
    side, frames = WIDE * spec.space_factor, spec.valid_frames(1)
    if twin.is_gradient_checkpointing:
        twin.disable_gradient_checkpointing()  # it keeps no inputs of convolutions
    latent = torch.empty(1, *spec.latent_shape(frames, side, side), dtype=model.dtype, device="meta")
    works = [(twin._moments, latent.new_empty(1, 3, frames, side, side)), (twin._frames, latent)]
    works += [(twin._refined, latent)] * spec.refines
    with torch.autocast("cpu", enabled=False):
        return max(math.ceil(_longest(run(x.requires_grad_()).grad_fn, side)) for run, x in works)


def _longest(end: Node, side: int) -> float:
    """Of all paths from `end` to the input of a picture `side` pixels wide, what the convolutions of one add up to."""
    seen: dict[Node, float] = {}
    waiting = [end]
    while waiting:
        node = waiting[-1]
        before = [other for other, _ in node.next_functions if other is not None]
        if missing := [other for other in before if other not in seen]:
            waiting += missing
            continue
        seen[waiting.pop()] = _span(node, side) / 2 + max((seen[other] for other in before), default=0.0)
    return seen[end]


def _span(node: Node, side: int) -> int:
    """Pixels from the first to the last element of a row that one element sees by this operation."""
    if node.name() != "ConvolutionBackward0" or node._saved_weight.ndim < 4:  # of one dimension: over time
        return 0
    pixels = round(side / node._saved_input.shape[-1])
    return pixels * node._saved_dilation[-1] * (node._saved_weight.shape[-1] - 1)
