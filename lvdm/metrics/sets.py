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
    Within a side only rows of different clips make a pair: frames of one clip are alike, whatever the distribution.
    Gretton et al. 2012; Binkowski et al. 2018, arXiv:1801.01401. UserError for fewer than 2 clips a side.
    """
    if min(real.count, fake.count) < 2:
        raise UserError(f"a kernel distance needs at least 2 videos a side, got {real.count} and {fake.count}")
    x, y = _rows(real, fake)
    of_x, of_y = (side.clips.to(x.device) for side in (real, fake))
    within = _kernel_mean(x, x, of_x, of_x, block) + _kernel_mean(y, y, of_y, of_y, block)
    across = _kernel_mean(x, y, of_x, real.count + of_y, block)  # no clip of one side is one of the other
    return (within - 2 * across).item()


def _rows(*sets: FeatureSet) -> list[Tensor]:
    """In fp64, on the GPU where there is one."""
    return [s.features.to(_device(), torch.float64) for s in sets]


def _kernel_mean(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, block: int) -> Tensor:
    """The mean of the kernel over pairs of rows whose clips, `of_x` and `of_y`, differ."""
    total, pairs = torch.zeros_like(x[0, 0]), 0
    for a, of_a in zip(x.split(block), of_x.split(block), strict=True):
        for b, of_b in zip(y.split(block), of_y.split(block), strict=True):
            same = of_a[:, None] == of_b
            total += (a @ b.T / x.shape[1] + 1).pow(3).masked_fill(same, 0).sum()
            pairs += (~same).sum()
    return total / pairs


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
    real: int
    """Clips in the place of the real ones."""
    fake: int
    """Clips in the place of the samples; 0 of a score that is of one side."""


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


def floor(metric: Metric, reals: FeatureSet, real: int, fake: int, draws: int = 5) -> Floor:
    """`metric` of `real` clips against `fake` other real clips: what a perfect generator scores at these counts.

    The videos are shuffled `draws` times by the seed 0; the first and the last clips are compared, so at most one video
    is on both sides. Where there are fewer than `real` + `fake` clips, half of them at most are in the place of the
    samples and the rest in that of the real ones: `Floor.real` and `Floor.fake` say how many. Nan where that is too few
    for the metric.
    """
    fake = min(fake, reals.count // 2)
    real = min(real, reals.count - fake)
    orders = (_shuffled(reals, draw) for draw in range(draws))
    values = _values(metric, ((reals.of(o[:real]), reals.of(o[len(o) - fake :])) for o in orders))
    return Floor(values.mean().item(), values.min().item(), values.max().item(), real, fake)


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
    """The 97.5 % quantile of Student's t, from 5 degrees of freedom on within 1 % (Cornish and Fisher)."""
    if freedom < 5:
        return (math.nan, 12.706205, 4.302653, 3.182446, 2.776445)[max(freedom, 0)]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
