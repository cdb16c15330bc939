"""Fréchet distance between two sets of feature vectors, with statistics gathered in fp64 batch by batch."""

import torch

from lvdm.errors import UserError

ESTIMATOR = "Fréchet, covariance 1/N, fp64"


class FeatureStats:
    """Mean and covariance of the rows seen so far, in fp64 on the CPU; memory does not grow with their number."""

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def update(self, features: torch.Tensor) -> None:
        """Adds rows (N, dim). Raises UserError if they are not finite."""
        if not features.isfinite().all():
            raise UserError("features are not finite: the videos or the network that made them hold NaN or infinity")
        rows = features.detach().to("cpu", torch.float64)
        mean = rows.mean(dim=0)
        self._add(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: "FeatureStats") -> None:
        """Adds the rows that `other` has seen, e.g. another process."""
        self._add(other.count, other.mean, other._scatter)

    @property
    def cov(self) -> torch.Tensor:
        """Covariance (dim, dim), divided by N and not N - 1, as StyleGAN-V and Latte do."""
        return self._scatter / self.count

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Chan, Golub and LeVeque 1979: no cancellation, however far the mean is from zero."""
        total = self.count + count
        if count:
            delta = mean - self.mean
            self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
            self.mean = self.mean + delta * (count / total)
            self.count = total


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the two Gaussians (Dowson and Landau 1982).

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2), i.e. of the square roots of the
    eigenvalues of S_a^(1/2) S_b S_a^(1/2): real, and exact for singular covariances too (fewer rows than dimensions).
    Raises UserError for fewer than 2 rows a side.
    """
    if min(a.count, b.count) < 2:
        raise UserError(f"a Fréchet distance needs at least 2 videos a side, got {a.count} and {b.count}")
    root = torch.linalg.svdvals(_sqrt(a.cov) @ _sqrt(b.cov)).sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root
    return max(distance.item(), 0.0)  # rounding can leave -1e-13


def _sqrt(cov: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
