"""Two sets of videos compared through the features of their clips: distances, their intervals and their floor.

A set metric is a function of two `FeatureSet`, real and fake, that gives a number.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lvdm.errors import UserError
from lvdm.metrics.frechet import Covariance, FeatureStats, frechet_distance, frechet_of_rows
from lvdm.rng import generator


@dataclass(frozen=True)
class FeatureSet:
    """The features of the clips of one side, a row a clip (or several: one a frame)."""

    features: Tensor
    """(N, d) fp32 on the CPU."""
    clips: Tensor
    """(N,) int64: the number, from 0, of the clip that a row is of."""
    sources: list[str]
    """The video that each clip is of."""
    parts: "tuple[FeatureSet, ...]" = ()
    """Sets that together hold these rows, where they are known: their statistics are merged, not gathered again."""

    def __post_init__(self):
        if not self.features.isfinite().all():
            clip = self.clips[(~self.features.isfinite()).any(1)][0].item()
            raise UserError(f"{self.sources[clip]}: features are not finite: its frames hold NaN or infinity")

    @property
    def count(self) -> int:
        """Clips."""
        return len(self.sources)

    @cached_property
    def stats(self) -> FeatureStats:
        """Mean and covariance of the rows, in fp64, on the GPU where there is one."""
        stats = FeatureStats(self.features.shape[1], _device())
        for part in self.parts:
            stats.merge(part.stats)
        if not self.parts:
            stats.update(self.features)
        return stats

    def of(self, clip_numbers: Sequence[int] | Tensor) -> "FeatureSet":
        """The set of these clips alone, in this order; each at most once."""
        numbers = torch.as_tensor(clip_numbers, dtype=torch.int64)
        place = torch.full((self.count,), -1)
        place[numbers] = torch.arange(len(numbers))
        places = place[self.clips]
        rows = torch.argsort(places, stable=True)[(places < 0).sum() :]
        return FeatureSet(self.features[rows], places[rows], [self.sources[i] for i in numbers.tolist()])

    def without(self, groups: int) -> "Iterator[FeatureSet]":
        """This set without each of `groups` groups of videos in turn, into which they are dealt by their names."""
        names = sorted(set(self.sources))
        place = {name: i % groups for i, name in enumerate(names)}
        members: list[list[int]] = [[] for _ in range(min(groups, len(names)))]
        for clip, source in enumerate(self.sources):
            members[place[source]].append(clip)
        parts = [self.of(numbers) for numbers in members]
        for left, numbers in enumerate(members):
            rest = self.of(sorted({*range(self.count)} - {*numbers}))
            yield FeatureSet(rest.features, rest.clips, rest.sources, (*parts[:left], *parts[left + 1 :]))

    @staticmethod
    def join(parts: "Sequence[FeatureSet]") -> "FeatureSet":
        """The clips of all parts, numbered on from part to part."""
        starts = np.cumsum([0, *(part.count for part in parts)])
        clips = torch.cat([part.clips + int(start) for part, start in zip(parts, starts[:-1], strict=True)])
        return FeatureSet(torch.cat([p.features for p in parts]), clips, [s for p in parts for s in p.sources])


Metric = Callable[[FeatureSet, FeatureSet], float]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def frechet(real: FeatureSet, fake: FeatureSet, covariance: Covariance = "N") -> float:
    """Fréchet distance (FVD, FID) of two sets, see `lvdm.metrics.frechet`: exact for fewer rows than dimensions too.

    `covariance` divides by N (StyleGAN-V, Latte) or by N-1 (TATS, NumPy). UserError for fewer than 2 rows a side.
    """
    n, m, d = len(real.features), len(fake.features), real.features.shape[1]
    if n * m <= d * d:  # the Gram matrix is the smaller one
        return frechet_of_rows(*_rows(real, fake), covariance)
    return frechet_distance(real.stats, fake.stats, covariance)


def batchwise_frechet(real: FeatureSet, fake: FeatureSet, batch: int) -> float:
    """The mean Fréchet distance (covariance 1/(N-1)) of batches of `batch` clips: biased upwards, whatever the count.

    The clips are taken in order and those after the last whole batch are left out. The expectation is that of the
    distance at N = `batch`. UserError for a batch below 2 and for fewer clips than a batch.
    """
    count = min(real.count, fake.count) // batch if batch > 1 else 0
    if not count:
        raise UserError(f"batches of {batch} clips: expected 2 to {min(real.count, fake.count)}, the clips of a side")
    numbers = torch.arange(count * batch).split(batch)
    return math.fsum(frechet(real.of(part), fake.of(part), "N-1") for part in numbers) / count


def kernel_distance(real: FeatureSet, fake: FeatureSet, block: int = 1024) -> float:
    """Kernel distance (KVD as in TATS; KID of one subset of all): the unbiased squared MMD under ((x.y) / d + 1)^3.

    In fp64, `block` rows at a time. Around 0 for equal distributions, where it may be negative: it is not clamped.
    Gretton et al. 2012; Binkowski et al. 2018, arXiv:1801.01401. UserError for fewer than 2 rows a side.
    """
    n, m = len(real.features), len(fake.features)
    if min(n, m) < 2:
        raise UserError(f"a kernel distance needs at least 2 videos a side, got {n} and {m}")
    within = [(_kernel_sum(x, x, block) - _kernel_diagonal(x)) / (len(x) * (len(x) - 1)) for x in _rows(real, fake)]
    across = _kernel_sum(*_rows(real, fake), block) / (n * m)
    return (within[0] + within[1] - 2 * across).item()


def _rows(*sets: FeatureSet) -> list[Tensor]:
    """In fp64, on the GPU where there is one."""
    return [s.features.to(_device(), torch.float64) for s in sets]


def _kernel_sum(x: Tensor, y: Tensor, block: int) -> Tensor:
    parts = [(a @ b.T / x.shape[1] + 1).pow(3).sum() for a in x.split(block) for b in y.split(block)]
    return torch.stack(parts).sum()


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()


def inception_score(logits: Tensor, splits: int = 10, seed: int = 42) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016).

    (N, classes) logits or log-probabilities of a classifier, in fp64. 1 for equal predictions, K for K classes that are
    balanced in each split and certain. Rows are shuffled by NumPy's RandomState(seed), as StyleGAN-V does; a split's
    size (N / splits) biases the score. UserError for fewer rows than splits.
    """
    if len(logits) < splits:
        raise UserError(f"an inception score of {splits} splits needs as many videos, got {len(logits)}")
    order = np.random.RandomState(seed).permutation(len(logits))
    probabilities = logits.double().softmax(1)[torch.from_numpy(order)]
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    scores = torch.stack([_score_of(probabilities[a:b]) for a, b in pairwise(edges)])
    return scores.mean().item(), scores.std(correction=0).item()


