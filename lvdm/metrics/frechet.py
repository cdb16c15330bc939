"""Fréchet distance between two sets of feature vectors, with statistics gathered in fp64 batch by batch."""

from typing import Literal

import torch
from torch import Tensor

from lvdm.errors import UserError

Covariance = Literal["N", "N-1"]
"""What the sum of squares is divided by."""


class FeatureStats:
    """Mean and covariance of the rows seen so far, in fp64; memory does not grow with their number."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean)(x - mean)^T
        self._root: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Adds rows (N, dim). Raises UserError if they are not finite."""
        if not features.isfinite().all():
            raise UserError("features are not finite: the videos or the network that made them hold NaN or infinity")
        rows = features.detach().to(self.mean.device, torch.float64)
        mean = rows.mean(dim=0)
        self._add(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: "FeatureStats") -> None:
        """Adds the rows that `other` has seen."""
        self._add(other.count, other.mean, other._scatter)

    def cov(self, covariance: Covariance = "N") -> Tensor:
        """Covariance (dim, dim), divided by N as StyleGAN-V and Latte do, or by N-1 as TATS and NumPy do."""
        return self._scatter / _divisor(self.count, covariance)

    def root(self, covariance: Covariance = "N") -> Tensor:
        """The symmetric square root of the covariance: worked out once, whatever these rows are compared with."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self._scatter)
            self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return self._root / _divisor(self.count, covariance) ** 0.5

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Chan, Golub and LeVeque 1979: no cancellation, however far the mean is from zero."""
        total = self.count + count
        if count:
            delta = mean - self.mean
            self._scatter = self._scatter.add_(scatter).addr_(delta, delta, alpha=self.count * count / total)
            self.mean = self.mean + delta * (count / total)
            self.count, self._root = total, None


def frechet_distance(a: FeatureStats, b: FeatureStats, covariance: Covariance = "N") -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the two Gaussians (Dowson and Landau 1982).

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2), i.e. of the square roots of the
    eigenvalues of S_a^(1/2) S_b S_a^(1/2): real, and right to about 1e-8 of itself for singular covariances too (fewer
    rows than dimensions). Raises UserError for fewer than 2 rows a side.
    """
    _require_two(a.count, b.count)
    root = torch.linalg.svdvals(a.root(covariance) @ b.root(covariance)).sum()
    traces = a.cov(covariance).trace() + b.cov(covariance).trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * root
    return max(distance.item(), 0.0)  # rounding can leave -1e-13


def frechet_of_rows(x: Tensor, y: Tensor, covariance: Covariance = "N") -> float:
    """`frechet_distance` of the rows (N, dim) and (M, dim) without their covariances: cheaper for few rows.

    With A and B the centred rows over the root of their number, S_a = A^T A, and the singular values of
    S_a^(1/2) S_b^(1/2) are those of the (N, M) matrix A B^T. In fp64. Raises UserError for fewer than 2 rows a side.
    """
    _require_two(len(x), len(y))
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    a = (x - mean_x) / _divisor(len(x), covariance) ** 0.5
    b = (y - mean_y) / _divisor(len(y), covariance) ** 0.5
    root = torch.linalg.svdvals(a @ b.T).sum()
    distance = (mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    return max(distance.item(), 0.0)


def _require_two(a: int, b: int) -> None:
    if min(a, b) < 2:
        raise UserError(f"a Fréchet distance needs at least 2 videos a side, got {a} and {b}")


def _divisor(count: int, covariance: Covariance) -> int:
    return count - (covariance == "N-1")
