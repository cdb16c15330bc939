"""Triton kernels of GroupNorm and its SiLU, forward and backward; vae/fused.py says when they run.

A tensor (B, C, T, H, W) is B*T frames of H*W pixels with C channels, in any layout whose pixels lie at one distance:
NDHWC (channels_last_3d), NCDHW, slices of both in time; others are copied to NDHWC first. C is a power of two. Results
have the dtype of the input, all arithmetic is fp32, and nothing is added up atomically, so results repeat.

Whatever the statistics, `_moments` reads x and `_normalise` reads x and writes y; backward, `_sums` reads x and dy,
`_gradient` reads both and writes dx. Between them PyTorch adds up partial results of C numbers each. Mean and variance
come from Welford's updates (1962), merged after Chan, Golub and LeVeque (1979).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE, WARPS = 8192, 8
"""Numbers that a program holds of a tensor, and the warps that do: 32 numbers a thread."""
LOOPS = 8
"""Tiles that a program of a reduction goes through, at most."""


class GroupNorm(torch.autograd.Function):
    """`vae.fused.group_norm` in kernels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, per_frame: bool, silu: bool
    ) -> Tensor:
        y, mean, rstd = forward(x, weight, bias, groups, eps, per_frame, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dy, *ctx.saved_tensors, ctx.silu), None, None, None, None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, per_frame: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and mean and 1 / deviation of each frame, or of each clip, and group: (B, T or 1, groups) in fp32."""
    x = _evenly(x)
    y = torch.empty_like(x)
    x, out = _pixels(x), _pixels(y)
    (b, c, t, pixels), (rows, loops) = x.shape, _tiles(x)
    partial = x.new_empty(b, t, pixels // (rows * loops), 2, c, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _moments[(partial.shape[2], b * t)](x, partial, t, *x.stride(), c, rows, loops, num_warps=WARPS)
        means, squares = partial.unflatten(-1, (groups, -1)).unbind(3)
        over = (2, 4) if per_frame else (1, 2, 4)
        mean = means.mean(over, keepdim=True)
        variance = (squares / (rows * loops) + (means - mean).square()).mean(over, keepdim=True)
        mean, rstd = (s.reshape(b, -1, groups) for s in (mean, (variance + eps).rsqrt()))
        _normalise[(pixels // rows, b * t)](
            *(x, out, weight, bias, mean, rstd, t, *x.stride(), *out.stride(), c, groups, rows, per_frame, silu),
            num_warps=WARPS,
        )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    per_frame, groups = mean.shape[1] == x.shape[2], mean.shape[2]
    x = _evenly(x)
    dx = torch.empty_like(x)
    x, dy, out = _pixels(x), _pixels(_evenly(dy)), _pixels(dx)
    (b, c, t, pixels), (rows, loops) = x.shape, _tiles(x)
    partial = x.new_empty(b, t, pixels // (rows * loops), 2, c, dtype=torch.float32)
    common = (weight, bias, mean, rstd, t, *x.stride(), *dy.stride())
    with torch.cuda.device_of(x):
        _sums[(partial.shape[2], b * t)](
            *(x, dy, partial, *common, c, groups, rows, loops, per_frame, silu), num_warps=WARPS
        )
        sums = partial.sum(2)  # (B, T, 2, C)
        db, dw = sums.sum((0, 1)).unbind(0)
        means = (sums * weight.float()).unflatten(-1, (groups, -1)).sum(-1)  # of the gradient of the normalised x
        means = means if per_frame else means.sum(1, keepdim=True)
        means = means / (pixels * (c // groups) * (1 if per_frame else t))
        _gradient[(pixels // rows, b * t)](
            *(x, dy, out, means.contiguous(), *common, *out.stride(), c, groups, rows, per_frame, silu),
            num_warps=WARPS,
        )
    return dx, dw.to(weight.dtype), db.to(bias.dtype)


def _evenly(x: Tensor) -> Tensor:
    """`x`, in NDHWC where the pixels of a frame lie at several distances, or a tile's numbers farther than 32 bits."""
    (_, channel, _, down, across), (_, channels, _, height, width) = x.stride(), x.shape
    even = down == width * across or 1 in (height, width)
    near = channel * channels + (across if width > 1 else down) * TILE < 2**31
    return x if even and near else x.contiguous(memory_format=torch.channels_last_3d)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T, H*W), always a view: what kernels write to it is in `x`."""
    return x.view(*x.shape[:3], -1)


def _tiles(x: Tensor) -> tuple[int, int]:
    """Pixels a tile, and tiles a program of a reduction: powers of two that divide the pixels of a frame."""
    channels, pixels = x.shape[1], x.shape[3]
    most = max(1, TILE // channels)
    rows = math.gcd(pixels, most)
    return rows, math.gcd(pixels // rows, LOOPS)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. The grid is (parts of a frame, B*T); `sb`, `sc`, `st`, `sp` are the strides of batch, channels, time, pixels.


@triton.jit
def _offsets(part, t, sb, sc, st, sp, C: tl.constexpr, ROWS: tl.constexpr):
    """Where the tile `part` of this program's frame lies: ROWS pixels of C channels. 64 bits to its start, for a frame
    may be large; 32 within it, which takes fewer registers."""
    frame = tl.program_id(1)
    start = (frame // t).to(tl.int64) * sb + (frame % t).to(tl.int64) * st + tl.cast(part, tl.int64) * ROWS * sp
    return start + (tl.arange(0, ROWS)[:, None] * sp + tl.arange(0, C)[None, :] * sc)


@triton.jit
def _of_channels(statistic, t, C: tl.constexpr, GROUPS: tl.constexpr, PER_FRAME: tl.constexpr):
    """A statistic of this program's frame or clip, a channel: (1, C)."""
    frame = tl.program_id(1)
    item = frame if PER_FRAME else frame // t
    return tl.load(statistic + item * GROUPS + tl.arange(0, C) // (C // GROUPS))[None, :]


@triton.jit
def _parameter(parameter, C: tl.constexpr):
    return tl.load(parameter + tl.arange(0, C)).to(tl.float32)[None, :]


@triton.jit
def _store_pair(partial, first, second, C: tl.constexpr):
    """Two results a channel of this program."""
    at = partial + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (2 * C) + tl.arange(0, C)
    tl.store(at, first)
    tl.store(at + C, second)


@triton.jit
def _moments(x, partial, t, sb, sc, st, sp, C: tl.constexpr, ROWS: tl.constexpr, LOOPS: tl.constexpr):
    """Mean and squared deviations from it, a channel, of ROWS * LOOPS pixels."""
    mean = tl.zeros((ROWS, C), tl.float32)
    squares = tl.zeros((ROWS, C), tl.float32)
    for i in range(LOOPS):
        tile = tl.load(x + _offsets(tl.program_id(0) * LOOPS + i, t, sb, sc, st, sp, C, ROWS)).to(tl.float32)
        difference = tile - mean
        mean += difference / (i + 1)
        squares += difference * (tile - mean)
    whole = tl.sum(mean, 0) / ROWS
    apart = mean - whole[None, :]
    _store_pair(partial, whole, tl.sum(squares + LOOPS * apart * apart, 0), C)


@triton.jit
def _normalise(
    x, y, weight, bias, mean, rstd, t, sb, sc, st, sp, yb, yc, yt, yp,
    C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, PER_FRAME: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    tile = tl.load(x + _offsets(part, t, sb, sc, st, sp, C, ROWS)).to(tl.float32)
    scale = _of_channels(rstd, t, C, GROUPS, PER_FRAME) * _parameter(weight, C)
    tile = (tile - _of_channels(mean, t, C, GROUPS, PER_FRAME)) * scale + _parameter(bias, C)
    if SILU:
        tile = tile * tl.sigmoid(tile)
    tl.store(y + _offsets(part, t, yb, yc, yt, yp, C, ROWS), tile.to(y.dtype.element_ty))


@triton.jit
def _before_affine(
    x, dy, weight, bias, mean, rstd, part, t, sb, sc, st, sp, gb, gc, gt, gp,
    C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, PER_FRAME: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The normalised tile, and the gradient of what SiLU takes."""
    tile = tl.load(x + _offsets(part, t, sb, sc, st, sp, C, ROWS)).to(tl.float32)
    slope = tl.load(dy + _offsets(part, t, gb, gc, gt, gp, C, ROWS)).to(tl.float32)
    tile = (tile - _of_channels(mean, t, C, GROUPS, PER_FRAME)) * _of_channels(rstd, t, C, GROUPS, PER_FRAME)
    if SILU:
        z = tile * _parameter(weight, C) + _parameter(bias, C)
        gate = tl.sigmoid(z)
        slope = slope * gate * (1 + z * (1 - gate))
    return tile, slope


@triton.jit
def _sums(
    x, dy, partial, weight, bias, mean, rstd, t, sb, sc, st, sp, gb, gc, gt, gp,
    C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, LOOPS: tl.constexpr,
    PER_FRAME: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The gradients of bias and weight of ROWS * LOOPS pixels."""
    db = tl.zeros((C,), tl.float32)
    dw = tl.zeros((C,), tl.float32)
    for i in range(LOOPS):
        tile, slope = _before_affine(
            x, dy, weight, bias, mean, rstd, tl.program_id(0) * LOOPS + i, t, sb, sc, st, sp, gb, gc, gt, gp,
            C, GROUPS, ROWS, PER_FRAME, SILU,
        )  # fmt: skip
        db += tl.sum(slope, 0)
        dw += tl.sum(slope * tile, 0)
    _store_pair(partial, db, dw, C)


@triton.jit
def _gradient(
    x, dy, dx, means, weight, bias, mean, rstd, t, sb, sc, st, sp, gb, gc, gt, gp, xb, xc, xt, xp,
    C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, PER_FRAME: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx; `means` (B, T or 1, 2, groups) are those of the gradient of the normalised x, alone and times that x."""
    part, frame = tl.program_id(0), tl.program_id(1)
    tile, slope = _before_affine(
        x, dy, weight, bias, mean, rstd, part, t, sb, sc, st, sp, gb, gc, gt, gp, C, GROUPS, ROWS, PER_FRAME, SILU
    )
    item = frame if PER_FRAME else frame // t
    at = means + item * (2 * GROUPS) + tl.arange(0, C) // (C // GROUPS)
    slope = slope * _parameter(weight, C) - tl.load(at)[None, :] - tile * tl.load(at + GROUPS)[None, :]
    slope = slope * _of_channels(rstd, t, C, GROUPS, PER_FRAME)
    tl.store(dx + _offsets(part, t, xb, xc, xt, xp, C, ROWS), slope.to(dx.dtype.element_ty))