def _score_of(probabilities: Tensor) -> Tensor:
    """exp(entropy of the mean - mean entropy), which is exp(mean KL)."""
    entropy = torch.special.entr(probabilities).sum(1).mean()
    return (torch.special.entr(probabilities.mean(0)).sum() - entropy).exp()


# ---------------------------------------------------------------------------------------------------------------------
# How sure a number is


@dataclass(frozen=True)
class Floor:
    """A metric between two sets of one distribution."""

    mean: float
    low: float
    """Of the draws."""
    high: float
    count: int
    """Clips a side."""


def interval(
    metric: Metric, real: FeatureSet, fake: FeatureSet, paired: bool = False, groups: int = 20
) -> tuple[float, float]:
    """The 95 % interval of `metric(real, fake)` by the delete-a-group jackknife (Kott 2001), clips of a video together.

    Each side's videos are dealt into `groups` groups and the metric is taken again without each. It is the interval of
    the metric *at these counts*: the bias of a Fréchet distance at few clips stays in it. With `paired` both sides are
    of the same videos (reconstructions and their originals), and a group goes from both at once. (nan, nan) where a
    side is too small to spare a group.
    """
    if paired:
        without = [_values(metric, zip(real.without(groups), fake.without(groups), strict=True))]
    else:
        without = [
            _values(metric, ((rest, fake) for rest in real.without(groups))),
            _values(metric, ((real, rest) for rest in fake.without(groups))),
        ]
    variance = sum((len(v) - 1) * v.var(correction=0).item() for v in without)
    half = _student(min(len(v) for v in without) - 1) * math.sqrt(variance)
    value = metric(real, fake)
    return value - half, value + half


def floor(metric: Metric, real: FeatureSet, count: int, draws: int = 5) -> Floor:
    """`metric` of real clips against other real clips, `count` a side: what a perfect generator would score.

    The videos are shuffled `draws` times by the seed 0; the first and the last clips are compared, so at most one video
    is on both sides. Where there are fewer than 2 `count` clips, half of them a side: `Floor.count` says how many.
    Nan where that is too few for the metric.
    """
    count = min(count, real.count // 2)
    orders = (_shuffled(real, draw) for draw in range(draws))
    values = _values(metric, ((real.of(o[:count]), real.of(o[len(o) - count :])) for o in orders))
    return Floor(values.mean().item(), values.min().item(), values.max().item(), count)


def _values(metric: Metric, pairs: Iterable[tuple[FeatureSet, FeatureSet]]) -> Tensor:
    """(pairs,) fp64; nan for sets that are too small."""

    def value(pair: tuple[FeatureSet, FeatureSet]) -> float:
        try:
            return metric(*pair)
        except UserError:
            return math.nan

    return torch.tensor([value(pair) for pair in pairs], dtype=torch.float64)


def _shuffled(clips: FeatureSet, draw: int) -> list[int]:
    """The numbers of all clips, by videos in a random order."""
    names = sorted(set(clips.sources))
    rank = dict(zip(names, torch.randperm(len(names), generator=generator(0, "floor", draw)).tolist(), strict=True))
    return sorted(range(clips.count), key=lambda i: rank[clips.sources[i]])


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, within 1 % from 4 degrees of freedom on (Cornish and Fisher's expansion)."""
    z = 1.959964
    if freedom < 1:
        return math.nan
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
