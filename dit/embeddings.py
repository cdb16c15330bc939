"""Sinusoids of positions and timesteps, as DiT and Latte fix them: no parameters but the timestep's MLP."""

import math

import torch
from torch import Tensor, nn


def position_table(positions: Tensor, width: int) -> Tensor:
    """Sinusoids of `positions` (N,), sines first, then cosines, at width / 2 frequencies from 1 down to 1e-4.

    Returns (N, width) fp64 in [-1, 1]; `width` must be even.
    """
    frequencies = 1e4 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = positions.to(torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def grid_table(rows: int, columns: int, width: int) -> Tensor:
    """Sinusoids of a grid's places, read row by row: the first half of the width tells the column, the second the row.

    Returns (rows * columns, width) fp64 in [-1, 1]; `width` must be a multiple of 4.
    """
    column = torch.arange(columns).repeat(rows)
    row = torch.arange(rows).repeat_interleave(columns)
    return torch.cat([position_table(column, width // 2), position_table(row, width // 2)], dim=1)


def timestep_sinusoid(timestep: Tensor, width: int = 256) -> Tensor:
    """Sinusoids of the diffusion timestep (B,), cosines first, then sines, periods up to 1e4 * 2 pi.

    Returns (B, width) fp32, whatever autocast or the module's dtype: bf16 cannot tell 999 from 1000.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(1e4) / half * torch.arange(half, dtype=torch.float32, device=timestep.device))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Timestep (B,), int or float in 0..999, to a vector (B, width): sinusoid of 256, then Linear, SiLU, Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        return self.mlp(timestep_sinusoid(timestep).to(self.mlp[0].weight.dtype))
